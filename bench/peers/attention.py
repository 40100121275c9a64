"""Peers of attention, also over packed and padded sequences. Inputs and outputs are (B, S, H, D), of packed sequences
(T, H, D); inputs are strided views of one packed projection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.operations import Contender, Setting
from bench.cases.shapes import AttentionShape
from bench.peers.compiled import compiled
from bench.peers.registry import Unsupported, peer
from siglip_kernels import reference

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@peer(("attention", "packed_attention", "padded_attention"), "eager", note="the definition")
def eager(setting: Setting) -> Attention:
    return reference.attention


def heads_first(function: Callable[..., Tensor]) -> Attention:
    """Adapts a function of (B, H, S, D) to (B, S, H, D)."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return call


def chosen_backend(shape: AttentionShape, setting: Setting) -> str:
    """The backend that PyTorch reports for `scaled_dot_product_attention` on a shape."""
    sizes = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    q, k, v = (torch.empty(sizes, dtype=setting.dtype, device=setting.device).transpose(1, 2) for _ in range(3))
    q.requires_grad_(setting.direction != "fwd")
    try:
        from torch.nn.attention import SDPBackend

        return SDPBackend(torch._fused_sdp_choice(q, k, v)).name.lower()  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return "unknown"


@peer("attention", "sdpa", note="the backend that PyTorch chooses")
def sdpa(setting: Setting) -> Contender:
    assert isinstance(setting.shape, AttentionShape)
    ran = chosen_backend(setting.shape, setting)
    return Contender(heads_first(F.scaled_dot_product_attention), note=f"SDPA ran {ran}")


def pinned(call: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """`call` with one backend of SDPA. To compile it, compile the result: caches of compiled code know no settings."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def with_the_backend(**arguments: Any) -> Any:
        with sdpa_kernel(chosen):
            return call(**arguments)

    return with_the_backend


def has_kernel(call: Callable[..., Any], backend: str, inputs: Mapping[str, Any]) -> Contender:
    """`call`, which is pinned to the backend. Raises Unsupported if PyTorch has no kernel of it for these inputs."""
    try:
        with torch.no_grad():
            call(**inputs)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            raise Unsupported(f"PyTorch has no {backend.lower()} kernel for this call") from error
        raise
    return Contender(call, note=f"SDPA ran {backend.lower()}")


def _pinned(backend: str) -> Callable[[Setting], Contender]:
    def load(setting: Setting) -> Contender:
        call = pinned(heads_first(F.scaled_dot_product_attention), backend)
        return has_kernel(call, backend, setting.inputs().tensors)

    return load


for _name, _backend in (
    ("math", "MATH"),
    ("flash", "FLASH_ATTENTION"),
    ("cudnn", "CUDNN_ATTENTION"),
    ("efficient", "EFFICIENT_ATTENTION"),
):
    # Flash also exists on the CPU; cuDNN and memory-efficient attention need CUDA.
    peer("attention", f"sdpa:{_name}", cuda=_name in ("cudnn", "efficient"))(_pinned(_backend))


@peer("attention", "flex", cuda=True, note="FlexAttention, compiled")
def flex(setting: Setting) -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    return heads_first(compiled(flex_attention, "compile"))


@peer(
    "attention",
    "flash_attn_2",
    package="flash-attn",
    install="FLASH_ATTN_CUDA_ARCHS=90 MAX_JOBS=16 pip install flash-attn --no-build-isolation",
    cuda=True,
    dtypes=("fp16", "bf16"),
)
def flash_attention_2(setting: Setting) -> Attention:
    from flash_attn.flash_attn_interface import flash_attn_func  # flash-attn-4 shares the name flash_attn

    return flash_attn_func


@peer("attention", "flash_attn_3", package="fa3-fwd", cuda=True, dtypes=("bf16",), directions=("fwd",))
def flash_attention_3(setting: Setting) -> Attention:
    from fa3_fwd_interface import flash_attn_func

    return flash_attn_func


@peer(
    "attention",
    "flash_attn_4",
    package="flash-attn-4",
    install="pip install --pre flash-attn-4",
    cuda=True,
    dtypes=("fp16", "bf16"),
    note="CuTe DSL; compiles on its first call",
)
def flash_attention_4(setting: Setting) -> Attention:
    from flash_attn.cute import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v)[0]


Packed = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def _packed(function: Callable[..., Any]) -> Packed:
    """Adapts a function with boundaries and longest sequences of queries and of keys."""

    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        out: Tensor = function(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return out

    return call


@peer("packed_attention", "varlen_attn", cuda=True, dtypes=("fp16", "bf16"), note="PyTorch's, of FlashAttention")
def varlen_attention(setting: Setting) -> Packed:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unsupported(f"PyTorch {torch.__version__} has no varlen_attn") from error
    return _packed(varlen_attn)


@peer(
    "packed_attention",
    "flash_attn_2",
    package="flash-attn",
    install="FLASH_ATTN_CUDA_ARCHS=90 MAX_JOBS=16 pip install flash-attn --no-build-isolation",
    cuda=True,
    dtypes=("fp16", "bf16"),
)
def packed_flash_attention_2(setting: Setting) -> Packed:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    return _packed(flash_attn_varlen_func)


@peer("packed_attention", "flash_attn_3", package="fa3-fwd", cuda=True, dtypes=("bf16",), directions=("fwd",))
def packed_flash_attention_3(setting: Setting) -> Packed:
    from fa3_fwd_interface import flash_attn_varlen_func

    return _packed(flash_attn_varlen_func)


@peer("padded_attention", "sdpa", note="with a mask, as a padded batch in transformers")
def masked_sdpa(setting: Setting) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        valid = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
        return heads_first(functools.partial(F.scaled_dot_product_attention, attn_mask=valid[:, None, None]))(q, k, v)

    return call
