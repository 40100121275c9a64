"""Makes Triton's interpreter faster without changing what it computes.

The interpreter replaces the builtins of triton.language whenever a kernel starts and whenever one device function calls
another, and searches all members of its modules for them each time: a third of the time of a small kernel. Here a
module is searched once, and nothing is replaced that is already replaced. The table of numpy's dtypes, built for each
operation, is looked up once per dtype. Whether integers overflow is asked by a dozen operations of tensors; here numpy
is asked.
"""

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter


@functools.cache
def _builtin_names(package: Any) -> list[str]:
    return [name for name in dir(package) if tl.core.is_builtin(getattr(package, name))]


def _patch_builtin(package: Any, *arguments: Any) -> None:
    for name in _builtin_names(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, *arguments)


def _once(patch_lang: Any) -> Any:
    def patch(function: Any) -> Any:
        modules = [
            module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())
        ]
        if any(tl.core.is_builtin(module.load) for module in (tl, *modules)):
            return patch_lang(function)
        return getattr(interpreter, "_LangPatchScope", lambda: None)()

    return patch


def _once_per_dtype(numpy_dtype: Any) -> Any:
    of_scalar = functools.cache(numpy_dtype)

    def of(dtype: Any) -> Any:
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        return numpy_dtype(dtype) if isinstance(dtype, tl.pointer_type) else of_scalar(dtype)

    return of


def _check_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """Raises AssertionError if add, sub or mul of integers (lhs, rhs) overflows; those of 64 bits are not checked."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    result = compute(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    assert result.min() >= dtype.get_int_min_value() and result.max() <= dtype.get_int_max_value(), (
        f"int{dtype.int_bitwidth} overflow detected for operation {operation.__name__}"
    )


def install() -> None:
    """Once per process, before the first kernel runs. Other versions of Triton may lack what is replaced: no change."""
    if not all(
        hasattr(interpreter, name) for name in ("_patch_attr", "_patch_builtin", "_patch_lang", "_get_np_dtype")
    ):
        return
    for package in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base):
        _builtin_names(package)
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = _once(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_per_dtype(interpreter._get_np_dtype)
    if hasattr(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl"):
        semantic.TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
