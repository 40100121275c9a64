"""Makes Triton's interpreter faster without changing what it computes.

Most of the interpreter's time is not numpy's but Triton's own, which checks and describes each operation as if to
compile it once. Here

- the builtins of triton.language, which are replaced whenever a kernel starts and whenever one device function calls
  another, are looked for once, and not replaced where they already are;
- a type of blocks, and what a tensor takes over from its type, is described once;
- operands that have the type or the shape of the result are not converted to it, and constants are kept;
- numpy's dtype of a type is looked up once;
- whether integers overflow, which a dozen operations of tensors ask, numpy is asked;
- bf16 and fp32 are converted by a shift.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter

# All operations of two tensors of such a type are in this type; those of sixteen bits are divided in fp32.
_CLOSED_TYPES = {"fp32", "fp64", "int1"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


@functools.cache
def _builtin_names(package: Any) -> list[str]:
    return [name for name in dir(package) if tl.core.is_builtin(getattr(package, name))]


@functools.cache
def _with_semantic(builtin: Any) -> Any:
    """The builtin as kernels call it. The function below its decorator is called, which only looks for _semantic."""
    function = getattr(builtin, "__wrapped__", builtin)

    def call(*arguments: Any, **options: Any) -> Any:
        options["_semantic"] = interpreter.interpreter_semantic
        return function(*arguments, **options)

    return call


def _patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any = None) -> None:
    (scope.set_attr if scope else setattr)(obj, name, _with_semantic(member))


def _patch_builtin(package: Any, *arguments: Any) -> None:
    for name in _builtin_names(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            _patch_attr(package, name, member, *arguments)


@functools.cache
def _modules_seen_by(function: Any) -> list[Any]:
    return [module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())]


def _once(patch_lang: Any) -> Any:
    def patch(function: Any) -> Any:
        if any(tl.core.is_builtin(module.load) for module in (tl, *_modules_seen_by(function))):
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


def _once_per_block_type(describe: Any) -> Any:
    """block_type.__init__, after which equal types share their attributes."""
    attributes: dict[Any, dict[str, Any]] = {}

    def initialise(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        key = element_ty.name, getattr(element_ty, "address_space", None), sizes
        if key not in attributes:
            describe(self, element_ty, shape)
            self.sizes = sizes
            attributes[key] = vars(self)
        self.__dict__ = attributes[key]

    return initialise


def _once_per_type(describe: Any) -> Any:
    """tensor.__init__, after which tensors of one type share what they take over from it."""

    def initialise(self: Any, handle: Any, type: Any) -> None:
        try:
            self.shape, self.numel, self.dtype = type.of_tensors
        except AttributeError:
            describe(self, handle, type)
            type.of_tensors = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type

    return initialise


def _at_once(unwrap: Any) -> Any:
    """_unwrap_if_constexpr, which asks of each operand whether it is a list, a tuple or a constant."""

    def unwrapped(value: Any) -> Any:
        return value if type(value) is tl.tensor or type(value) is int else unwrap(value)

    return unwrapped


def _is_the_same_or(equal: Any) -> Any:
    return lambda self, other: self is other or equal(self, other)


def _unless_of_one_type(check: Any) -> Any:
    """TritonSemantic.binary_op_type_checking_impl, to which operands of several types and of sixteen bits are left."""

    def checked(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
            if vars(lhs.type) is vars(rhs.type) and lhs.dtype.name in _CLOSED_TYPES:
                return lhs, rhs
        elif arithmetic_check:
            if isinstance(lhs, tl.tensor) and _becomes(rhs, lhs.dtype):
                return lhs, _constant(rhs, lhs.type)
            if isinstance(rhs, tl.tensor) and _becomes(lhs, rhs.dtype):
                return _constant(lhs, rhs.type), rhs
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    return checked


def _becomes(number: Any, dtype: Any) -> bool:
    """Whether an operation of the number and a tensor of the dtype is in that dtype, which can hold the number."""
    if dtype.name not in _CLOSED_TYPES or dtype.name == "int1":
        return False
    if dtype.is_floating():
        return type(number) is float or (type(number) is int and -(2**63) <= number < 2**64)
    return type(number) is int and dtype.get_int_min_value() <= number <= dtype.get_int_max_value()


def _constant(number: float, type: Any) -> Any:
    number = number or 0  # Triton has no constant -0.0
    data = _constant_data(number, getattr(type, "sizes", (1,)), interpreter._get_np_dtype(type))
    return tl.tensor(interpreter.TensorHandle(data, type.scalar), type)


@functools.lru_cache(maxsize=256)
def _constant_data(number: float, sizes: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    data = np.full(sizes, number, dtype)
    data.flags.writeable = False
    return data


def _by_sizes(broadcast: Any) -> Any:
    """TritonSemantic.broadcast_impl_value. Blocks of several ranks or of shapes that do not fit are left to it."""

    def broadcasted(self: Any, lhs: Any, rhs: Any) -> Any:
        lhs_sizes, rhs_sizes = _sizes(lhs), _sizes(rhs)
        if lhs_sizes == rhs_sizes:
            return lhs, rhs
        sizes = _common_sizes(lhs_sizes, rhs_sizes)
        if sizes is None:
            return broadcast(self, lhs, rhs)
        return _broadcast_to(self, lhs, lhs_sizes, sizes), _broadcast_to(self, rhs, rhs_sizes, sizes)

    return broadcasted


def _sizes(tensor: Any) -> tuple[int, ...]:
    return getattr(tensor.type, "sizes", ())


@functools.cache
def _common_sizes(lhs: tuple[int, ...], rhs: tuple[int, ...]) -> tuple[int, ...] | None:
    if not lhs or not rhs:
        return lhs or rhs
    if len(lhs) != len(rhs) or any(1 != left != right != 1 for left, right in zip(lhs, rhs, strict=True)):
        return None
    return tuple(max(pair) for pair in zip(lhs, rhs, strict=True))


def _broadcast_to(self: Any, tensor: Any, sizes: tuple[int, ...], common: tuple[int, ...]) -> Any:
    if sizes == common:
        return tensor
    type = tl.block_type(tensor.dtype, [*common])
    if sizes:
        return self.tensor(self.builder.create_broadcast(tensor.handle, common), type)
    return self.tensor(self.builder.create_splat(type, tensor.handle), type)


def _by_an_index(expand_dims: Any) -> Any:
    def expanded(self: Any, arg: Any, axis: int) -> Any:
        return interpreter.TensorHandle(arg.data[_new_axis(axis)], arg.dtype.scalar)

    return expanded


@functools.cache
def _new_axis(axis: int) -> tuple[Any, ...]:
    return (*[slice(None)] * axis, None)


def _unless_of_this_type(cast: Any) -> Any:
    def converted(self: Any, input: Any, dst_ty: Any, *arguments: Any, **options: Any) -> Any:
        return input if input.dtype is dst_ty.scalar else cast(self, input, dst_ty, *arguments, **options)

    return converted


def _itself(to_ir: Any) -> Any:
    """block_type.to_ir, which for the interpreter makes an equal type."""

    def type_for(self: Any, builder: Any) -> Any:
        return self if self.element_ty.to_ir(builder) is self.element_ty else to_ir(self, builder)

    return type_for


def _check_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """Raises AssertionError if add, sub or mul of integers (lhs, rhs) overflows; those of 64 bits are not checked."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    result = compute(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    least, most = (result.item(),) * 2 if result.size == 1 else (result.min(), result.max())
    assert least >= dtype.get_int_min_value() and most <= dtype.get_int_max_value(), (
        f"int{dtype.int_bitwidth} overflow detected for operation {operation.__name__}"
    )


def _shifted(convert: Any) -> Any:
    """The interpreter's conversions between bf16 and fp32, which shift all but subnormal numbers."""

    def converted(input: np.ndarray, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> np.ndarray:
        dtypes = input_dtype.name, output_dtype.name, input.itemsize
        if dtypes == ("bf16", "fp32", 2):
            bits = input.view(np.uint16)
            if not (((bits & 0x7F80) == 0) & ((bits & 0x7F) != 0)).any():
                return bits.astype(np.uint32) << 16
        elif dtypes == ("fp32", "bf16", 4) and rounding_mode is None:
            bits = input.view(np.uint32)
            if not (((bits & 0x7F800000) == 0) & ((bits & 0x7FFFFF) != 0)).any():
                return (bits >> 16).astype(np.uint16)
        return convert(input, input_dtype, output_dtype, rounding_mode)

    return converted


def _replace(owner: Any, name: str, by: Callable[[Any], Any]) -> None:
    """owner.name = by(owner.name); no change where this version of Triton lacks it."""
    if hasattr(owner, name):
        setattr(owner, name, by(getattr(owner, name)))


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
    _replace(interpreter, "_convert_float", _shifted)
    _replace(tl.block_type, "__init__", _once_per_block_type)
    _replace(tl.core, "_unwrap_if_constexpr", _at_once)
    _replace(tl.tensor, "__init__", _once_per_type)
    _replace(tl.dtype, "__eq__", _is_the_same_or)
    _replace(semantic.TritonSemantic, "binary_op_type_checking_impl", _unless_of_one_type)
    _replace(semantic.TritonSemantic, "broadcast_impl_value", _by_sizes)
    _replace(semantic.TritonSemantic, "cast", _unless_of_this_type)
    _replace(interpreter.InterpreterBuilder, "create_expand_dims", _by_an_index)
    _replace(tl.block_type, "to_ir", _itself)
    _replace(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", lambda _: _check_overflow)
