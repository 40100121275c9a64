"""fp8 (e4m3) in plain PyTorch: the definition that tests compare the kernels with, and how weights are quantised.

A matrix is quantised by rows: activations per token, weights per output channel. That is torchao's float8 "rowwise"
formula, but for the scale of what GELU makes, which is known before the row is: see `quantise.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0  # of e4m3
FLOOR = 1e-30  # of a row's largest magnitude: rows of zeros have a scale, and its reciprocal is finite
MARGIN = 1.07  # rounding to e4m3 lengthens a row by at most 1/16


class Projection(NamedTuple):
    """A quantised x Wᵀ + b."""

    values: Tensor  # e4m3 (out, in)
    scales: Tensor  # fp32 (out,)
    bias: Tensor | None  # (out,)
    gains: Tensor  # fp32 (2,): the largest norm of a row of W, times MARGIN, and the largest |b|


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (rows, width). Returns e4m3 values and fp32 scales (rows,), by which they are multiplied."""
    largest = x.float().abs().amax(-1).clamp(min=FLOOR)
    return to_e4m3(x.float() * (1 / largest * LARGEST)[:, None]), largest / LARGEST


def to_e4m3(x: Tensor) -> Tensor:
    """Rounded to nearest, and beyond 448 to 448."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """fp32 (rows, width)."""
    return values.float() * scales[:, None]


def quantise_projection(weight: Tensor, bias: Tensor | None) -> Projection:
    """weight: (out, in); bias: (out,) or None."""
    values, scales = quantise(weight)
    norm = dequantise(values, scales).norm(dim=-1).amax() * MARGIN
    offset = norm.new_zeros(()) if bias is None else bias.float().abs().amax()
    return Projection(values, scales, bias, torch.stack((norm, offset)))


def product(values: Tensor, scales: Tensor, projection: Projection) -> Tensor:
    """fp32 (rows, out)."""
    bias = None if projection.bias is None else projection.bias.float()
    return F.linear(dequantise(values, scales), dequantise(projection.values, projection.scales), bias)


def mlp(x: Tensor, fc1: Projection, fc2: Projection) -> Tensor:
    """fc2(gelu(fc1(x))) of rows, without a residual. x: (rows, width). Returns fp32 (rows, out)."""
    values, scales = quantise(x)
    norm = (x.float() / scales[:, None]).norm(dim=-1) * scales  # whose squares do not overflow
    hidden_scales = (norm * fc1.gains[0] + fc1.gains[1]).clamp(min=FLOOR) / LARGEST
    hidden = F.gelu(product(values, scales, fc1), approximate="tanh")
    return product(to_e4m3(hidden / hidden_scales[:, None]), hidden_scales, fc2)


def linear(x: Tensor, projection: Projection) -> Tensor:
    """fp32 (rows, out) of rows (rows, in)."""
    return product(*quantise(x), projection)
