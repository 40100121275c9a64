"""Global memory: the latest write of each element in a launch.

Only a partition of the same program that knows of a write may read the element or write it again: programs run in any
order, and of two programs that add to a number one may overwrite the other's sum.
"""

from typing import Any

import torch
from hopper_emulator.block import current
from hopper_emulator.faults import RACE
from torch import Tensor


class GlobalWrites:
    def __init__(self) -> None:
        self._writes: list[tuple[Any, ...]] = [()]  # program, partition's number and name, time
        self._latest: dict[tuple[int, int], Tensor] = {}  # by storage: the index of each element's latest write, or 0

    def of(self, tensor: Tensor) -> Tensor | None:
        """The latest write of each element of a view, itself a view; None if its storage has not been written."""
        latest = self._latest.get(_key(tensor))
        return None if latest is None else latest.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def of_written(self, tensor: Tensor) -> Tensor:
        """The same for a view that is about to be written."""
        if _key(tensor) not in self._latest:
            length = tensor.untyped_storage().nbytes() // tensor.element_size()
            self._latest[_key(tensor)] = torch.zeros(length, dtype=torch.int32)
        latest = self.of(tensor)
        assert latest is not None
        return latest

    def check(self, touched: Tensor, verb: str) -> None:
        """Faults on a race. touched: the latest writes of the elements that the running partition reads or writes."""
        block = current()
        me = block.partition
        for number in touched.unique().tolist():
            if number == 0:
                continue
            program, partition, name, time = self._writes[number]
            if program != block.program or (partition != me.number and time > me.clock.get(partition, 0)):
                who = f"{name} of program {program}" if program != block.program else name
                block.fault(RACE, f"{me.name} {verb} global memory that {who} has written, in no order between them")

    def begin(self) -> int:
        """The index of a new write by the running partition."""
        me = current().partition
        self._writes.append((current().program, me.number, me.name, me.clock[me.number]))
        return len(self._writes) - 1


def _key(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), tensor.element_size()
