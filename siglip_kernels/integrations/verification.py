"""Compares accelerated modules with the library's own on random input, where `accelerate(verify=True)` asks for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_kernels.arguments import KERNEL_DTYPES
from siglip_kernels.device import kernels_run_on
from siglip_kernels.errors import MissingBackendError
from siglip_kernels.fp8 import LEAST_COSINE
from siglip_kernels.integrations.patching import entry_of, in_fp8, is_replaced, put_back
from siglip_kernels.integrations.report import Left, Report

# The largest relative difference. Other mathematics differs by tens of per cent; rounding, TF32's included, by less.
_TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def require_comparable(model: nn.Module, fp8: bool) -> None:
    """Raises MissingBackendError unless the kernels run where the model is, in its dtypes."""
    for path, parameter in model.named_parameters():
        autocast = torch.is_autocast_enabled(parameter.device.type)
        dtypes = (torch.float16, torch.bfloat16) if fp8 and not autocast else KERNEL_DTYPES
        if not kernels_run_on(parameter.device) or parameter.dtype not in dtypes:
            found = f"{path} is {parameter.dtype} on {parameter.device}".replace("torch.", "")
            raise MissingBackendError(
                f"accelerate: verify=True compares results of the kernels, which do not run there: {found}; "
                f"move the model first{', or convert it' * fp8}"
            )


def verify(model: nn.Module, report: Report) -> Report:
    """Puts back every module whose result, or whose gradient with respect to its input, differs from the library's,
    and returns the report without it. Dropout is off meanwhile; hooks on submodules run."""
    failed: dict[str, Left] = {}
    compared = 0
    modes = {module: module.training for module in model.modules()}
    generator = torch.Generator().manual_seed(0)
    try:
        model.eval()
        for entry in sorted(report.replaced, key=lambda entry: -entry.path.count(".")):  # parts before wholes
            module: Any = model.get_submodule(entry.path)
            arguments = type(module).replacement.example(module, _drawn(module, generator))
            reason = None if arguments is None else _difference(module, arguments)
            if reason is not None:
                compared += 1
            if reason:
                failed[entry.path] = Left(entry.path, entry.module, reason)
                put_back(module)
    finally:
        for module, training in modes.items():
            module.training = training
    # Described again: a module that calls what was put back computes less by itself.
    paths = [entry.path for entry in report.replaced if entry.path not in failed]
    kept = tuple([entry_of(path, model.get_submodule(path)) for path in paths])
    note = f"compared with the library on random input: {compared} of {len(report.replaced)} modules"
    return dataclasses.replace(
        report,
        replaced=kept,
        left=(*report.left, *failed.values()),
        note="; ".join(filter(None, (report.note, note))),
        fp8=None if report.fp8 is None else in_fp8(model, kept),
    )


def _drawn(module: nn.Module, generator: torch.Generator) -> Callable[..., Tensor]:
    like = next(module.parameters())
    return lambda *shape: torch.randn(shape, generator=generator).to(like)


def _difference(module: nn.Module, arguments: tuple[Any, ...]) -> str | None:
    """Why the module does not compute what its library's class does, or an empty string. None if the library's needs
    more arguments, such as those of packed sequences."""
    classes: list[tuple[nn.Module, Any]] = [(part, type(part)) for part in module.modules() if is_replaced(part)]
    for part, _ in classes:
        put_back(part)
    try:
        expected = _results(module, arguments)
    except Exception:
        return None
    finally:
        for part, made in classes:
            part.__class__ = made
    if any(made.fp8 and made.replacement.describe(part).projections for part, made in classes):
        return _difference_in_fp8(module, arguments, expected[0])
    for found, wanted in zip(_results(module, arguments), expected, strict=True):
        difference = ((found - wanted).norm() / wanted.norm()).item()
        allowed = _tolerance(wanted)
        if not difference <= allowed:
            return f"its result differs from the library's by {difference:.2g}, relative; {allowed:.2g} is allowed"
    return ""


def _tolerance(result: Tensor) -> float:
    """Of the dtype in which it was computed, which under autocast is not its own."""
    device = result.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else result.dtype
    return max(_TOLERANCES[result.dtype], _TOLERANCES[computed])


@torch.no_grad()
def _difference_in_fp8(module: nn.Module, arguments: tuple[Any, ...], wanted: Tensor) -> str:
    """By the least cosine of a token: fp8 has no gradients, and rounds more than other mathematics might differ."""
    cosine = F.cosine_similarity(_output(module, arguments).float(), wanted.float(), dim=-1).min().item()
    if cosine >= LEAST_COSINE:
        return ""
    return f"its result has a cosine of {cosine:.4f} to the library's; {LEAST_COSINE} is the least that is allowed"


def _output(module: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    out = module(*arguments)
    return out[0] if isinstance(out, tuple) else out


def _results(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of a combination of it with respect to the input."""
    with torch.inference_mode(False), torch.enable_grad():
        x = arguments[0].clone().requires_grad_()
        out = _output(module, (x, *arguments[1:]))
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view_as(out)
        (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    return out.detach(), gradient
