"""Tensors, scalars and pointers of a kernel: torch tensors under Triton's rules for types and integers.

bf16 and fp16 are torch's: rounded to nearest even, and computed in their own type as in Triton. What is rounded to fp8
saturates. Integers wrap at their width; division and remainder truncate. Layouts are carried along, and dropped where
only the compiler knows them; the compiler checks that the layouts of operands agree.
"""

from types import SimpleNamespace
from typing import Any

import torch
from hopper_emulator.block import current
from hopper_emulator.faults import ILLEGAL, OUT_OF_BOUNDS
from hopper_emulator.faults import UnsupportedByEmulator as Unsupported
from torch import Tensor
from triton.experimental.gluon import language as gl

_TORCH = {
    gl.int1: torch.bool,
    gl.int8: torch.int8,
    gl.int16: torch.int16,
    gl.int32: torch.int32,
    gl.int64: torch.int64,
    gl.float16: torch.float16,
    gl.bfloat16: torch.bfloat16,
    gl.float32: torch.float32,
    gl.float64: torch.float64,
    gl.float8e4nv: torch.float8_e4m3fn,
    gl.float8e5: torch.float8_e5m2,
}
_GLUON = {torch_type: gluon_type for gluon_type, torch_type in _TORCH.items()}
_WIDTH = {torch.bool: 1, torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}


def torch_dtype(dtype: Any) -> torch.dtype:
    if dtype not in _TORCH:
        raise Unsupported(f"dtype {dtype}")
    return _TORCH[dtype]


def gluon_dtype(dtype: torch.dtype) -> Any:
    if dtype not in _GLUON:
        raise Unsupported(f"dtype {dtype}")
    return _GLUON[dtype]


def unwrap(x: Any) -> Any:
    """A constexpr's value."""
    return x.value if isinstance(x, gl.constexpr) else x


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The common dtype of two tensors: the wider float, else the wider integer; fp32 for fp16 with bf16."""
    if a == b:
        return a
    if a.is_floating_point and b.is_floating_point:
        return torch.promote_types(a, b)
    if a.is_floating_point or b.is_floating_point:
        return a if a.is_floating_point else b
    return a if _WIDTH[a] >= _WIDTH[b] else b


def scalar_dtype(number: Any, beside: torch.dtype) -> torch.dtype:
    """The dtype of a Python number beside a tensor: the tensor's if that can hold its kind."""
    if isinstance(number, bool) or beside.is_floating_point:
        return beside
    if isinstance(number, int):
        return _integer_dtype(number) if beside == torch.bool else beside
    return torch.float32


def _integer_dtype(number: int) -> torch.dtype:
    if -(2**31) <= number < 2**31:
        return torch.int32
    if -(2**63) <= number < 2**63:
        return torch.int64
    raise Unsupported(f"the integer {number}")


def wrap(x: Any) -> "Value":
    """A number as a scalar of the type that Triton gives it; a Value unchanged."""
    x = unwrap(x)
    if isinstance(x, Value):
        return x
    if isinstance(x, bool):
        return Value(torch.tensor(x))
    if isinstance(x, int):
        return Value(torch.tensor(x, dtype=_integer_dtype(x)))
    if isinstance(x, float):
        return Value(torch.tensor(x, dtype=torch.float32))
    if getattr(x, "not_awaited", False):
        current().fault(ILLEGAL, "an accumulator is used before its warpgroup_mma_wait")
    raise Unsupported(f"a value of type {type(x).__name__}")


def together(a: Any, b: Any) -> tuple[Tensor, Tensor, Any]:
    """Two operands in their common type, and the layout of the result."""
    a, b = unwrap(a), unwrap(b)
    if isinstance(a, Value) and not isinstance(b, Value) and isinstance(b, bool | int | float):
        dtype = scalar_dtype(b, a.data.dtype)
        dtype = common_dtype(a.data.dtype, dtype)
        return a.data.to(dtype), torch.tensor(b, dtype=dtype), a.layout
    if isinstance(b, Value) and not isinstance(a, Value) and isinstance(a, bool | int | float):
        right, left, layout = together(b, a)
        return left, right, layout
    a, b = wrap(a), wrap(b)
    dtype = common_dtype(a.data.dtype, b.data.dtype)
    return a.data.to(dtype), b.data.to(dtype), (a if a.data.dim() >= b.data.dim() else b).layout


def _converted(data: Tensor, dtype: torch.dtype) -> Tensor:
    """To fp8 it saturates, as cvt.rn.satfinite does; torch gives NaN or infinity. NaN stays NaN."""
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        largest = torch.finfo(dtype).max
        data = data.clamp(-largest, largest)
    return data.to(dtype)


class Value:
    """A tensor, or a scalar, in registers."""

    def __init__(self, data: Tensor, layout: Any = None):
        self.data, self.layout = data, layout

    @property
    def dtype(self) -> Any:
        return gluon_dtype(self.data.dtype)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def numel(self) -> int:
        return self.data.numel()

    @property
    def type(self) -> Any:
        scalar = self.dtype
        return SimpleNamespace(element_ty=scalar, scalar=scalar, shape=self.shape, layout=self.layout)

    @property
    def T(self) -> "Value":
        return Value(self.data.T)

    def __repr__(self) -> str:
        return f"Value({self.data}, {self.layout})"

    def to(self, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> "Value":
        if fp_downcast_rounding not in (None, "rtne"):
            raise Unsupported(f"rounding {fp_downcast_rounding}")
        if bitcast:
            return Value(self.data.contiguous().view(torch_dtype(dtype)), self.layout)
        return Value(_converted(self.data, torch_dtype(dtype)), self.layout)

    cast = to

    def __getitem__(self, key: Any) -> "Value":
        key = key if isinstance(key, tuple) else (key,)
        if any(part is not None and part != slice(None) for part in key):
            current().fault(ILLEGAL, f"indexing by {key}: only None and : are allowed")
        layout = self.layout
        for axis, part in enumerate(key):
            if part is None:  # a row's layout is a slice of the layout of its matrix
                layout = layout.parent if getattr(layout, "dim", None) == axis else None
        return Value(self.data[key], layout)

    def reshape(self, *shape: Any) -> "Value":
        return Value(self.data.reshape(*shape))

    def permute(self, *order: Any) -> "Value":
        return Value(self.data.permute(*order))

    trans = permute

    def expand_dims(self, axis: int) -> "Value":
        return Value(self.data.unsqueeze(axis))

    def broadcast_to(self, *shape: Any) -> "Value":
        return Value(self.data.broadcast_to(*shape), self.layout)

    def __bool__(self) -> bool:
        if self.data.dim():
            current().fault(ILLEGAL, "a condition on a whole tensor")
        return bool(self.data)

    def __index__(self) -> int:
        if self.data.dim() or self.data.is_floating_point():
            current().fault(ILLEGAL, f"{self.dtype} of shape {self.shape} where an integer is needed")
        return int(self.data)

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.data)

    def __neg__(self) -> "Value":
        return Value(-self.data, self.layout)

    def __invert__(self) -> "Value":
        return Value(~self.data, self.layout)

    def __floordiv__(self, other: Any) -> "Value":
        return _divide(self, other)

    def __rfloordiv__(self, other: Any) -> "Value":
        return _divide(other, self)

    def __truediv__(self, other: Any) -> "Value":
        return _true_divide(self, other)

    def __rtruediv__(self, other: Any) -> "Value":
        return _true_divide(other, self)

    __hash__ = None  # type: ignore[assignment]


def _divide(a: Any, b: Any) -> Value:
    left, right, layout = together(a, b)
    if left.is_floating_point():
        raise Unsupported("// of floating-point numbers")
    return Value(torch.div(left, right, rounding_mode="trunc"), layout)


def _true_divide(a: Any, b: Any) -> Value:
    left, right, layout = together(a, b)
    if not left.is_floating_point():
        left, right = left.float(), right.float()
    return Value(left / right, layout)


def _operator(name: str, function: Any) -> None:
    def forward(self: Value, other: Any) -> Value:
        if isinstance(other, Pointer):
            return NotImplemented
        a, b, layout = together(self, other)
        return Value(function(a, b), layout)

    def reflected(self: Value, other: Any) -> Value:
        a, b, layout = together(other, self)
        return Value(function(a, b), layout)

    setattr(Value, f"__{name}__", forward)
    if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Value, f"__r{name}__", reflected)


for _name, _function in {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "mod": torch.fmod,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "lshift": torch.bitwise_left_shift,
    "rshift": torch.bitwise_right_shift,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
}.items():
    _operator(_name, _function)


class Pointer:
    """Into a tensor's storage, by elements: a scalar, or a tensor of pointers."""

    def __init__(self, storage: Tensor, offset: Value):
        self.storage, self.offset = storage, offset

    @classmethod
    def to_tensor(cls, tensor: Tensor) -> "Pointer":
        """The pointer that a kernel gets for a tensor, which may access the whole storage of the tensor."""
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = tensor.detach().as_strided((length,), (1,), 0)
        return cls(flat, Value(torch.tensor(tensor.storage_offset(), dtype=torch.int64)))

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=gluon_dtype(self.storage.dtype))

    @property
    def type(self) -> Any:
        return SimpleNamespace(element_ty=gluon_dtype(self.storage.dtype), scalar=self.dtype)

    @property
    def shape(self) -> list[int]:
        return self.offset.shape

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.storage, self.offset + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Pointer":
        return Pointer(self.storage, self.offset - other)

    def __getitem__(self, key: Any) -> "Pointer":
        return Pointer(self.storage, self.offset[key])

    def _places(self, mask: Any, verb: str) -> tuple[Tensor, Tensor]:
        places = self.offset.data
        allowed = torch.ones_like(places, dtype=torch.bool) if mask is None else wrap(mask).data
        places, allowed = torch.broadcast_tensors(places, allowed)
        touched = places[allowed]
        if touched.numel() and not 0 <= int(touched.min()) <= int(touched.max()) < self.storage.numel():
            low, high = int(touched.min()), int(touched.max())
            reach = f"{verb} elements {low}..{high} of a tensor with {self.storage.numel()} in its storage"
            current().fault(OUT_OF_BOUNDS, reach)
        return places, allowed

    def load(self, mask: Any, other: Any) -> Value:
        places, allowed = self._places(mask, "loads")
        if (latest := current().global_writes.of(self.storage)) is not None:
            current().global_writes.check(latest[places[allowed]], "loads")
        loaded = self.storage[torch.where(allowed, places, 0)]
        if mask is not None:
            filler = wrap(other).data if other is not None else torch.tensor(float("nan"))
            loaded = torch.where(
                allowed, loaded, filler.to(loaded.dtype)
            )  # without `other`, masked elements are undefined
        return Value(loaded, self.offset.layout)

    def store(self, value: Any, mask: Any) -> None:
        places, allowed = self._places(mask, "stores to")
        stored = _converted(wrap(value).data, self.storage.dtype).broadcast_to(places.shape)
        writes, written = current().global_writes, places[allowed]
        latest = writes.of_written(self.storage)
        writes.check(latest[written], "stores to")
        latest[written] = writes.begin()
        self.storage[written] = stored[allowed]
