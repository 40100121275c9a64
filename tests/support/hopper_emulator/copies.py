"""TMA: tensor descriptors, loads that land late and in any order, stores that read their source late."""

from types import SimpleNamespace
from typing import Any

import torch
from hopper_emulator.barriers import Barriers
from hopper_emulator.block import current
from hopper_emulator.faults import BYTE_COUNT, ILLEGAL
from hopper_emulator.faults import UnsupportedByEmulator as Unsupported
from hopper_emulator.memory import View
from hopper_emulator.values import Pointer, gluon_dtype, wrap
from torch import Tensor

_LARGEST_BOX = 256  # elements along any axis


class Descriptor:
    """A tensor descriptor inside a kernel."""

    def __init__(self, tensor: Tensor, block_shape: list[int], layout: Any, padding: str = "zero"):
        self.tensor, self.block_shape, self.layout = tensor, [int(n) for n in block_shape], layout
        self.filler = float("nan") if padding == "nan" else 0.0
        self.dtype = gluon_dtype(tensor.dtype)
        self.nbytes_per_cta = torch.Size(self.block_shape).numel() * tensor.element_size()
        self.block_type = SimpleNamespace(nbytes=self.nbytes_per_cta, shape=self.block_shape, element_ty=self.dtype)
        self.type = SimpleNamespace(block_type=self.block_type, layout=layout)
        self.shape = [wrap(n) for n in tensor.shape]
        self.strides = [wrap(n) for n in tensor.stride()]
        if any(n > _LARGEST_BOX for n in self.block_shape):
            raise ValueError(f"a TMA box of {self.block_shape}; at most {_LARGEST_BOX} along an axis")
        *steps, last = tensor.stride()
        if last != 1 or tensor.data_ptr() % 16 or any(n <= 0 or n * tensor.element_size() % 16 for n in steps):
            got = f"strides {tensor.stride()} of {tensor.dtype} from {tensor.data_ptr() % 16} bytes past a boundary"
            raise ValueError(
                f"TMA cannot read {got}; supported: multiples of 16 bytes, no expanded axes, unit last stride"
            )

    @classmethod
    def of_host(cls, host: Any) -> "Descriptor":
        """From the TensorDescriptor that a launcher passes."""
        tensor = host.base.detach().as_strided(tuple(host.shape), tuple(host.strides), host.base.storage_offset())
        return cls(tensor, host.block_shape, host.layout, host.padding)

    def window(self, coordinates: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of a box at the coordinates that is inside the tensor: where it is in the tensor and in the box."""
        inside, box = [], []
        for start, length, extent in zip(coordinates, self.block_shape, self.tensor.shape, strict=True):
            low = min(max(start, 0), extent)
            high = max(min(start + length, extent), low)
            inside.append(slice(low, high))
            box.append(slice(low - start, high - start))
        return tuple(inside), tuple(box)


def make_tensor_descriptor(
    base: Pointer, shape: Any, strides: Any, block_shape: Any, layout: Any, padding_option: str = "zero"
) -> Descriptor:
    sizes, steps = [int(n) for n in shape], [int(n) for n in strides]
    tensor = base.storage.as_strided(sizes, steps, int(base.offset))
    return Descriptor(tensor, block_shape, layout, padding_option)


def _check(descriptor: Descriptor, coordinates: Any, shared: View) -> list[int]:
    if shared.shape != descriptor.block_shape or shared.dtype != descriptor.dtype:
        got = f"{shared.name} is {shared.shape} {shared.dtype}"
        current().fault(ILLEGAL, f"{got}, the descriptor's box {descriptor.block_shape} {descriptor.dtype}")
    return [int(c) for c in coordinates]


class _Load:
    """A TMA load, in flight until it lands; then its barrier counts its bytes."""

    def __init__(self, descriptor: Descriptor, coordinates: list[int], shared: View, barrier: Any):
        self.block, self.barrier, self.phase = current(), barrier, barrier.phase
        self.descriptor, self.coordinates, self.shared = descriptor, coordinates, shared
        self.bytes, self.issuer = descriptor.nbytes_per_cta, self.block.partition.name

    def land(self) -> None:
        inside, box = self.descriptor.window(self.coordinates)
        self.shared.window.fill_(self.descriptor.filler)
        self.shared.window[box] = self.descriptor.tensor[inside]
        self.barrier.loads.remove(self)
        if self.barrier.phase != self.phase:
            message = f"a copy of {self.issuer} for phase {self.phase} lands in phase {self.barrier.phase}"
            self.block.fault(BYTE_COUNT, message, self.barrier.name)
        self.barrier.bytes -= self.bytes
        self.barrier.settle()


def async_copy_global_to_shared(
    tensor_desc: Descriptor, coord: Any, barrier: Barriers, result: View, pred: Any = True, multicast: bool = False
) -> None:
    if multicast:
        raise Unsupported("multicast")
    if not pred:
        return
    block = current()
    block.pause()
    coordinates = _check(tensor_desc, coord, result)
    barrier.one.require_fence()
    result.check_write(block.partition, "lets TMA load into", asynchronously=True)
    inside, _ = tensor_desc.window(coordinates)
    if (latest := block.global_writes.of(tensor_desc.tensor)) is not None:
        block.global_writes.check(latest[inside], "lets TMA load from")
    load = _Load(tensor_desc, coordinates, result, barrier.one)
    result.record_write(
        barrier.one.number, load.phase + 1
    )  # as if at once: no access is legal before the phase is over
    barrier.one.loads.append(load)
    block.loads.append(load)
    block.scheduler.in_flight.append(load.land)


def async_copy_shared_to_global(tensor_desc: Descriptor, coord: Any, src: View) -> None:
    block = current()
    block.pause()
    me = block.partition
    coordinates = _check(tensor_desc, coord, src)
    inside, box = tensor_desc.window(coordinates)
    src._with(src.window[box]).check_read(me, "lets TMA store", asynchronously=True)
    use = src.begin_use(f"a TMA store of {me.name}")

    def read() -> None:
        latest = block.global_writes.of_written(tensor_desc.tensor)[inside]
        block.global_writes.check(latest, "lets TMA store to")
        latest.fill_(block.global_writes.begin())
        tensor_desc.tensor[inside] = src.window[box]
        src.end_use(use, me)

    me.store_queue.append(read)


def store_wait(pendings: Any) -> None:
    block = current()
    block.pause()
    queue = block.partition.store_queue
    while len(queue) > int(pendings):
        queue.pop(0)()
