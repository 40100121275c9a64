"""tcgen05: products that one thread starts, that run in the order of their start and any time later, and commits.

A partition's products are one queue, and an agent of their own: what the partition knows when it starts a product is
known to the product, and a commit passes on what the queue has done up to it, by an arrival at a barrier. Nothing else
tells anyone that a product has read its operands or written its accumulator. Operands are read when the product runs.
"""

from typing import Any

import torch
from hopper_emulator.barriers import Barrier, Barriers
from hopper_emulator.block import Block, current, learn
from hopper_emulator.faults import ILLEGAL, IN_FLIGHT
from hopper_emulator.faults import UnsupportedByEmulator as Unsupported
from hopper_emulator.memory import View
from hopper_emulator.scheduler import Partition
from hopper_emulator.tensor_memory import LANES, TensorView
from hopper_emulator.values import wrap

_OPERANDS = (torch.float16, torch.bfloat16)


class TensorCore:
    """The products of a partition."""

    def __init__(self, block: Block, owner: Partition):
        self.block, self.owner = block, owner
        self.name = f"the tensor core for {owner.name}"
        self.clock: dict[int, int] = {block.enroll(self): 0}
        self.queue: list[Any] = []
        block.tensor_cores[owner.number] = self

    @property
    def last_waits(self) -> dict[Any, int]:
        return self.owner.last_waits

    def start(self, operation: Any) -> None:
        self.queue.append(operation)
        self.block.scheduler.in_flight.append(self.run_next)  # whichever of them lands, the oldest operation runs

    def run_next(self) -> None:
        if self.queue:
            self.queue.pop(0)()

    def check_end(self) -> None:
        """Faults if the kernel ends before anyone could know that all products are done."""
        if self.block.scheduler.main.clock.get(self.number, 0) < self.clock[self.number]:
            message = f"products of {self.owner.name} that no wait for a commit covers"
            self.block.fault(IN_FLIGHT, message, partition=self.owner.name)

    number: int


def _of(partition: Partition) -> TensorCore:
    found: TensorCore | None = current().tensor_cores.get(partition.number)
    return found or TensorCore(current(), partition)


def tcgen05_mma(
    a: Any,
    b: View,
    acc: TensorView,
    *,
    use_acc: Any = True,
    pred: Any = True,
    multicast: bool = False,
    mbarriers: Any = None,
    mbarrier_preds: Any = None,
) -> None:
    block = current()
    block.pause()
    if multicast:
        raise Unsupported("multicast")
    if isinstance(b, TensorView) or not isinstance(b, View) or not isinstance(a, View):
        block.fault(ILLEGAL, "tcgen05_mma takes b from shared memory, and a from there or from tensor memory")
    if not isinstance(acc, TensorView):
        block.fault(ILLEGAL, "tcgen05_mma adds to tensor memory")
    (m, k), (k_of_b, n) = a.shape, b.shape
    if k != k_of_b or acc.shape != [m, n] or m != LANES or n % 16 or n > 256 or k % 16:
        block.fault(ILLEGAL, f"a product of {a.shape} and {b.shape} into {acc.shape}")
    if a.dtype != b.dtype:
        block.fault(ILLEGAL, f"a product of {a.dtype} and {b.dtype}")
    if b.window.dtype not in _OPERANDS or str(acc.dtype) != "fp32":
        raise Unsupported(f"tcgen05_mma of {a.dtype} into {acc.dtype}")
    if wrap(pred):
        _start_product(a, b, acc, bool(wrap(use_acc)))
    if mbarriers is None:
        core = _of(block.partition)
        while core.queue:
            core.run_next()
        learn(block.partition.clock, core.clock)
        return
    for barrier, wanted in zip(mbarriers, mbarrier_preds or [True] * len(mbarriers), strict=True):
        tcgen05_commit(barrier, wanted)


def _start_product(a: View, b: View, acc: TensorView, use_acc: bool) -> None:
    me = current().partition
    core = _of(me)
    learn(core.clock, me.clock)
    core.clock[core.number] += 1
    for operand in (a, b):
        operand.check_read(core, "reads", asynchronously=not isinstance(operand, TensorView))
        operand.record_read(core)
    if use_acc:
        acc.check_read(core, "adds to")
    acc.check_write(core, "writes")
    acc.record_write(core.number, core.clock[core.number])

    def run() -> None:
        left = a.elements if isinstance(a, TensorView) else a.window
        product = left.float() @ b.window.float()
        acc.elements.copy_(acc.elements + product if use_acc else product)

    core.start(run)


def tcgen05_commit(barrier: Barriers, pred: Any = True, descs: Any = ()) -> None:
    """An arrival at the barrier when all products that the partition has started before are done."""
    block = current()
    block.pause()
    if descs:
        raise Unsupported("multicast")
    if not wrap(pred):
        return
    one: Barrier = barrier.one
    one.require_fence()
    me = block.partition
    core = _of(me)
    learn(core.clock, me.clock)
    known = {agent: time for agent, time in core.clock.items() if agent != me.number}  # not what it did itself
    core.start(lambda: one.arrive(1, by=core.name, knowledge=known))
