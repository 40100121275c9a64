"""Tensor memory of Blackwell: 128 lanes of 32-bit cells, which only tcgen05 and whole warpgroups reach.

It is shared memory's bookkeeping (memory.py) on cells instead of elements: a view is some columns of cells under a
dtype, so that views of different dtypes may share cells. An access of one is checked against those of the others, and
no cell is read under another dtype than the one it was written under.
"""

import sys
from typing import Any

import torch
from hopper_emulator import values
from hopper_emulator.block import current
from hopper_emulator.faults import ILLEGAL, OUT_OF_BOUNDS
from hopper_emulator.faults import UnsupportedByEmulator as Unsupported
from hopper_emulator.language import assigned_name
from hopper_emulator.memory import Allocation, View
from hopper_emulator.values import Value, unwrap, wrap

LANES = 128
_COLUMNS = 512
_CELL = 4  # bytes
_CODES = (torch.float32, torch.bfloat16, torch.float16)


class _Cells(Allocation):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.data.fill_(-1)  # NaN of every type
        self.dtypes = torch.full(self.data.shape, -1, dtype=torch.int8)  # of the latest writes, by _CODES


class TensorView(View):
    """A tensor_memory_descriptor. window: cells."""

    allocation: _Cells

    @property
    def shape(self) -> list[int]:
        return [*self.window.shape[:-1], self.window.shape[-1] * _CELL // self._bytes]

    @property
    def _bytes(self) -> int:
        return values.torch_dtype(self.dtype).itemsize

    @property
    def elements(self) -> torch.Tensor:
        return self.window.view(values.torch_dtype(self.dtype))

    def slice(self, start: Any, length: Any, dim: int = 0) -> "TensorView":
        start, length = int(unwrap(start)), int(unwrap(length))
        if not 0 <= start <= start + length <= self.shape[-1]:
            self.block.fault(OUT_OF_BOUNDS, f"slice {start}:{start + length} of {self.name} with shape {self.shape}")
        if start * self._bytes % _CELL or length * self._bytes % _CELL:
            self.block.fault(ILLEGAL, f"slice {start}:{start + length} of {self.name} splits a cell of 32 bits")
        cells = self.window.narrow(-1, start * self._bytes // _CELL, length * self._bytes // _CELL)
        return self._with(cells, f"{self.name}[:, {start}:{start + length}]")

    def permute(self, order: Any) -> Any:
        self.block.fault(ILLEGAL, f"permute of {self.name}, which is in tensor memory")

    def reshape(self, shape: Any) -> Any:
        self.block.fault(ILLEGAL, f"reshape of {self.name}, which is in tensor memory")

    def _reinterpret(self, dtype: Any, shape: Any, layout: Any) -> "TensorView":
        dtype, shape = unwrap(dtype), [int(unwrap(n)) for n in shape]
        view = TensorView(self.block, self.allocation, self.window, dtype, unwrap(layout), self.name)
        if view.shape != shape:
            self.block.fault(ILLEGAL, f"{self.name}, {self.shape} {self.dtype}, as {shape} {dtype}")
        return view

    def load(self, layout: Any = None) -> Value:
        self._require_warpgroup("loads")
        self.block.pause()
        me = self.block.partition
        self.check_read(me, "loads")
        self.record_read(me)
        return Value(self.elements.clone(), layout)

    def store(self, value: Value, pred: Any = True) -> None:
        if list(value.data.shape) != self.shape or value.dtype != self.dtype:
            got = f"a store of {list(value.data.shape)} {value.dtype} into {self.name}, {self.shape} {self.dtype}"
            self.block.fault(ILLEGAL, got)
        self._require_warpgroup("stores to")
        self.block.pause()
        if not wrap(pred):
            return
        me = self.block.partition
        self.check_write(me, "stores to")
        self.elements.copy_(value.data)
        self.record_write(me.number, me.clock[me.number])

    def check_read(self, me: Any, verb: str, asynchronously: bool = False) -> None:
        super().check_read(me, verb, asynchronously)
        if (self.of(self.allocation.dtypes) != _CODES.index(self.elements.dtype)).any():
            self.block.fault(
                ILLEGAL, f"{me.name} {verb} {self.name} as {self.dtype}, but it was written as another type"
            )

    def record_write(self, agent: int, time: int) -> None:
        super().record_write(agent, time)
        self.of(self.allocation.dtypes).fill_(_CODES.index(self.elements.dtype))

    def _require_warpgroup(self, verb: str) -> None:
        me = self.block.partition
        if me.warps % 4:
            self.block.fault(
                ILLEGAL, f"{me.name} {verb} {self.name} with {me.warps} warps; a quarter of the lanes each"
            )


def allocate_tensor_memory(element_ty: Any, shape: Any, layout: Any, value: Value | None = None) -> TensorView:
    block = current()
    dtype, shape = unwrap(element_ty), [int(unwrap(n)) for n in shape]
    if len(shape) not in (2, 3) or shape[-2] != LANES:
        raise Unsupported(f"tensor memory of shape {shape}")
    cells = [*shape[:-1], shape[-1] * values.torch_dtype(dtype).itemsize // _CELL]
    block.tensor_columns += cells[-1] * (cells[0] if len(cells) == 3 else 1)
    if block.tensor_columns > _COLUMNS:
        block.fault(ILLEGAL, f"{block.tensor_columns} columns of tensor memory of {_COLUMNS}")
    allocation = _Cells(block, values.gluon_dtype(torch.int32), cells, assigned_name(sys._getframe(1)))
    view = TensorView(block, allocation, allocation.data.view(cells), dtype, unwrap(layout), allocation.name)
    if value is not None:
        view.store(value)
    return view
