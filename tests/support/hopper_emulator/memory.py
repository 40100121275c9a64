"""Shared memory: allocations, views of them, and the checks of each access.

Besides its data, every element records who wrote it last and when, when each partition read it last, whether it was
written through the generic proxy without a fence since, and how many pending asynchronous operations will read it. Each
access is checked, element by element, against the knowledge of its partition (block.py).
"""

from types import SimpleNamespace
from typing import Any

import torch
from hopper_emulator import values
from hopper_emulator.barriers import Barrier
from hopper_emulator.block import Block, current
from hopper_emulator.faults import ILLEGAL, IN_USE, NOT_AWAITED, NOT_FENCED, OUT_OF_BOUNDS, UNWRITTEN, WRONG_PHASE
from hopper_emulator.faults import UnsupportedByEmulator as Unsupported
from hopper_emulator.scheduler import Partition
from hopper_emulator.values import Value
from torch import Tensor

_NOBODY = -1


class Allocation:
    def __init__(self, block: Block, dtype: Any, shape: list[int], name: str):
        self.name = name or f"shared memory {len(block.allocations)}"
        size = torch.Size(shape).numel()
        self.data = torch.zeros(size, dtype=values.torch_dtype(dtype))
        if self.data.is_floating_point():
            self.data.fill_(float("nan"))
        self.writer = torch.full((size,), _NOBODY, dtype=torch.int16)
        self.write_time = torch.zeros(size, dtype=torch.int32)
        self.read_time: dict[int, Tensor] = {}  # by partition
        self.unfenced = torch.zeros(size, dtype=torch.bool)
        self.pending_reads = torch.zeros(size, dtype=torch.int16)
        self.pending: list[tuple[View, str]] = []  # views and names of the operations, for messages
        block.allocations.append(self)


class View:
    """A shared_memory_descriptor."""

    def __init__(self, block: Block, allocation: Allocation, window: Tensor, dtype: Any, layout: Any, name: str):
        self.block, self.allocation, self.window = block, allocation, window
        self.dtype, self.layout, self.name = dtype, layout, name

    @property
    def shape(self) -> list[int]:
        return list(self.window.shape)

    @property
    def rank(self) -> int:
        return self.window.dim()

    @property
    def numel(self) -> int:
        return self.window.numel()

    @property
    def type(self) -> Any:
        return SimpleNamespace(element_ty=self.dtype, shape=self.shape, layout=self.layout)

    def _with(self, window: Tensor, name: str = "") -> "View":
        return type(self)(self.block, self.allocation, window, self.dtype, self.layout, name or self.name)

    def index(self, index: Any) -> "View":
        i = int(index)
        if not 0 <= i < self.window.shape[0]:
            self.block.fault(OUT_OF_BOUNDS, f"index {i} of {self.name} with shape {self.shape}")
        return self._with(self.window[i], f"{self.name}[{i}]")

    def slice(self, start: Any, length: int, dim: int = 0) -> "View":
        start = int(start)
        if not 0 <= start <= start + length <= self.window.shape[dim]:
            self.block.fault(OUT_OF_BOUNDS, f"slice {start}:{start + length} of {self.name} with shape {self.shape}")
        return self._with(self.window.narrow(dim, start, length), f"{self.name}[{start}:{start + length}]")

    def permute(self, order: Any) -> "View":
        return self._with(self.window.permute(tuple(order)))

    def reshape(self, shape: Any) -> "View":
        try:
            return self._with(self.window.view(tuple(shape)))
        except RuntimeError:
            self.block.fault(ILLEGAL, f"reshape of {self.name} from {self.shape} to {list(shape)} is no view")

    def _reinterpret(self, dtype: Any, shape: Any, layout: Any) -> "View":
        if dtype != self.dtype or not self.window.is_contiguous():
            raise Unsupported(f"{self.name}: _reinterpret to another dtype, or of a strided view")
        window = self.window.view(-1)[: torch.Size(shape).numel()].view(tuple(shape))
        return View(self.block, self.allocation, window, dtype, layout, self.name)

    def _keep_alive(self) -> None:
        """No effect: the emulator frees nothing."""

    def load(self, layout: Any = None) -> Value:
        self.block.pause()
        me = self.block.partition
        self.check_read(me, "loads")
        self.record_read(me)
        return Value(self.window.clone(), layout)

    def store(self, value: Value) -> None:
        if list(value.data.shape) != self.shape or value.dtype != self.dtype:
            got = f"a store of {list(value.data.shape)} {value.dtype} into {self.name}, {self.shape} {self.dtype}"
            self.block.fault(ILLEGAL, got)
        self.block.pause()
        me = self.block.partition
        self.check_write(me, "stores to")
        self.window.copy_(value.data)
        self.record_write(me.number, me.clock[me.number])
        self.of(self.allocation.unfenced).fill_(True)

    def of(self, shadow: Tensor) -> Tensor:
        """The view's elements of a tensor with the size of the allocation."""
        return shadow.as_strided(self.window.size(), self.window.stride(), self.window.storage_offset())

    # Checks of reads and writes

    def check_read(self, me: Partition, verb: str, asynchronously: bool = False) -> None:
        """Faults unless me may read now, or let the asynchronous proxy read from now on."""
        if (self.of(self.allocation.writer) == _NOBODY).any():
            message = f"{me.name} {verb} {self.name}, which was never written; {self._last_wait(me)}"
            self.block.fault(UNWRITTEN, message, self._last_barrier(me))
        self._check_writes_are_known(me, verb)
        if asynchronously and self.of(self.allocation.unfenced).any():
            message = f"{me.name} {verb} {self.name} after a store with no fence_async_shared() in between"
            self.block.fault(NOT_FENCED, message)

    def check_write(self, me: Partition, verb: str, asynchronously: bool = False) -> None:
        if self.of(self.allocation.pending_reads).any():
            users = ", ".join(sorted({user for view, user in self.allocation.pending if view.overlaps(self)}))
            message = f"{me.name} {verb} {self.name} while it is in use by {users}; {self._last_wait(me)}"
            self.block.fault(IN_USE, message, self._last_barrier(me))
        for number, times in self.allocation.read_time.items():
            if number != me.number and int(self.of(times).max()) > me.clock.get(number, 0):
                reader = self.block.agents[number].name
                message = f"{me.name} {verb} {self.name} before it could know that {reader} has read it"
                self.block.fault(IN_USE, f"{message}; {self._last_wait(me)}", self._last_barrier(me))
        self._check_writes_are_known(me, verb)
        if asynchronously and self.of(self.allocation.unfenced).any():
            message = f"{me.name} {verb} {self.name} over a store with no fence_async_shared() in between"
            self.block.fault(NOT_FENCED, message)

    def _check_writes_are_known(self, me: Partition, verb: str) -> None:
        writers, times = self.of(self.allocation.writer), self.of(self.allocation.write_time)
        if not self.numel:
            return
        lowest, highest = int(writers.min()), int(writers.max())
        numbers = [lowest] if lowest == highest else writers.unique().tolist()
        for number in numbers:
            if number in (_NOBODY, me.number):
                continue
            latest = int((times if len(numbers) == 1 else times[writers == number]).max())
            if latest <= me.clock.get(number, 0):
                continue
            agent = self.block.agents[number]
            if not isinstance(agent, Barrier):
                message = f"{me.name} {verb} {self.name} before it could know that {agent.name} has written it"
                self.block.fault(NOT_AWAITED, f"{message}; {self._last_wait(me)}", self._last_barrier(me))
            message = f"{me.name} {verb} {self.name}, which a TMA load fills in phase {latest - 1} of {agent.name}"
            seen = me.last_waits.get(agent)
            if seen is None:
                self.block.fault(NOT_AWAITED, f"{message}; it has not waited for that barrier", agent.name)
            message += f"; its last wait for that barrier saw {agent.explain(seen)}"
            self.block.fault(WRONG_PHASE, message, agent.name)

    def record_read(self, me: Partition) -> None:
        times = self.allocation.read_time.get(me.number)
        if times is None:
            times = self.allocation.read_time[me.number] = torch.zeros_like(self.allocation.write_time)
        self.of(times).fill_(me.clock[me.number])

    def record_write(self, agent: int, time: int) -> None:
        self.of(self.allocation.writer).fill_(agent)
        self.of(self.allocation.write_time).fill_(time)

    def begin_use(self, user: str) -> tuple["View", str]:
        """Registers an asynchronous operation that will read the view at some later time."""
        self.of(self.allocation.pending_reads).add_(1)
        use = (self, user)
        self.allocation.pending.append(use)
        return use

    def end_use(self, use: tuple["View", str], me: Partition) -> None:
        self.of(self.allocation.pending_reads).sub_(1)
        self.allocation.pending = [other for other in self.allocation.pending if other is not use]
        self.record_read(me)

    def overlaps(self, other: "View") -> bool:
        touched = torch.zeros_like(self.allocation.unfenced)
        self.of(touched).fill_(True)
        return bool(other.of(touched).any())

    @staticmethod
    def _last_barrier(me: Partition) -> str:
        return next(reversed(me.last_waits)).name if me.last_waits else ""

    @staticmethod
    def _last_wait(me: Partition) -> str:
        if not me.last_waits:
            return "it has not waited for any barrier"
        barrier, seen = next(reversed(me.last_waits.items()))
        return f"its last wait saw {barrier.explain(seen)}"


def fence_async_shared(cluster: bool = False) -> None:
    """Makes all writes that the partition has made or knows of visible to the asynchronous proxy."""
    block = current()
    block.pause()
    me = block.partition
    for barrier in block.barriers:
        barrier.fenced_for_copies = True
    for allocation in block.allocations:
        waiting = allocation.unfenced.nonzero().view(-1)
        for number in allocation.writer[waiting].unique().tolist():
            its = waiting[allocation.writer[waiting] == number]
            known = allocation.write_time[its] <= me.clock.get(number, 0)
            allocation.unfenced[its[known]] = False
