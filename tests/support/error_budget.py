"""The error budget of every kernel, relative to eager PyTorch in the same dtype and to fp64:

‖kernel − fp64‖ ≤ 2 ‖eager − fp64‖ + one rounding of the output dtype.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def check_error(
    found: Tensor,
    eager: Tensor | Sequence[Tensor],
    exact: Tensor,
    name: str = "result",
    *,
    dtype: torch.dtype | None = None,
    roundings: float = 1.0,
    size: float | Tensor = 0.0,
    slack: float | Tensor = 0.0,
) -> None:
    """Asserts the budget in the Frobenius norm.

    found: the kernel's result. eager: the same computation in the same dtype; if several, rounded in different orders,
    the worst counts. exact: the same in fp64.
    dtype: what is rounded to, found's own unless given. roundings: how many are allowed instead of one.
    size: the norm that a rounding is relative to, where the terms of a sum are larger than what is left of them.
    slack: an absolute error that is allowed in addition, where the exact result is zero.
    """
    assert found.shape == exact.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    exact = exact.double()
    norm = exact.norm().item()
    error = (found.double() - exact).norm().item()
    others = [eager] if isinstance(eager, Tensor) else eager
    eager_error = torch.stack([(one.double() - exact).norm() for one in others]).max().item()  # NaN if one of them is
    rounding = torch.finfo(dtype or found.dtype).eps / 2 * max(norm, float(size))
    allowed = 2 * eager_error + roundings * rounding + float(slack)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, norm {norm:.3g}"


def run(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor], out_grad: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output ("out") and the gradient of each input; inputs and out_grad are cast to dtype first."""
    cast = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
    out = function(**cast)
    gradients = torch.autograd.grad(out, list(cast.values()), out_grad.to(dtype))
    return {"out": out.detach(), **dict(zip(cast, gradients, strict=True))}


def check_budget(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    out_grad: Tensor,
    slack: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Asserts the budget for output and gradients in out_grad's dtype, and returns the kernel's.

    slack: by result, as in `check_error`, for results that are zero up to rounding in any order.
    """
    dtype = out_grad.dtype
    found = run(kernel, inputs, out_grad, dtype)
    eager = run(reference, inputs, out_grad, dtype)
    truth = run(reference, inputs, out_grad, torch.float64)
    for name, exact in truth.items():
        assert found[name].dtype == dtype, name
        check_error(found[name], eager[name], exact, name, slack=(slack or {}).get(name, 0.0))
    return found
