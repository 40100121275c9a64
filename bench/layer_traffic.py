"""Calculates, without measuring, the memory traffic of training one encoder layer of the vision tower with the kernels.

    python -m bench.layer_traffic [--model so400m-384] [--batch 64] [--json]

The layer runs forward and backward in bf16 on tensors of the `meta` device, which have no values: autograd, the
operators and their launchers are the real ones for an H200, and every kernel and every operation of PyTorch is recorded
with its tensors instead of computed. Each is taken to read the tensors that it is given once and to write its results
once: what one kernel reads again comes from the cache, and nothing stays there from one kernel to the next. Views and
allocations cost nothing.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.cases.shapes import MODELS, Tower
from bench.compiled.launch import GPUS
from siglip_kernels.device import pretend


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What a kernel of this project or an operation of PyTorch moves, in bytes."""

    direction: str  # "forward" or "backward"
    operator: str  # that it is part of; "autograd" for what PyTorch adds between operators
    name: str
    read: int
    written: int


class Recorder(TorchDispatchMode):
    """Records transfers of tensors of the `meta` device."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[Transfer] = []
        self.direction = "forward"
        self._operator = "autograd"
        # Storages that torch.empty made, and the offsets at which something was written since.
        self._written_at: dict[int, set[int]] = {}
        self._kept: list[torch.UntypedStorage] = []  # so that no address is used again

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "siglip_kernels":
            definition = torch._library.custom_ops.OPDEFS[function._schema.name]
            self._operator = name
            try:
                with self:
                    return definition._init_fn(*arguments, **options)
            finally:
                self._operator = "autograd"
        result = function(*arguments, **options)
        inputs, results = _tensors((arguments, options)), _tensors(result)
        if "empty" in name:
            self._written_at.update((_storage(tensor), set()) for tensor in results)
            self._kept += [tensor.untyped_storage() for tensor in results]
        elif function._schema.is_mutable:
            self._record(name, inputs, inputs[:1])
        elif not {_storage(tensor) for tensor in results} <= {_storage(tensor) for tensor in inputs}:  # not a view
            self._record(name, inputs, results)
        return result

    def launch(self, kernel: str, tensors: list[Tensor]) -> None:
        """A launch with these tensors. It writes those into which nothing was written since torch.empty made them."""
        written = []
        for tensor in tensors:
            place = int(tensor.storage_offset())
            places = self._written_at.get(_storage(tensor), {place})
            if place not in places:
                places.add(place)
                written.append(tensor)
        self._record(kernel, [t for t in tensors if not any(t is other for other in written)], written)

    def _record(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        bytes_read, bytes_written = sum(map(_bytes, _distinct(read))), sum(map(_bytes, _distinct(written)))
        self.transfers.append(Transfer(self.direction, self._operator, name, bytes_read, bytes_written))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One of several that lie at the same place."""
    return list({(_storage(t), t.storage_offset(), t.shape, t.stride()): t for t in tensors}.values())


def _bytes(tensor: Tensor) -> int:
    """What lies in memory: an expanded axis has one element."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Records what is started within, as on an H200."""
    from triton.runtime.jit import KernelInterface

    recorder = Recorder()

    def start(kernel: Any, grid: Any) -> Any:
        def record(*arguments: Any, **named: Any) -> None:
            sources = [getattr(value, "base", value) for value in (*arguments, *named.values())]  # of descriptors
            recorder.launch(kernel.fn.__name__, [value for value in sources if isinstance(value, Tensor)])

        return record

    with (
        pretend(GPUS["h200"]),
        mock.patch.object(KernelInterface, "__getitem__", start),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # meta tensors have none
        recorder,
    ):
        yield recorder


def transfers(tower: Tower, batch: int) -> list[Transfer]:
    """Those of one layer of the tower, forward and backward, with gradients of its input and of all parameters."""
    from siglip_model.backends import TRITON
    from siglip_model.config import SiglipVisionConfig
    from siglip_model.encoder import EncoderLayer
    from siglip_model.layers import UsesBackend

    config = SiglipVisionConfig(
        hidden_size=tower.width, intermediate_size=tower.hidden, num_attention_heads=tower.heads
    )
    with torch.device("meta"):
        layer = EncoderLayer(config).bfloat16()
        x = torch.empty(batch, tower.tokens, tower.width, dtype=torch.bfloat16, requires_grad=True)
        out_grad = torch.empty_like(x)
    for module in layer.modules():
        if isinstance(module, UsesBackend):
            module.ops = TRITON
    with recording() as recorder:
        out, _ = layer(x, {})
        recorder.direction = "backward"
        out.backward(out_grad)
    return recorder.transfers


def total(found: Iterable[Transfer], direction: str) -> int:
    """Bytes that are read and written in a direction."""
    return sum(one.read + one.written for one in found if one.direction == direction)


def table(found: list[Transfer]) -> str:
    """Transfers and sums as text, in units of 10⁹ bytes."""
    lines = [f"{'':8}  {'operator':28}  {'kernel or operation':40}  {'read':>7}  {'written':>7} GB"]
    for direction in ("forward", "backward"):
        lines += [
            f"{direction:8}  {one.operator:28}  {one.name:40}  {one.read / 1e9:7.3f}  {one.written / 1e9:7.3f}"
            for one in found
            if one.direction == direction
        ]
        lines.append(f"{direction:8}  {'total':28}  {'':40}  {total(found, direction) / 1e9:16.3f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Calculate the traffic of an encoder layer; nothing is measured.")
    parser.add_argument("--model", choices=MODELS, default="so400m-384")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    arguments = parser.parse_args()
    found = transfers(MODELS[arguments.model].vision, arguments.batch)
    if arguments.json:
        print("\n".join(json.dumps(dataclasses.asdict(one)) for one in found))
    else:
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
