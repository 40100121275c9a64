"""Inputs, expectations and shapes for the tests of the GEMMs in Gluon."""

import torch
import torch.nn.functional as F
from error_budget import check_error
from torch import Tensor

from siglip_kernels.gemm.kernels import gemm

SHAPES = [(1, 8, 8), (63, 72, 64), (65, 264, 72), (130, 520, 328), (300, 136, 200)]  # rows, columns, depth


def operands(rows: int, columns: int, depth: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """x, three weights, two biases, and a residual of the result's shape."""
    generator = torch.Generator().manual_seed(rows + columns + depth)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weights = random(rows, depth), random(3, columns, depth) * depth**-0.5
    return tuple(t.to(dtype) for t in (x, *weights, random(columns), random(columns), random(rows, columns)))


def check(project: Tensor, truth: Tensor, eager: Tensor) -> None:
    """The error budget; every element written."""
    assert project.isfinite().all()
    check_error(project, eager, truth)


def check_products(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """x Wᵀ, and with a residual added."""
    truth, eager = x.double() @ weight.double().T, x @ weight.T
    check(gemm(x, [weight], [None])[0], truth, eager)
    check(gemm(x, [weight], [None], residual=residual)[0], truth + residual, eager + residual)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_derivative(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(gelu(x).sum(), x)[0]
