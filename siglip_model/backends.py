"""A backend is a set of operations. The model calls them and never asks which backend it has.

A further backend (a vendor's library) is one more `Backend` in BACKENDS; no module of the model changes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import siglip_kernels
from siglip_kernels import MissingBackendError, fp8, reference
from siglip_kernels.attention_pool import folded_attention_pool
from siglip_kernels.device import why_not, why_not_here
from siglip_kernels.errors import unsupported
from siglip_kernels.transforms import in_forward_mode
from siglip_model import onednn

Operation = Callable[..., Any]


def _nothing(*_: Any) -> None:
    """What a backend lacks that runs on every machine and device, and what it does to a model that it leaves alone."""


@dataclass(frozen=True)
class Backend:
    """The operations of SigLIP, which `siglip_kernels.reference` documents, and what the model has to know about them.

    attention_mask: converts the caller's mask, (B, S) or (B, 1 or H, S, S), into keyword arguments of `attention`, once
        per forward.
    pre_norm_attention: `pre_norm_qkv`, `attention` and `linear` as one operation, called instead of the three where
        nothing is between them, with the keyword arguments of `attention`; None: it has none. A backend that replaces
        `attention` replaces it as well, or sets it to None.
    returns_weights: whether output_attentions=True changes nothing in how attention is computed. Otherwise the
        reference computes it, with a warning.
    packs_on: types of devices on which `attention` takes sequences of different lengths without padding: q, k and v
        (1, T, H, D) with cu_seqlens, int32 (N + 1,), where each begins and the last ends, and max_seqlen, an int. What
        it returns for tokens beyond the last sequence is ignored. A backend that replaces `attention` takes these
        arguments and `lengths`, or sets it to ().
    masks_sync: whether masked attention makes the host wait for the GPU, which a CUDA graph cannot capture.
    lacks: what this machine lacks to run the backend, or None.
    why_not: why the backend cannot run on a device of this machine, or None.
    exports_to_onnx: whether ONNX can express its operations.
    trains: whether its operations have derivatives; a model in training mode refuses one without.
    prepare: what is done to a model that selects the backend.
    """

    name: str
    attention: Operation
    attention_mask: Callable[[Tensor], dict[str, Tensor]]
    linear: Operation
    mlp: Operation
    layer_norm: Operation
    pre_norm_qkv: Operation
    pre_norm_attention: Operation | None
    pre_norm_mlp: Operation
    attention_pool: Operation
    patch_embed: Operation
    sigmoid_loss: Operation
    returns_weights: bool
    masks_sync: bool
    lacks: Callable[[], str | None]
    why_not: Callable[[torch.device], str | None] = _nothing
    packs_on: tuple[str, ...] = ()
    exports_to_onnx: bool = True
    trains: bool = True
    prepare: Callable[[nn.Module], None] = _nothing

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        registered = BACKENDS.get(self.name) is self
        return (_registered, (self.name,)) if registered else super().__reduce_ex__(protocol)


def _dense_mask(attention_mask: Tensor) -> dict[str, Tensor]:
    """(B, S): non-zero marks a valid key. Four dimensions: bool, or floating point to be added to the scores."""
    if attention_mask.dim() == 2:
        return {"mask": attention_mask.bool()[:, None, None, :]}
    if attention_mask.dim() == 4 and (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
        return {"mask": attention_mask}
    raise unsupported(
        "attention",
        "attention_mask",
        f"has shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype}",
        "(batch, tokens), or four dimensions of bool or floating point",
    )


def _lengths(attention_mask: Tensor, name: str) -> dict[str, Tensor]:
    """Padding at the end of each sample, as the number of valid keys."""
    if attention_mask.dim() != 2:
        raise unsupported(
            name, "attention_mask", f"has {attention_mask.dim()} dimensions", "(batch, tokens) with padding at the end"
        )
    return {"lengths": _count_valid(attention_mask.bool(), name)}


# A custom operator, because checking that padding is at the end reads values and so waits for the device:
# torch.compile does not trace into it and leaves it out of its CUDA graphs.
@torch.library.custom_op("siglip_model::count_valid", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _count_valid(valid: Tensor, name: str) -> Tensor:
    """valid: bool (B, L). Returns int32 (B,)."""
    if valid.is_cuda and torch.cuda.is_current_stream_capturing():
        raise unsupported(
            name,
            "attention_mask",
            "would have to be read while a CUDA graph is captured",
            "model.capture(..., attention_mask=True), which reads it before each replay",
        )
    if not bool((valid[:, 1:] <= valid[:, :-1]).all()):
        raise unsupported(
            name,
            "attention_mask",
            "has valid tokens after padding",
            "padding at the end only; the backends eager and sdpa take any mask",
        )
    return valid.sum(-1, dtype=torch.int32)


@_count_valid.register_fake
def _(valid, name):
    return valid.new_empty(valid.shape[0], dtype=torch.int32)


@_count_valid.register_vmap
def _(info, in_dims, valid, name):
    valid = valid.movedim(in_dims[0], 0)
    return _count_valid(valid.flatten(0, 1), name).unflatten(0, valid.shape[:2]), 0


def _sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    if cu_seqlens is not None:
        return _sdpa_packed_attention(q[0], k[0], v[0], cu_seqlens, scale=scale, dropout=dropout)[None]
    if lengths is not None:
        valid = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
        mask = valid[:, None, None, :]
    if in_forward_mode():  # of which PyTorch's fused attention has no derivative
        return reference.attention(q, k, v, scale=scale, mask=mask, dropout=dropout)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)


def _sdpa_packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
    """Consecutive sequences of equal length together. q, k, v: (T, H, D)."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(cu_seqlens.diff().tolist())]
    sizes = [length * count for length, count in runs]
    sizes.append(len(q) - sum(sizes))  # tokens of no sequence, which give zeros
    outputs = [
        _sdpa_attention(*(part.unflatten(0, (count, length)) for part in parts), **options).flatten(0, 1)
        for (length, count), *parts in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=False)
    ]
    return torch.cat([*outputs, torch.zeros_like(q[: sizes[-1]])])


def _flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    if not q.is_cuda:
        raise MissingBackendError(
            f"flash_attention_2: the tensors are on {q.device}; flash-attn runs on CUDA only. "
            "Move the model (device_map='cuda') or choose backend='sdpa'."
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise unsupported(
            "flash_attention_2",
            "dtype",
            f"is {q.dtype}",
            "torch.float16 and torch.bfloat16: load with dtype=torch.float16 or run under torch.autocast",
        )
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if cu_seqlens is not None:
        starts, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
        packed = flash_attn_varlen_func(q[0], k[0], v[0], *starts, *longest, dropout_p=dropout, softmax_scale=scale)
        return packed[None]
    if lengths is None:
        return flash_attn_func(q, k, v, dropout_p=dropout, softmax_scale=scale)
    valid = torch.arange(k.shape[1], device=k.device) < lengths[:, None]  # [B, Sk]
    key_starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    query_starts = torch.arange(0, (q.shape[0] + 1) * q.shape[1], q.shape[1], dtype=torch.int32, device=q.device)
    out = flash_attn_varlen_func(
        q.flatten(0, 1),
        k[valid],
        v[valid],
        query_starts,
        key_starts,
        q.shape[1],
        int(lengths.max()),
        dropout_p=dropout,
        softmax_scale=scale,
    )
    return out.view_as(q)


def _triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    if dropout:
        raise unsupported("triton", "attention_dropout", f"is {dropout}", "0 in training; eager and sdpa take any")
    if cu_seqlens is not None:
        packed = siglip_kernels.attention(q[0], k[0], v[0], scale=scale, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return packed[None]
    return siglip_kernels.attention(q, k, v, scale=scale, lengths=lengths)


def _of_packed_batches(operation: Operation) -> Operation:
    """The operation on tokens (T, width) as one on (1, T, width)."""

    def pre_norm_attention(x: Tensor, *parameters: Any, cu_seqlens: Tensor | None = None, **mask: Any) -> Tensor:
        if cu_seqlens is None:
            return operation(x, *parameters, **mask)
        return operation(x[0], *parameters, cu_seqlens=cu_seqlens, **mask)[None]

    return pre_norm_attention


def _lacks_flash() -> str | None:
    lacks = []
    # By the distribution's name: FlashAttention-4 also installs a module flash_attn, without the functions called here.
    if not any(importlib.metadata.distributions(name="flash-attn")):
        lacks.append("the package flash-attn is not installed (pip install flash-attn --no-build-isolation)")
    if not torch.cuda.is_available():
        lacks.append("there is no CUDA device")
    return " and ".join(lacks) or None


def _triton_refuses(device: torch.device, why_not: Callable[[torch.device], str | None] = why_not) -> str | None:
    """A model on the CPU may be moved to a GPU later, one on the meta device is loaded elsewhere."""
    return None if device.type in ("cpu", "meta") else why_not(device)


def _report_what_is_quantised(model: nn.Module) -> None:
    from siglip_model.fp8 import announce

    announce(model)


EAGER = Backend(
    name="eager",
    attention=reference.attention,
    attention_mask=_dense_mask,
    linear=reference.linear,
    mlp=reference.mlp,
    layer_norm=reference.layer_norm,
    pre_norm_qkv=reference.pre_norm_qkv,
    pre_norm_attention=None,
    pre_norm_mlp=reference.pre_norm_mlp,
    attention_pool=reference.attention_pool,
    patch_embed=reference.patch_embed,
    sigmoid_loss=siglip_kernels.plain_sigmoid_loss,
    returns_weights=True,
    masks_sync=False,
    lacks=_nothing,
)
SDPA = replace(
    EAGER,
    name="sdpa",
    attention=_sdpa_attention,
    linear=onednn.linear,
    mlp=onednn.mlp,
    pre_norm_qkv=onednn.pre_norm_qkv,
    pre_norm_mlp=onednn.pre_norm_mlp,
    attention_pool=folded_attention_pool,
    returns_weights=False,
    packs_on=("cpu",),
)
FLASH = replace(
    SDPA,
    name="flash_attention_2",
    attention=_flash_attention,
    attention_mask=functools.partial(_lengths, name="flash_attention_2"),
    masks_sync=True,
    lacks=_lacks_flash,
    packs_on=("cuda",),
    exports_to_onnx=False,
)
TRITON = Backend(
    name="triton",
    attention=_triton_attention,
    attention_mask=functools.partial(_lengths, name="triton"),
    linear=siglip_kernels.linear,
    mlp=siglip_kernels.mlp,
    layer_norm=siglip_kernels.layer_norm,
    pre_norm_qkv=siglip_kernels.pre_norm_qkv,
    pre_norm_attention=_of_packed_batches(siglip_kernels.pre_norm_attention),
    pre_norm_mlp=siglip_kernels.pre_norm_mlp,
    attention_pool=siglip_kernels.attention_pool,
    patch_embed=siglip_kernels.patch_embed,
    sigmoid_loss=siglip_kernels.sigmoid_loss,
    returns_weights=False,
    masks_sync=False,
    lacks=why_not_here,
    why_not=_triton_refuses,
    packs_on=("cuda", "cpu"),
    exports_to_onnx=False,
)
TRITON_FP8 = replace(
    TRITON,
    name="triton_fp8",
    attention_mask=functools.partial(_lengths, name="triton_fp8"),
    mlp=fp8.mlp,
    pre_norm_qkv=fp8.pre_norm_qkv,
    pre_norm_attention=_of_packed_batches(fp8.pre_norm_attention),
    pre_norm_mlp=fp8.pre_norm_mlp,
    lacks=fp8.why_not_here,
    why_not=functools.partial(_triton_refuses, why_not=fp8.why_not),
    trains=False,
    prepare=_report_what_is_quantised,
)
BACKENDS = {backend.name: backend for backend in (EAGER, SDPA, FLASH, TRITON, TRITON_FP8)}


def _registered(name: str) -> Backend:
    """The backend of an unpickled model, which computes with the operations of this process."""
    if name not in BACKENDS:
        raise ValueError(f"the pickled model has the backend {name!r}; supported: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def availability() -> dict[str, str | None]:
    """For each backend: None if this machine can run it, else what is missing."""
    return {name: backend.lacks() for name, backend in BACKENDS.items()}


def resolve(name: str, device: torch.device) -> Backend:
    """The backend with that name; "auto" is triton if `device` is a GPU that runs the kernels, and sdpa elsewhere.

    device: the model's; a machine may have GPUs that run the kernels beside others. Raises ValueError for an unknown
    name and MissingBackendError if the machine or the device lacks what the backend needs: an explicit backend never
    falls back.
    """
    if name == "auto":
        return TRITON if device.type == "cuda" and why_not(device) is None else SDPA
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; supported: {', '.join(BACKENDS)}, auto")
    backend = BACKENDS[name]
    lacking = backend.lacks() or backend.why_not(device)
    if lacking is not None:
        raise MissingBackendError(
            f"backend {name!r} cannot run here: {lacking}. Choose backend (--backend) 'sdpa' or 'auto'."
        )
    return backend
