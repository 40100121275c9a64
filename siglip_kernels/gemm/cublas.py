"""GEMMs without a fused epilogue, dispatched to cuBLAS through PyTorch; cuBLAS adds a bias in its own epilogue.

With g the gradient of y = x wᵀ + b, dx = g w, dw = gᵀ x, db = Σ g over rows. Sums are in fp32 and in a fixed order.
torch.backends.cuda.matmul says whether fp32 products may use TF32, and, with allow_bf16_reduced_precision_reduction and
allow_fp16_reduced_precision_reduction, whether cuBLAS may add partial sums in bf16 and fp16.
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
