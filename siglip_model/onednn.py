"""The linear layers of a model in fp32 on a CPU, by oneDNN where that is faster than PyTorch's own product.

PyTorch multiplies fp32 matrices with MKL, which leaves AVX-512 unused on processors of AMD; on others oneDNN may be the
slower one. So one product is computed by both before the first is needed, and oneDNN serves where it gave the same
numbers in less time. It reads the weights where they are: packing them for it gains nothing from 64 rows on, and would
hold them twice.

The operator is the one that torch.compile emits. It has no derivative, so that whatever is traced, differentiated or
transformed is computed by `siglip_kernels.reference`, as are other dtypes, in which PyTorch calls oneDNN itself.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from siglip_kernels import MissingBackendError, reference
from siglip_kernels.transforms import can_read_values

FEWEST_ROWS = 4  # of a product; with fewer, a call costs more than it saves
CHECKED_ROWS, CHECKED_WIDTH = 256, 768
GAIN = 1.1  # over PyTorch, from which oneDNN is used; a smaller one is not told from noise
TOLERANCE = 5e-5  # of results around 1: ten times what another order of the sums changes

_left_out = ContextVar("left_out", default=False)


@contextmanager
def left_out() -> Iterator[None]:
    """Within the block PyTorch computes every product, so that it gives the same numbers in all processes.

    For training: which of the two is faster is measured in each process, and their sums round differently.
    """
    before = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(before)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """See `reference.linear`."""
    if not _serves(x, weight, bias):
        return reference.linear(x, weight, bias, residual)
    y = _product(x, weight, bias)
    return y if residual is None else residual + y


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """See `reference.mlp`. GELU is part of the first product."""
    if not _serves(x, fc1_weight, fc1_bias):
        return reference.mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual)
    return linear(_product(x, fc1_weight, fc1_bias, "gelu", "tanh"), fc2_weight, fc2_bias, residual)


pre_norm_qkv = functools.partial(reference.pre_norm_qkv, linear=linear)
pre_norm_mlp = functools.partial(reference.pre_norm_mlp, mlp=mlp)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", form: str = "") -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], form)
    return product


def _serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN is to compute this product."""
    if not (x.is_cpu and can_read_values(x)):
        return False
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(type(each) in (Tensor, Parameter) and each.is_cpu and each.dtype == torch.float32 for each in given)
        and _fit(x, weight, bias)
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in given))
        and not _left_out.get()
        and not _in_custom_forward()
        and not torch.is_autocast_enabled("cpu")
        and not is_in_torch_dispatch_mode()  # such as one that counts FLOPs, which does not know the operator
        and bool(torch.backends.mkldnn.enabled)
        and is_faster()
    )


def _in_custom_forward() -> bool:
    """Whether a torch.autograd.Function computes its output. A reentrant checkpoint is one: it computes its output once
    more for the gradients, and has to find the same numbers."""
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Otherwise PyTorch raises its own error, or computes few rows."""
    return (
        weight.dim() == 2
        and weight.is_contiguous()
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))  # its strides are not read
        and x.numel() >= FEWEST_ROWS * x.shape[-1] > 0
    )


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN computes linear layers here, found once per process.

    SIGLIP_ONEDNN=1 or 0 decides it. Otherwise one product is computed by oneDNN and by PyTorch, four times each, which
    takes about 20 ms on two cores: it has to agree, and to be faster.
    """
    asked = os.environ.get("SIGLIP_ONEDNN", "")
    if asked not in ("", "0", "1"):
        raise MissingBackendError(
            f"SIGLIP_ONEDNN is {asked!r}; supported: 1 (oneDNN computes linear layers on a CPU), 0 (PyTorch does) or"
            " unset (the faster one does)"
        )
    return asked == "1" if asked else _wins()


@torch.no_grad()
def _wins() -> bool:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    x = draw(CHECKED_ROWS, CHECKED_WIDTH)
    weight, bias = draw(CHECKED_WIDTH, CHECKED_WIDTH) * CHECKED_WIDTH**-0.5, draw(CHECKED_WIDTH)
    try:
        found = _product(x, weight, bias)
    except (AttributeError, RuntimeError):  # a build of PyTorch without the operator, or without oneDNN
        return False
    if not torch.allclose(found, F.linear(x, weight, bias), rtol=0, atol=TOLERANCE):
        return False
    rounds = [(_seconds(_product, x, weight, bias), _seconds(F.linear, x, weight, bias)) for _ in range(3)]
    onednn, pytorch = map(min, zip(*rounds, strict=True))
    return pytorch > GAIN * onednn


def _seconds(multiply: Callable[..., Tensor], *arguments: Tensor) -> float:
    started = time.perf_counter()
    multiply(*arguments)
    return time.perf_counter() - started
