"""Products with nothing to fuse: cuBLAS through PyTorch, whose own epilogue adds a bias. This is the one place.

The derivatives of a product are products: for y = x wᵀ + b and the gradient g of y, dx = g w, dw = gᵀ x, db = Σ g over
rows. Sums are in fp32 and in a fixed order. torch.backends.cuda.matmul says whether fp32 may be TF32, and, with
allow_bf16_reduced_precision_reduction and allow_fp16_reduced_precision_reduction, whether cuBLAS may add up parts of a
sum in two bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x wᵀ + b. x: (..., in); weight: (out, in)."""
    return F.linear(x, weight, bias)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient: (rows, out); weight: (out, in). Returns (rows, in)."""
    return torch.mm(gradient, weight)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient: (rows, out); x: (rows, in). Returns (out, in)."""
    return torch.mm(gradient.T, x)


def bias_gradient(gradient: Tensor) -> Tensor:
    """gradient: (rows, out). Returns (out,)."""
    return gradient.sum(0)
