"""One rank of several, to which nothing arrives: it shows what an exchange takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from siglip_kernels.sigmoid_loss.distributed import Peers


@dataclass(frozen=True)
class Alone(Peers):
    """Knows the memory that it sends from and receives into, in bytes by address."""

    memory: dict[int, int] = field(default_factory=dict)

    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor], tag: int = 0) -> list:
        for tensor in (*send, *receive):
            self.memory[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return []

    def largest(self, value: Tensor) -> Tensor:
        return value
