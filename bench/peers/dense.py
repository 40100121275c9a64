"""Peers of GEMMs, normalisation and resizing: linear, MLP, their pre-norm forms, LayerNorm, pooling head, patch
embedding, and the resize of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.operations import Setting
from bench.peers.compiled import compiled
from bench.peers.registry import peer
from siglip_kernels import reference
from siglip_kernels.attention_pool import folded_attention_pool

_OPERATIONS = (
    "linear", "pre_norm_qkv", "pre_norm_attention", "mlp", "pre_norm_mlp", "layer_norm", "attention_pool",
    "patch_embed",
)  # fmt: skip


@peer((*_OPERATIONS, "resize_normalize"), "eager", note="the definition")
def eager(setting: Setting) -> Callable[..., Any]:
    return getattr(reference, setting.operation.name)


def _compiled(mode: str) -> Callable[[Setting], Callable[..., Any]]:
    return lambda setting: compiled(getattr(reference, setting.operation.name), mode)


peer(_OPERATIONS, "compile", cuda=True, note="torch.compile of the definition")(_compiled("compile"))
peer(_OPERATIONS, "max-autotune", cuda=True, slow=True, note="torch.compile of the definition")(
    _compiled("max-autotune")
)


def _cublaslt_mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, residual: Tensor
) -> Tensor:
    hidden = torch._addmm_activation(fc1_bias, x, fc1_weight.t(), use_gelu=True)  # type: ignore[attr-defined]
    return F.linear(hidden, fc2_weight, fc2_bias) + residual


@peer("mlp", "cublaslt", cuda=True, directions=("fwd",), note="bias and tanh-GELU in cuBLASLt's epilogue")
def cublaslt_mlp(setting: Setting) -> Callable[..., Tensor]:
    return _cublaslt_mlp


@peer("linear", "cublaslt", cuda=True, directions=("fwd",), note="bias in cuBLASLt's epilogue, residual after it")
def cublaslt_linear(setting: Setting) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.addmm(bias, x, weight.t())
        return y if residual is None else y.add_(residual)

    return call


@peer("attention_pool", "folded", note="the same algebra in plain PyTorch")
def folded(setting: Setting) -> Callable[..., Tensor]:
    return folded_attention_pool


@peer("layer_norm", "liger", package="liger-kernel", cuda=True)
def liger(setting: Setting) -> Callable[..., Tensor]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias, eps: LigerLayerNormFunction.apply(x, weight, bias, eps)


@peer("resize_normalize", "torchvision", package="torchvision", note="one image after the other, as transformers does")
def torchvision_resize(setting: Setting) -> Callable[..., Tensor]:
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    def call(
        images: list[Tensor], mean: Tensor, std: Tensor, size: tuple[int, int], mode: str, dtype: torch.dtype
    ) -> Tensor:
        levels = torch.stack([resize(image, list(size), InterpolationMode(mode), antialias=True) for image in images])
        return ((levels - mean[:, None, None]) / std[:, None, None]).to(dtype)

    return call
