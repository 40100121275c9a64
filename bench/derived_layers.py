"""Calculates, without measuring, what rotary positions and LayerScale add to the memory traffic of an encoder layer.

    python -m bench.derived_layers [--model so400m-384] [--batch 64]

Towers that descend from SigLIP have one or both between its operations. Counted as in `bench.layer_traffic`, in bf16:

- fused: SigLIP's layer as two operations. parts: the first half as LayerNorm with projections, attention, and linear.
- rotary: `parts`, and q and k rotated in one pass each that reads and writes them once, as compiled PyTorch does at
  best. Its difference from `fused` is the most that rotation within the fused operation could save.
- scaled: LayerScale after each half, called with its residual in one pass, in the forward.
- folded: LayerScale as a factor of the weights before the residual, γ ∘ (W a + b) = (γ ∘ W) a + γ ∘ b: `fused` with
  other weights.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import siglip_kernels as kernels
from bench.cases.shapes import MODELS, Tower
from bench.layer_traffic import recording, total

_EPS = 1e-6


class Layer:
    """The tensors of one layer on the `meta` device, and its variants."""

    def __init__(self, tower: Tower, batch: int):
        self.heads = tower.heads
        self.parameters: list[Tensor] = []
        self.x = self._tensor(batch, tower.tokens, tower.width)
        self.norms = [(self._tensor(tower.width), self._tensor(tower.width), _EPS) for _ in range(2)]
        projections = [parameter for _ in range(3) for parameter in self._affine(tower.width, tower.width)]
        self.projected = (self.x, *self.norms[0], *projections)  # all that pre_norm_qkv takes but the heads
        self.out = self._affine(tower.width, tower.width)
        self.fc1 = self._affine(tower.hidden, tower.width)
        self.fc2 = self._affine(tower.width, tower.hidden)
        self.scales = [self._tensor(tower.width) for _ in range(2)]
        self.angles = torch.empty(tower.tokens, 1, tower.width // tower.heads, device="meta", dtype=torch.bfloat16)

    def _tensor(self, *shape: int) -> Tensor:
        tensor = torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
        self.parameters.append(tensor)
        return tensor

    def _affine(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        return self._tensor(rows, columns), self._tensor(rows)

    def _fused(self, out: tuple[Tensor, Tensor], fc2: tuple[Tensor, Tensor]) -> Tensor:
        arguments: Any = (*self.projected, *out, self.heads)
        x = kernels.pre_norm_attention(*arguments)
        return kernels.pre_norm_mlp(x, *self.norms[1], *self.fc1, *fc2)

    def _qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        arguments: Any = (*self.projected, self.heads)
        return kernels.pre_norm_qkv(*arguments)

    def fused(self) -> Tensor:
        return self._fused(self.out, self.fc2)

    def parts(self, rotate: Callable[[Tensor], Tensor] = lambda q: q) -> Tensor:
        q, k, v = self._qkv()
        x = kernels.linear(kernels.attention(rotate(q), rotate(k), v).flatten(2), *self.out, self.x)
        return kernels.pre_norm_mlp(x, *self.norms[1], *self.fc1, *self.fc2)

    def rotary(self) -> Tensor:
        return self.parts(lambda q: q * self.angles)  # the traffic of a rotation, if not its values

    def scaled(self) -> Tensor:
        q, k, v = self._qkv()
        attended = kernels.linear(kernels.attention(q, k, v).flatten(2), *self.out)
        x = torch.addcmul(self.x, attended, self.scales[0])
        hidden = kernels.mlp(kernels.layer_norm(x, *self.norms[1]), *self.fc1, *self.fc2)
        return torch.addcmul(x, hidden, self.scales[1])

    def folded(self) -> Tensor:
        out, fc2 = (
            (weight * scale[:, None], bias * scale)
            for scale, (weight, bias) in zip(self.scales, (self.out, self.fc2), strict=True)
        )
        return self._fused(out, fc2)


VARIANTS = ("fused", "parts", "rotary", "scaled", "folded")


def traffic(variant: str, tower: Tower, batch: int) -> tuple[int, int]:
    """Bytes of the forward and of the backward, with gradients of the input and of all parameters."""
    layer = Layer(tower, batch)
    out_grad = torch.empty_like(layer.x)
    with recording() as recorder:
        out = getattr(layer, variant)()
        recorder.direction = "backward"
        out.backward(out_grad)
    return total(recorder.transfers, "forward"), total(recorder.transfers, "backward")


def products(tower: Tower, batch: int) -> int:
    """FLOPs of the layer's forward."""
    linear = 4 * tower.width**2 + 2 * tower.width * tower.hidden
    return 2 * batch * tower.tokens * (linear + 2 * tower.tokens * tower.width)


def main() -> int:
    parser = argparse.ArgumentParser(description="Calculate the traffic of layers that descend from SigLIP's.")
    parser.add_argument("--model", choices=MODELS, default="so400m-384")
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    tower = MODELS[arguments.model].vision
    print(f"forward products: {products(tower, arguments.batch) / 1e12:.2f} TFLOP")
    print("| layer | forward GB | backward GB | more than fused, GB |")
    print("|---|--:|--:|--:|")
    found = {variant: traffic(variant, tower, arguments.batch) for variant in VARIANTS}
    for variant, (forward, backward) in found.items():
        more = (forward + backward - math.fsum(found["fused"])) / 1e9
        print(f"| {variant} | {forward / 1e9:.2f} | {backward / 1e9:.2f} | {more:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
