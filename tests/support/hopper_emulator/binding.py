"""Replaces Gluon's functions by the emulator's in a kernel's own Python functions.

A @gluon.jit function runs as a copy of its code with other globals: wherever the kernel names a function of Gluon,
directly or through a module, it finds the emulator's. Layouts, dtypes and @gluon.constexpr_function are plain Python
and stay. Calling a function without a stand-in is an error.
"""

import inspect
import types
from typing import Any

from hopper_emulator import barriers, copies, language, matrix, memory, tensor_core, tensor_memory
from hopper_emulator.faults import UnsupportedByEmulator as Unsupported
from hopper_emulator.values import unwrap
from triton import language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import blackwell, hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.runtime.jit import ConstexprFunction, JITFunction


def _named(*functions: Any) -> dict[str, Any]:
    return {function.__name__: function for function in functions}


_STAND_INS: dict[types.ModuleType, dict[str, Any]] = {
    gl: language.FUNCTIONS,
    tl: language.FUNCTIONS,  # in functions of portable kernels that Gluon compiles as well
    hopper: _named(
        memory.fence_async_shared, matrix.warpgroup_mma, matrix.warpgroup_mma_wait, matrix.warpgroup_mma_init
    ),
    blackwell: _named(tensor_memory.allocate_tensor_memory, tensor_core.tcgen05_commit, tensor_core.tcgen05_mma),
    mbarrier: _named(
        barriers.allocate_mbarrier, barriers.arrive, barriers.expect, barriers.init, barriers.invalidate, barriers.wait
    ),
    tma: {
        "async_load": copies.async_copy_global_to_shared,  # since Triton 3.8
        "async_store": copies.async_copy_shared_to_global,
        **_named(
            copies.async_copy_global_to_shared,
            copies.async_copy_shared_to_global,
            copies.store_wait,
            copies.make_tensor_descriptor,
        ),
    },
}
_BY_IDENTITY = {
    id(getattr(module, name)): stand_in
    for module, functions in _STAND_INS.items()
    for name, stand_in in functions.items()
    if hasattr(module, name)
}
_bound: dict[Any, Any] = {}


class _Module:
    """A module of Triton or Gluon as a kernel sees it."""

    def __init__(self, module: types.ModuleType):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        own = _STAND_INS.get(self._module, {})
        return own[name] if name in own else stand_in(getattr(self._module, name), f"{self._module.__name__}.{name}")


def stand_in(thing: Any, name: str) -> Any:
    """The value that a kernel finds under a name."""
    if id(thing) in _BY_IDENTITY:
        return _BY_IDENTITY[id(thing)]
    if isinstance(thing, types.ModuleType):
        return _Module(thing) if thing.__name__.startswith("triton") else thing
    if isinstance(thing, JITFunction):
        return bind(thing)
    if getattr(thing, "__triton_aggregate__", False):
        return _aggregate(thing)
    if inspect.isfunction(thing) and getattr(thing, "__triton_builtin__", False):

        def unsupported(*arguments: Any, **options: Any) -> Any:
            raise Unsupported(f"{name} is not modelled")

        return unsupported
    return unwrap(thing)


def bind(kernel: Any) -> Any:
    """The Python function under a @gluon.jit function, with stand-ins for its globals."""
    raw = getattr(kernel, "fn", kernel)
    if raw in _bound:
        return _bound[raw]
    names = dict(raw.__globals__)
    defaults = tuple(unwrap(default) for default in raw.__defaults__ or ())
    bound = types.FunctionType(raw.__code__, names, raw.__name__, defaults, raw.__closure__)
    bound.__kwdefaults__ = {name: unwrap(default) for name, default in (raw.__kwdefaults__ or {}).items()}
    _bound[raw] = bound  # before its names are resolved: it may name itself
    for name in _names(raw.__code__):
        if name in names:
            names[name] = stand_in(names[name], name)
    names["range"] = language.emulated_range
    return bound


def _names(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*(_names(each) for each in inner))


def _aggregate(real: Any) -> Any:
    """A @gluon.aggregate as a plain class: the same constructor and methods, no types of fields."""
    if real not in _bound:
        _bound[real] = cls = type(real.__name__, (), {})
        for name, member in vars(real).items():
            if isinstance(member, JITFunction | ConstexprFunction):
                setattr(cls, name, bind(member))
        cls.__init__ = bind(real.hash_attrs[0])  # type: ignore[misc]
    return _bound[real]
