"""The error budget of every kernel: ‖kernel − fp64‖ ≤ 2 ‖same-dtype eager − fp64‖ + one rounding of the dtype."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def run(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor], out_grad: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output ("out") and the gradient of each input, all cast to the dtype first."""
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
    """Checks output and gradients, whose shapes and dtypes must be the reference's. Returns what the kernel made.

    slack: by result, an absolute error that is allowed besides, for results that are 0 up to rounding in any order.
    """
    dtype = out_grad.dtype
    found = run(kernel, inputs, out_grad, dtype)
    eager = run(reference, inputs, out_grad, dtype)
    truth = run(reference, inputs, out_grad, torch.float64)
    for name, exact in truth.items():
        assert found[name].dtype == dtype and found[name].shape == exact.shape, name
        error = (found[name].double() - exact).norm().item()
        eager_error = (eager[name].double() - exact).norm().item()
        allowed = 2 * eager_error + torch.finfo(dtype).eps / 2 * exact.norm().item() + (slack or {}).get(name, 0.0)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, norm {exact.norm():.3g}"
    return found
