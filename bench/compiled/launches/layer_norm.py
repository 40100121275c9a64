"""Launches of LayerNorm: widths of published models and others, many rows and few."""

from collections.abc import Iterator

import torch

from bench.compiled.launch import NAMES, Launch

PUBLISHED = "^bf16 46656 x (1152( residual)?|9001)$"  # 9001: wider than published models, with kernels of its own


def launches() -> Iterator[Launch]:
    """Training: the widths of base, large and so400m in bf16, other dtypes, a residual, one image, other widths."""
    for width in (768, 1024, 1152):
        yield _launch(64 * 729, width, torch.bfloat16)
    yield _launch(64 * 729, 1152, torch.bfloat16, residual=True)
    yield _launch(64 * 729, 1151, torch.bfloat16, residual=True)
    yield _launch(64 * 729, 1152, torch.float32)
    yield _launch(64 * 729, 1152, torch.float32, residual=True)
    yield _launch(64 * 729, 1152, torch.float16, torch.float32)
    yield _launch(729, 1152, torch.bfloat16)
    yield _launch(64, 768, torch.float16)
    yield _launch(64 * 729, 8192, torch.float32, residual=True)
    for width in (17, 72, 1000, 2048, 4304, 8192, 9001, 20_000):
        yield _launch(64 * 729, width, torch.bfloat16)


def _launch(
    rows: int, width: int, dtype: torch.dtype, parameter_dtype: torch.dtype | None = None, residual: bool = False
) -> Launch:
    name = f"{NAMES[dtype]} {rows} x {width}"
    name += f" parameters {NAMES[parameter_dtype]}" if parameter_dtype else ""
    return Launch(
        name + (" residual" if residual else ""), lambda: _run(rows, width, dtype, parameter_dtype or dtype, residual)
    )


def _run(rows: int, width: int, dtype: torch.dtype, parameter_dtype: torch.dtype, residual: bool) -> None:
    from siglip_kernels.layer_norm.kernels import layer_norm_backward, layer_norm_forward

    x = torch.empty(rows, width, dtype=dtype, device="meta")
    parameter = torch.empty(width, dtype=parameter_dtype, device="meta")
    _, mean, rstd = layer_norm_forward(x, parameter, parameter, 1e-6)
    layer_norm_backward(x, x, parameter, mean, rstd, x if residual else None, needs_residual_sums=residual)
