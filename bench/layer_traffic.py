"""Calculates, without measuring, the memory traffic of training one encoder layer of the vision tower with the kernels.

    python -m bench.layer_traffic [--model so400m-384] [--batch 64] [--json]

The layer runs forward and backward in bf16 on tensors of the `meta` device, which have no values: autograd, the
operators and their launchers are the real ones for an H200, and every kernel and every operation of PyTorch is recorded
with its tensors instead of computed. Each is taken to read the tensors that it is given once and to write its results
once: what one kernel reads again comes from the cache, and nothing stays there from one kernel to the next. Views and
allocations cost nothing.

The kernel that makes delta exact reads what it is given for rows in which one key has more than an eighth of the weight
only. Random inputs have none at this length; trained models do. What it then reads is shown apart, at most, and is not
in the sums.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.cases.shapes import MODELS, Tower
from bench.compiled.launch import GPUS
from siglip_kernels.device import pretend

# Kernels that read only these arguments whatever is in them.
_READS_WHERE_MARKED = {"attention_backward_delta_kernel": {"log_sum_exp"}}


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What a kernel of this project or an operation of PyTorch moves, in bytes."""

    direction: str  # "forward" or "backward"
    operator: str  # that it is part of; "autograd" for what PyTorch adds between operators
    name: str
    read: int
    written: int
    perhaps: int = 0  # read or written if values require it


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
        elif name.startswith("new_") or name.endswith("_like"):  # filled, whatever is in the input
            self._record(name, [], results)
        elif function._schema.is_mutable:
            self._record(name, inputs, inputs[:1])
        elif not {_storage(tensor) for tensor in results} <= {_storage(tensor) for tensor in inputs}:  # not a view
            self._record(name, inputs, results)
        return result

    def launch(self, kernel: str, arguments: dict[str, Tensor]) -> None:
        """A launch with these tensors. It writes those into which nothing was written since torch.empty made them."""
        certain = _READS_WHERE_MARKED.get(kernel, arguments.keys())
        tensors = [tensor for name, tensor in arguments.items() if name in certain]
        perhaps = [tensor for name, tensor in arguments.items() if name not in certain]
        written = []
        for tensor in tensors:
            place = int(tensor.storage_offset())
            places = self._written_at.get(_storage(tensor), {place})
            if place not in places:
                places.add(place)
                written.append(tensor)
        self._record(kernel, [t for t in tensors if not any(t is other for other in written)], written, perhaps)

    def _record(self, name: str, read: list[Tensor], written: list[Tensor], perhaps: Sequence[Tensor] = ()) -> None:
        sizes = (sum(map(_bytes, _distinct(tensors))) for tensors in (read, written, perhaps))
        self.transfers.append(Transfer(self.direction, self._operator, name, *sizes))


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
            given = {**dict(zip(kernel.arg_names, arguments, strict=False)), **named}
            sources = {name: getattr(value, "base", value) for name, value in given.items()}  # of descriptors
            tensors = {name: value for name, value in sources.items() if isinstance(value, Tensor)}
            recorder.launch(kernel.fn.__name__, tensors)

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
        out = layer(x, {})
        recorder.direction = "backward"
        out.backward(out_grad)
    return recorder.transfers


def total(found: Iterable[Transfer], direction: str) -> int:
    """Bytes that are read and written in a direction, whatever the values are."""
    return sum(one.read + one.written for one in found if one.direction == direction)


def table(found: list[Transfer]) -> str:
    """Transfers and sums as text, in units of 10⁹ bytes."""
    lines = [f"{'':8}  {'operator':28}  {'kernel or operation':40}  {'read':>7}  {'written':>7} GB"]
    for direction in ("forward", "backward"):
        lines += [
            f"{direction:8}  {one.operator:28}  {one.name:40}  {one.read / 1e9:7.3f}  {one.written / 1e9:7.3f}"
            + (f"  at most {one.perhaps / 1e9:.3f} more" if one.perhaps else "")
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
