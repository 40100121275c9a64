"""Transforms of torch.func and torch.autograd, by name: each takes a function of one tensor, and that tensor.

FIRST need what a registered operator lacks. SECOND are second derivatives by two reverse passes. SERVED are calls per
sample and first derivatives in reverse mode.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad, functional

Function = Callable[[Tensor], Tensor]  # to a few elements


def dual(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def of_an_intermediate(transform: Callable) -> Callable:
    """The transform with respect to what the argument is computed from."""
    return lambda f, x: transform(lambda scale: f(x * scale), torch.ones((), device=x.device))


def jvp(f: Function, x: Tensor) -> Tensor:
    return func.jvp(f, (x,), (torch.ones_like(x),))[1]


def linearize(f: Function, x: Tensor) -> Tensor:
    return func.linearize(f, x)[1](torch.ones_like(x))


def vjp(f: Function, x: Tensor) -> Tensor:
    out, pull = func.vjp(f, x)
    return pull(torch.ones_like(out))[0]


def batch(x: Tensor) -> Tensor:
    return torch.stack((x, 2 * x))


FIRST = {
    "func.grad": lambda f, x: func.grad(lambda x: f(x).sum())(x),
    "func.vjp": vjp,
    "func.jacrev": lambda f, x: func.jacrev(f)(x),
    "func.jvp": jvp,
    "func.jacfwd": of_an_intermediate(lambda f, x: func.jacfwd(f)(x)),
    "func.linearize": linearize,
    "func.hessian": of_an_intermediate(lambda f, x: func.hessian(f)(x)),
    "vmap of grad": lambda f, x: func.vmap(func.grad(lambda x: f(x).sum()))(batch(x)),
    "grad of vmap": lambda f, x: func.grad(lambda x: func.vmap(f)(batch(x)).sum())(x),
    "vmap of jvp": lambda f, x: func.vmap(lambda x: jvp(f, x))(batch(x)),
    "jvp of vmap": lambda f, x: jvp(lambda x: func.vmap(f)(batch(x)), x),
    "dual numbers": dual,
    "jacobian in forward mode": of_an_intermediate(
        lambda f, x: functional.jacobian(f, x, vectorize=True, strategy="forward-mode")
    ),
}


def create_graph(f: Function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.sum(), x)[0]


SECOND = {
    "create_graph": create_graph,
    "functional.hessian": of_an_intermediate(lambda f, x: functional.hessian(lambda x: f(x).square().sum(), x)),
    "functional.hvp": lambda f, x: functional.hvp(lambda x: f(x).square().sum(), x, torch.ones_like(x))[1],
    "functional.jvp": lambda f, x: functional.jvp(f, x, torch.ones_like(x))[1],  # by two reverse passes
}


def vmap_in_training(f: Function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    func.vmap(f)(batch(x)).square().sum().backward()
    assert x.grad is not None
    return x.grad


SERVED = {
    "vmap": lambda f, x: func.vmap(f, in_dims=-1)(batch(x).movedim(0, -1)),
    "vmap in training": vmap_in_training,
    "functional.vjp": lambda f, x: functional.vjp(f, x, torch.ones_like(f(x)))[1],
    "functional.jacobian": functional.jacobian,
    "vectorised jacobian": lambda f, x: functional.jacobian(f, x, vectorize=True),
}


def of_each_kind(transforms: dict[str, Callable]) -> list:
    """For `parametrize`: their names, one of each kind in the default tests and the others in the thorough ones."""
    usual = {"func.grad", "func.jvp", "vmap of grad", "dual numbers", "create_graph", "vmap", "vectorised jacobian"}
    return [name if name in usual else pytest.param(name, marks=pytest.mark.thorough) for name in transforms]
