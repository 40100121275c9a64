"""Compares a model before and after acceleration: results, gradients and the error budget."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from error_budget import check_error
from torch import Tensor, nn

Call = Callable[[nn.Module], dict[str, Tensor]]  # runs a model and returns its results by name


class Results(NamedTuple):
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of every parameter that has one


def randomise(model: nn.Module) -> nn.Module:
    """Redraws every parameter, so that no bias is zero and no head is symmetric."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise)
    return model


def run(model: nn.Module, call: Call) -> Results:
    """Results, and the gradients of a fixed random combination of all of them."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    outputs = call(model)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs.values():
        weights = torch.randn(output.shape, generator=generator)
        total = total + (output.double() * weights.to(output.device)).sum().cpu() / output.numel() ** 0.5
    if total.requires_grad:
        total.backward()
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Results({name: output.detach().clone() for name, output in outputs.items()}, gradients)


def in_fp64(model: nn.Module, call: Call) -> Results:
    """Results of the unaccelerated model in fp64."""
    return run(copy.deepcopy(model).double(), call)


def assert_within_budget(
    accelerated: Results, before: Results, truth: Results, autocast: torch.dtype = torch.float32
) -> None:
    """Asserts the error budget of every output and every gradient, with the model before acceleration as eager.

    A gradient that cancels to zero, such as that of the keys' bias, is rounding of the others: one rounding is relative
    to the typical gradient if that is larger. A scalar, such as the loss, may come out of `before` nearly exact by
    luck: it is allowed 16 roundings, and two of the coarsest dtype that it was computed from.
    """
    coarsest = max(torch.finfo(dtype).eps for dtype in (autocast, *(value.dtype for value in before.outputs.values())))
    for what in ("outputs", "gradients"):
        found, eager, exact = (getattr(results, what) for results in (accelerated, before, truth))
        assert found.keys() == eager.keys()
        typical = torch.stack([value.norm() / value.numel() ** 0.5 for value in exact.values()]).median()
        for name, value in found.items():
            assert value.dtype == eager[name].dtype, name
            roundings = 1.0 if value.numel() > 1 else 16 + 2 * coarsest / torch.finfo(value.dtype).eps
            size = typical * value.numel() ** 0.5
            check_error(value, eager[name], exact[name], name, roundings=roundings, size=size)


def assert_bitwise(one: Results, other: Results) -> None:
    for what in ("outputs", "gradients"):
        values, others = getattr(one, what), getattr(other, what)
        assert values.keys() == others.keys()
        for name in values:
            assert torch.equal(values[name], others[name]), name


def assert_close(one: Results, other: Results, tolerance: float = 1e-4) -> None:
    """A looser check for small models: each difference relative to the largest value of its tensor."""
    for what in ("outputs", "gradients"):
        values, others = getattr(one, what), getattr(other, what)
        assert values.keys() == others.keys()
        typical = max(value.abs().max() for value in others.values()) if others else 0
        for name in values:
            bound = tolerance * max(others[name].abs().max(), 1e-2 * typical)
            assert (values[name] - others[name]).abs().max() <= bound, name


def check_acceleration(
    model: nn.Module, call: Call, accelerate: Callable, restore: Callable, budget: bool = False
) -> Any:
    """Asserts that `accelerate` keeps results and state_dict, and that `restore` gives bitwise the same results.

    budget: assert the kernels' error budget instead of closeness. It compares two rounding errors, so it needs a model
    whose tensors are large enough for these to be alike. Returns the report; the model is restored.
    """
    kinds = [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = run(model, call)
    report = accelerate(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    after = run(model, call)
    restore(model)
    if budget:
        assert_within_budget(after, before, in_fp64(model, call))
    else:
        assert_close(after, before)
    assert [type(module) for module in model.modules()] == kinds
    assert_bitwise(run(model, call), before)
    return report
