"""Asynchronous matrix products of a warpgroup, which read shared memory as late as allowed.

An issued product reads its operands at the wait that completes it, so that a stage that is released too early is found
in use. Its result cannot be used before that wait.
"""

from typing import Any

import torch
from hopper_emulator.block import current
from hopper_emulator.faults import ILLEGAL
from hopper_emulator.faults import UnsupportedByEmulator as Unsupported
from hopper_emulator.memory import View
from hopper_emulator.values import Value, wrap

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_OPERANDS = (torch.float16, torch.bfloat16, *_FP8)


class Accumulator:
    """The result of an asynchronous product before its wait."""

    not_awaited = True

    def __init__(self, shape: list[int], layout: Any):
        self._shape, self._layout = shape, layout
        self._value: Value | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        current().fault(ILLEGAL, f"an accumulator is used (.{name}) before its warpgroup_mma_wait")

    def _refuse(self, *operands: Any) -> Any:
        current().fault(ILLEGAL, "an accumulator is used before its warpgroup_mma_wait")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __getitem__ = __neg__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse


class _Product:
    def __init__(self, a: Any, b: View, start: Any, use_start: bool, result: Accumulator):
        self.a, self.b, self.start, self.use_start, self.result = a, b, start, use_start, result
        me = current().partition
        self.uses = []
        for operand in (a, b):
            if isinstance(operand, View):
                operand.check_read(me, "lets wgmma read", asynchronously=True)
        for operand in (a, b):
            if isinstance(operand, View):
                self.uses.append((operand, operand.begin_use(f"a wgmma of {me.name}")))

    def finish(self) -> None:
        left = self.a.window if isinstance(self.a, View) else self.a.data
        product = left.float() @ self.b.window.float()
        if self.use_start:
            start = self.start._value if isinstance(self.start, Accumulator) else self.start
            product = product + start.data
        self.result._value = Value(product, self.result._layout)
        for operand, use in self.uses:
            operand.end_use(use, current().partition)


def warpgroup_mma(
    a: Any,
    b: View,
    acc: Any,
    *,
    use_acc: Any = True,
    precision: Any = None,
    max_num_imprecise_acc: Any = None,
    is_async: bool = False,
) -> Any:
    block = current()
    block.pause()
    if not isinstance(b, View) or not isinstance(a, View | Value):
        block.fault(ILLEGAL, "warpgroup_mma takes b from shared memory, and a from there or from registers")
    shape, layout = (acc._shape, acc._layout) if isinstance(acc, Accumulator) else (acc.shape, acc.layout)
    (m, k), (k_of_b, n) = a.shape, b.shape
    depth = 32 if b.window.dtype in _FP8 else 16  # of an instruction: 32 bytes
    if k != k_of_b or shape != [m, n] or m % 64 or n % 8 or k % depth:
        block.fault(ILLEGAL, f"a product of {a.shape} and {b.shape} into {shape}")
    operand_dtypes = {operand.window.dtype if isinstance(operand, View) else operand.data.dtype for operand in (a, b)}
    if len(operand_dtypes) > 1:
        block.fault(ILLEGAL, f"a product of {a.dtype} and {b.dtype}")
    if not operand_dtypes <= set(_OPERANDS):
        raise Unsupported(f"warpgroup_mma of {a.dtype}")
    if b.window.dtype in _FP8:
        _check_fp8(a, b, layout)
    result = Accumulator(shape, layout)
    block.partition.matrix_queue.append(_Product(a, b, acc, bool(wrap(use_acc)), result))
    return result if is_async else warpgroup_mma_wait(0, (result,))


def _check_fp8(a: Any, b: View, layout: Any) -> None:
    """Faults unless both operands in shared memory lie along the depth, and the accumulator is for 32 bytes of it."""
    if b.window.stride(0) != 1 or (isinstance(a, View) and a.window.stride(1) != 1):
        current().fault(ILLEGAL, f"a product of {a.dtype} whose operands do not lie along the depth in shared memory")
    if layout is not None and layout.instr_shape[2] != 32:
        current().fault(ILLEGAL, f"a product of {a.dtype} in instructions of depth {layout.instr_shape[2]}")


def warpgroup_mma_wait(num_outstanding: Any = 0, deps: Any = None) -> Any:
    block = current()
    if deps is None:
        block.fault(ILLEGAL, "warpgroup_mma_wait without deps")
    block.pause()
    queue = block.partition.matrix_queue
    while len(queue) > int(num_outstanding):
        queue.pop(0).finish()
    done = tuple(d._value if isinstance(d, Accumulator) and d._value is not None else d for d in deps)
    return done[0] if len(done) == 1 else done


def warpgroup_mma_init(value: Value) -> Value:
    return value
