"""What `gl` offers inside a kernel: creation, arithmetic, reductions, global memory, specialisation.

Each function stands in for the one of the same name in triton.experimental.gluon.language; binding.py puts them there.
"""

import functools
import linecache
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from hopper_emulator import barriers
from hopper_emulator.block import current, learn
from hopper_emulator.faults import ERROR, ILLEGAL, IN_FLIGHT
from hopper_emulator.faults import UnsupportedByEmulator as Unsupported
from hopper_emulator.memory import Allocation, View
from hopper_emulator.scheduler import Partition
from hopper_emulator.values import Pointer, Value, common_dtype, together, torch_dtype, unwrap, wrap
from triton.experimental.gluon.language import SliceLayout
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as real_mbarrier

# Creation and shape


def arange(start: Any, end: Any, layout: Any = None) -> Value:
    return Value(torch.arange(int(unwrap(start)), int(unwrap(end)), dtype=torch.int32), layout)


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Value:
    number = wrap(value).data
    return Value(number.to(torch_dtype(dtype)).expand(tuple(int(n) for n in shape)).clone(), layout)


def zeros(shape: Any, dtype: Any, layout: Any = None) -> Value:
    return full(shape, 0, dtype, layout)


def full_like(input: Value, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None) -> Value:
    return full(shape or input.shape, value, dtype or input.dtype, layout or input.layout)


def zeros_like(input: Value, shape: Any = None, dtype: Any = None, layout: Any = None) -> Value:
    return full_like(input, 0, shape, dtype, layout)


def convert_layout(value: Value, layout: Any, assert_trivial: bool = False) -> Value:
    return Value(value.data, layout)


def expand_dims(value: Value, axis: int) -> Value:
    return value.expand_dims(axis)


def reshape(value: Value, *shape: Any) -> Value:
    return value.reshape(*shape)


def permute(value: Value, *order: Any) -> Value:
    return value.permute(*order)


def join(a: Any, b: Any) -> Value:
    left, right, _ = together(a, b)
    return Value(torch.stack(torch.broadcast_tensors(left, right), -1))


def split(value: Value) -> tuple[Value, Value]:
    return Value(value.data[..., 0]), Value(value.data[..., 1])


def ravel(value: Value) -> Value:
    return Value(value.data.reshape(-1))


def cast(value: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Value:
    return wrap(value).to(dtype, fp_downcast_rounding, bitcast)


def to_tensor(value: Any) -> Value:
    return wrap(value)


def hint(value: Any, *facts: Any) -> Any:
    """assume, max_contiguous: no effect."""
    return value


def multiple_of(value: Any, divisor: Any) -> Any:
    data = value.offset.data if isinstance(value, Pointer) else wrap(value).data
    divisor = unwrap(divisor)
    if isinstance(divisor, int) and (data % divisor).any():
        current().fault(ILLEGAL, f"multiple_of({divisor}) is not true of {data}")
    return value


# Arithmetic


def _elementwise(function: Callable[..., torch.Tensor]) -> Callable[..., Value]:
    def apply(x: Any) -> Value:
        x = wrap(x)
        return Value(function(x.data), x.layout)

    return apply


def _two(function: Callable[..., torch.Tensor]) -> Callable[..., Value]:
    def apply(x: Any, y: Any, **options: Any) -> Value:
        if options:
            raise Unsupported(f"options of an operation on two tensors: {options}")
        a, b, layout = together(x, y)
        return Value(function(a, b), layout)

    return apply


def _larger(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.fmax(a, b) if a.is_floating_point() else torch.maximum(a, b)


def _smaller(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.fmin(a, b) if a.is_floating_point() else torch.minimum(a, b)


def where(condition: Any, x: Any, y: Any) -> Value:
    chosen = wrap(condition)
    a, b, layout = together(x, y)
    return Value(torch.where(chosen.data, a, b), layout or chosen.layout)


def fma(x: Any, y: Any, z: Any) -> Value:
    """A multiply-add with a single rounding, computed in fp64."""
    a, b, c = wrap(x), wrap(y), wrap(z)
    dtype = common_dtype(common_dtype(a.data.dtype, b.data.dtype), c.data.dtype)
    return Value((a.data.double() * b.data.double() + c.data.double()).to(dtype), a.layout or b.layout or c.layout)


def cdiv(x: Any, y: Any) -> Any:
    return (x + y - 1) // y


# The inline PTX that kernels use, as torch functions of the operands.
_INLINE: dict[str, Callable[..., torch.Tensor]] = {
    "ex2.approx.ftz.f32": torch.exp2,
    "ex2.approx.f32": torch.exp2,
    "lg2.approx.f32": torch.log2,
    "rcp.approx.ftz.f32": torch.reciprocal,
    "rcp.approx.f32": torch.reciprocal,
    "rsqrt.approx.f32": torch.rsqrt,
    "tanh.approx.f32": torch.tanh,
    "add.f32": torch.add,
    "mul.f32": torch.mul,
    "mov.b32": torch.clone,
}


def inline_asm_elementwise(asm: str, constraints: str, args: Any, dtype: Any, is_pure: bool, pack: int) -> Value:
    """One instruction of the table above: "ex2.approx.ftz.f32 $0, $1;"."""
    instruction = re.fullmatch(r"\s*([\w.]+)\s+\$0((?:,\s*\$\d+)+)\s*;?\s*", str(unwrap(asm)))
    if not instruction or instruction[1] not in _INLINE or unwrap(pack) != 1:
        raise Unsupported(f"the inline assembly {unwrap(asm)!r}; language.py has a table of supported instructions")
    operands = [wrap(arg) for arg in args]
    result = _INLINE[instruction[1]](*(operand.data for operand in operands))
    return Value(result.to(torch_dtype(dtype)), operands[0].layout)


# Reductions


def _reduced_layout(value: Value, axis: int | None) -> Any:
    return None if axis is None or value.layout is None else SliceLayout(axis, value.layout)


def _reduction(function: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[..., Value]:
    def apply(input: Value, axis: Any = None, keep_dims: bool = False, **options: Any) -> Value:
        if any(options.values()):
            raise Unsupported(f"options of a reduction: {options}")
        axis = unwrap(axis)
        if axis is None:
            return Value(function(input.data.reshape(-1), 0))
        axis = int(axis) % input.data.dim()
        reduced = Value(function(input.data, axis), _reduced_layout(input, axis))
        return reduced.expand_dims(axis) if keep_dims else reduced

    return apply


def _largest(x: torch.Tensor, axis: int) -> torch.Tensor:
    if not x.is_floating_point():
        return x.amax(axis)
    numbers = x.masked_fill(x.isnan(), float("-inf")).amax(axis)  # NaN only where all are NaN
    return numbers.masked_fill(x.isnan().all(axis), float("nan"))


def _sum(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.sum(axis, dtype=torch.int32 if x.dtype in (torch.bool, torch.int8, torch.int16) else x.dtype)


def reduce(input: Any, axis: Any, combine_fn: Callable[..., Any], keep_dims: bool = False) -> Any:
    """Reduces halves pairwise: no kernel may rely on an order that hardware does not guarantee."""
    several = isinstance(input, tuple)
    parts = [part.data for part in (input if several else (input,))]
    layout = _reduced_layout(input[0] if several else input, unwrap(axis))
    parts = [part.reshape(-1) if axis is None else part.movedim(int(unwrap(axis)), 0) for part in parts]
    while len(parts[0]) > 1:
        half = (len(parts[0]) + 1) // 2
        left, right = [p[: len(p) - half] for p in parts], [p[half:] for p in parts]
        combined = combine_fn(*(Value(p) for p in (*left, *right)))
        combined = combined if isinstance(combined, tuple) else (combined,)
        parts = [torch.cat([c.data, p[len(p) - half : half]]) for c, p in zip(combined, parts, strict=True)]
    results = tuple(Value(part[0], layout) for part in parts)
    if keep_dims:
        results = tuple(result.expand_dims(int(unwrap(axis))) for result in results)
    return results if several else results[0]


# Global memory


def load(pointer: Pointer, mask: Any = None, other: Any = None, **caching: Any) -> Value:
    return pointer.load(mask, other)


def store(pointer: Pointer, value: Any, mask: Any = None, **caching: Any) -> None:
    pointer.store(value, mask)


# The program and its partitions


def program_id(axis: Any) -> Value:
    return Value(torch.tensor(current().program[int(unwrap(axis))], dtype=torch.int32))


def num_programs(axis: Any) -> Value:
    return Value(torch.tensor(current().grid[int(unwrap(axis))], dtype=torch.int32))


def num_warps() -> int:
    return current().partition.warps


def num_ctas() -> int:
    return 1


def thread_barrier(*, cluster: bool = False) -> None:
    """No effect: a partition is a single thread here."""
    if cluster:
        raise Unsupported("clusters")
    current().pause()


def static_assert(condition: Any, message: str = "") -> None:
    if not unwrap(condition):
        current().fault(ERROR, f"static_assert: {message}")


def static_print(*values: Any, **options: Any) -> None:
    """No effect."""


def device_assert(condition: Any, message: str = "", mask: Any = None) -> None:
    held = wrap(condition).data
    if mask is not None:
        held = held | ~wrap(mask).data
    if not held.all():
        current().fault(ERROR, f"device_assert: {unwrap(message)}")


def emulated_range(*bounds: Any, **options: Any) -> Any:
    """`range` inside a kernel: its variable is an int32 tensor, or int64 if a bound is."""
    ends = [wrap(bound) for bound in bounds]
    dtype = functools.reduce(common_dtype, (end.data.dtype for end in ends))
    return (Value(torch.tensor(i, dtype=dtype)) for i in range(*(int(end) for end in ends)))


def static_range(*bounds: Any) -> range:
    return range(*(int(unwrap(bound)) for bound in bounds))


def allocate_shared_memory(element_ty: Any, shape: Any, layout: Any, value: Value | None = None) -> Any:
    block = current()
    shape = [int(unwrap(n)) for n in shape]
    layout = unwrap(layout)
    name = assigned_name(sys._getframe(1))
    if isinstance(layout, real_mbarrier.MBarrierLayout):
        return barriers.allocate(block, shape[0], name)
    allocation = Allocation(block, element_ty, shape, name)
    view = View(block, allocation, allocation.data.view(shape), element_ty, layout, allocation.name)
    if value is not None:
        view.store(value)
    return view


def assigned_name(frame: Any) -> str:
    """A name for messages: the variable that the line assigns, or, if a function of the kernel allocates for its
    callers, the caller's: q_full, not full, for `q_full, q_empty = make_barriers(...)`; otherwise q_tiles.main."""
    name = ", ".join(_targets(_line(frame)))
    caller = frame.f_back
    if caller is None or caller.f_globals.get("range") is not emulated_range:
        return name
    targets = _targets(_line(caller))
    alike = [target for target in targets if name in target] or targets
    outer = alike[0] if len(alike) == 1 else _line(caller).rstrip(",")
    return outer if name in outer else f"{outer}.{name}"


def _line(frame: Any) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def _targets(line: str) -> list[str]:
    assignment = re.match(r"([\w.]+(?:\s*,\s*[\w.]+)*)(?:\s*:[^=]*)?\s*=[^=]", line)
    return re.split(r"\s*,\s*", assignment[1]) if assignment else []


def warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> Any:
    block = current()
    main = block.partition
    if main is not block.scheduler.main:
        block.fault(ILLEGAL, "warp_specialize inside a partition")
    workers = [int(unwrap(n)) for n in worker_num_warps]
    if len(functions_and_args) != 1 + len(workers):
        block.fault(ILLEGAL, f"{len(functions_and_args)} partitions, {len(workers)} numbers of warps for the workers")
    _check_registers(workers, worker_num_regs)
    names = [getattr(function, "__name__", "partition") for function, _ in functions_and_args]
    partitions = []
    for i, warps in enumerate([main.warps, *workers]):
        name = names[i] if names.count(names[i]) == 1 else f"{names[i]}[{names[:i].count(names[i])}]"
        partitions.append(Partition(name, warps, main.clock))
        block.enroll(partitions[-1])
    bodies = [
        (partition, functools.partial(_live, partition, function, args))
        for partition, (function, args) in zip(partitions, functions_and_args, strict=True)
    ]
    results = block.scheduler.run(bodies)
    for partition in partitions:
        learn(main.clock, partition.clock)
    return results[0]


def _live(partition: Partition, function: Callable[..., Any], args: Any) -> Any:
    result = function(*args)
    check_end(partition)
    return result


def check_end(partition: Partition) -> None:
    """Faults if a partition ends with operations in flight that only it can wait for."""
    if partition.matrix_queue:
        current().fault(IN_FLIGHT, f"{len(partition.matrix_queue)} wgmma without a warpgroup_mma_wait")
    if partition.store_queue:
        current().fault(IN_FLIGHT, f"{len(partition.store_queue)} TMA stores without a store_wait")


def _check_registers(workers: list[int], registers: Any) -> None:
    if registers is None:
        return
    registers = [int(unwrap(n)) for n in registers]
    if len(registers) != len(workers) or any(n % 8 or not 24 <= n <= 256 for n in registers):
        message = f"registers {registers} for workers of {workers} warps: multiples of 8 from 24 to 256, one for each"
        current().fault(ILLEGAL, message)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        allocate_shared_memory, arange, cast, cdiv, convert_layout, device_assert, expand_dims, full, full_like,
        fma, inline_asm_elementwise, join, load, multiple_of, num_ctas, num_programs, num_warps, permute, program_id,
        ravel, reduce, reshape, split, static_assert, static_print, static_range, store, thread_barrier, to_tensor,
        warp_specialize, where, zeros, zeros_like,
    )
}  # fmt: skip
FUNCTIONS |= {
    "barrier": thread_barrier,
    "assume": hint,
    "max_contiguous": hint,
    "max_constancy": hint,
    "maximum": _two(_larger),
    "minimum": _two(_smaller),
    "add": _two(torch.add),
    "sub": _two(torch.sub),
    "mul": _two(torch.mul),
    "fdiv": _two(torch.div),
    "div_rn": _two(torch.div),
    "max": _reduction(_largest),
    "min": _reduction(lambda x, axis: -_largest(-x, axis)),
    "sum": _reduction(_sum),
    "reduce_or": _reduction(lambda x, axis: x.bool().any(axis).to(x.dtype)),
    "erf": _elementwise(torch.erf),
    "sqrt_rn": _elementwise(torch.sqrt),
}
FUNCTIONS |= {
    name: _elementwise(getattr(torch, name))
    for name in ("abs", "ceil", "cos", "exp", "exp2", "floor", "log", "log2", "rsqrt", "sin", "sqrt")
}
