"""SigLIP in transformers, computed by the kernels.

    from siglip_kernels.integrations import transformers as siglip_transformers

    report = siglip_transformers.accelerate(model)   # any model that contains a SigLIP or SigLIP 2 tower
    siglip_transformers.restore(model)

For attention alone, in any model: `register()`, then `attn_implementation="siglip_triton"`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from siglip_kernels.attention import flash_attn_varlen_func
from siglip_kernels.errors import MissingBackendError, unsupported
from siglip_kernels.integrations.blocks import LayerNorm
from siglip_kernels.integrations.key_padding import (
    KeyPadding,
    attend,
    can_read_values,
    from_valid_keys,
    read_key_padding,
)
from siglip_kernels.integrations.patching import (
    Accelerated,
    accelerate_modules,
    full_name,
    original_class,
    require_version,
    restore,
)
from siglip_kernels.integrations.report import Report
from siglip_kernels.integrations.transformers_modules import (
    LEFT,
    REPLACEMENTS,
    TOWERS,
    MaskedTower,
    has_backends,
    is_intact,
    recognised,
)
from siglip_kernels.integrations.verification import require_comparable
from siglip_kernels.integrations.verification import verify as compare

__all__ = ["accelerate", "register", "restore"]

NAME = "siglip_triton"
PACKING_NAME = "siglip_triton_flash"  # models that pack under FlashAttention look for "flash" in the name
_VERSIONS = ((4, 50), (6,))


def accelerate(model: nn.Module, verify: bool = False, fp8: bool = False) -> Report:
    """Compute the SigLIP and SigLIP 2 towers, and others of their form, anywhere in this model with the kernels.

    Attention, MLP, LayerNorm, MAP head, patch embedding and the loss of SiglipModel(return_loss=True) call the kernels;
    a language model beside the tower is not changed. Parameters, `state_dict`, `save_pretrained`, hooks, gradient
    checkpointing, PEFT before or after, torch.compile and DDP work as before; results differ only by rounding.
    transformers computes what the kernels cannot: tensors that are not on a GPU that runs the kernels, float64, dropout
    in training, transforms of torch.func (per-sample gradients among them), forward-mode differentiation,
    calls with output_attentions=True, masks other than padding or that hide a whole sample. So a model may be
    accelerated on the CPU and moved afterwards. A second call only returns a new report. FSDP2 makes its own
    subclasses: accelerate before `fully_shard`.

    Towers of other classes are recognised by their structure, by the source of their forward and by what it computes
    in a run on stand-ins (see `transformers_structure`): attention, MLP with GELU's tanh form, LayerNorm and the layers
    of them are replaced where their mathematics is SigLIP's. Rotary positions, layer scales, windows and packed
    sequences stay with transformers, and the report says so.

    verify: also compare each replaced module with transformers' own on random input, result and gradient, and put back
    those that differ.

    fp8: compute the projections and MLPs of the layers in fp8 (e4m3), for inference, as `siglip_kernels.fp8` does; the
    report names those that are left and counts the memory of the quantised weights. Gradients and training mode raise
    UnsupportedInputError, and so do fp32 parameters without torch.autocast. `verify` then compares these modules by
    the cosine of their results alone. A call without it takes fp8 out again.

    Returns a report of what was replaced and what was not, and why. `restore(model)` undoes it.
    Raises MissingBackendError, and changes nothing, if this version of transformers is not supported, Triton is not
    installed, no GPU of this machine runs the kernels (AMD's and those before compute capability 8.0 do not, and fp8
    needs 8.9), or `verify` is asked for where they do not run.
    """
    version = _require_version()
    towers = () if not isinstance(model, nn.Module) else tuple(_paths_of_towers(model))
    others = {} if not isinstance(model, nn.Module) else recognised(model)

    def replacement(path: str, module: nn.Module) -> type[Accelerated] | str | None:
        kind = original_class(module)
        name = full_name(kind)
        if name in REPLACEMENTS:
            if not is_intact(kind):
                return f"the forward of its class was replaced by one of {kind.forward.__module__}"
            wrapper = REPLACEMENTS[name] is MaskedTower and not hasattr(module, "encoder")  # in transformers 4
            return None if wrapper else REPLACEMENTS[name]
        if name in LEFT:
            return LEFT[name]
        known = [full_name(base) for base in kind.__mro__ if full_name(base) in REPLACEMENTS]
        if known:
            return f"{name} is a subclass of {known[0]} with its own code"
        in_tower = any(path == tower or not tower or path.startswith(f"{tower}.") for tower in towers)
        return LayerNorm if in_tower and kind is nn.LayerNorm else others.get(path)

    empty = "no encoder of SigLIP's form is in it"
    if isinstance(model, nn.Module) and any(map(has_backends, model.modules())):
        empty = "siglip_model's own models have the kernels as a backend: model.set_backend('triton')"
    if verify and isinstance(model, nn.Module):
        require_comparable(model, fp8)
    report = accelerate_modules(model, f"transformers {version}", replacement, empty, fp8)
    return compare(model, report) if verify else report


def _paths_of_towers(model: nn.Module) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if any(full_name(base) in TOWERS for base in original_class(module).__mro__)
    ]


def _require_version() -> str:
    return require_version("transformers", "transformers", *_VERSIONS)


def register() -> None:
    """Register attn_implementation="siglip_triton" with transformers, for every model with selectable attention.

    It computes bidirectional attention, with or without a padding mask, or over packed sequences (cu_seq_lens_q,
    cu_seq_lens_k). Causal attention, sliding windows, soft caps, sinks, biases, dropout and other masks raise an error
    that names them. For the tower of a vision-language model alone pass
    attn_implementation={"vision_config": "siglip_triton"}.

    Towers such as Qwen2-VL's pack their images for FlashAttention, by its name, and call others once per image. For
    them the same attention is also registered as "siglip_triton_flash". transformers looks on the Hub for a name like
    that while it loads a model, so set it afterwards: `tower.config._attn_implementation = "siglip_triton_flash"`.

    Raises MissingBackendError for a version of transformers without the mask interface (before 4.53).
    """
    _require_version()
    try:
        from transformers import AttentionMaskInterface
    except ImportError as error:
        message = f"register: transformers {transformers.__version__} has no AttentionMaskInterface; 4.53 is the first"
        raise MissingBackendError(message) from error
    for name in (NAME, PACKING_NAME):
        transformers.AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, padding_mask)


# Unsupported arguments that change attention's result, under transformers' names.
_UNSUPPORTED = (
    "sliding_window",
    "softcap",
    "s_aux",
    "position_bias",
    "attention_bias",
    "head_mask",
    "layer_head_mask",
    "cache",
    "block_table",
    "block_indices",
    "indices",
    "sinks",
    "output_attentions",
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query, key, value: (B, H, S, D). Returns (B, S, H, D), and no weights.

    attention_mask: what `padding_mask` returned, or a mask that marks valid keys (see `key_padding`).
    cu_seq_lens_q, cu_seq_lens_k: the boundaries of sequences that are packed into B · S tokens, without a mask;
    max_length_q, max_length_k: their longest.
    With grouped queries, keys and values are repeated. Raises UnsupportedInputError for what the kernels lack.
    """
    kind = type(module).__name__
    if dropout:
        raise unsupported(NAME, "dropout", f"is {dropout} in {kind}", "0: set the config's attention_dropout to 0")
    for name in _UNSUPPORTED:
        given = arguments.get(name)
        if given is not None and given is not False:
            raise unsupported(NAME, name, f"is given by {kind}", "attention without it; use 'sdpa' or 'eager'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and attention_mask is None and query.shape[2] > 1:
        raise unsupported(NAME, "is_causal", f"is True in {kind}", _BIDIRECTIONAL)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    projected = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if arguments.get("cu_seq_lens_q") is not None or arguments.get("cu_seq_lens_k") is not None:
        if attention_mask is not None:
            raise unsupported(NAME, "attention_mask", f"is given with cu_seq_lens_q by {kind}", "one of them")
        return _attend_packed(projected, scaling, arguments), None
    padding = read_key_padding(getattr(attention_mask, _READ, attention_mask), key.shape[0], key.shape[2])
    if not (padding is None or isinstance(padding, KeyPadding)):
        got = f"of {kind} is not a padding mask ({_shown(attention_mask)})"
        raise unsupported(NAME, "attention_mask", got, "(batch, keys), the same for all queries; use 'sdpa' or 'eager'")
    return attend(projected, scaling, padding), None


def _attend_packed(projected: tuple[Tensor, Tensor, Tensor], scale: float | None, arguments: dict[str, Any]) -> Tensor:
    """Attention over packed sequences. projected: q, k and v, each (B, S, H, D), whose B · S tokens they are."""
    q, k, v = (tensor.flatten(0, 1) for tensor in projected)
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        arguments.get("cu_seq_lens_q"),  # type: ignore[arg-type]
        arguments.get("cu_seq_lens_k"),  # type: ignore[arg-type]
        arguments.get("max_length_q"),
        arguments.get("max_length_k"),
        softmax_scale=scale,
    )
    return out.view(projected[0].shape)


_BIDIRECTIONAL = (
    "bidirectional attention; for the tower of a vision-language model alone pass "
    f'attn_implementation={{"vision_config": "{NAME}"}}'
)
_READ = "_siglip_key_padding"  # attribute of the masks from `padding_mask`, which are read once for all layers


def _shown(mask: Any) -> str:
    return f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__


def padding_mask(
    *,
    kv_length: int,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    kv_offset: int = 0,
    **arguments: Any,
) -> Tensor | None:
    """transformers' mask interface. Returns bool (B, 1, 1, K), True where a key is valid, or None if all are.

    attention_mask: (B, K), non-zero where valid. Raises UnsupportedInputError for masks that are not bidirectional.
    """
    if getattr(mask_function, "__name__", "") != "bidirectional_mask_function":
        raise unsupported(NAME, "mask_function", f"is {_name_of_mask(mask_function)}", _BIDIRECTIONAL)
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise unsupported(NAME, "attention_mask", f"has {attention_mask.dim()} dimensions", "2: (batch, keys)")
    valid = attention_mask != 0
    missing = kv_length + kv_offset - valid.shape[-1]
    if missing > 0:
        valid = F.pad(valid, (0, missing))
    valid = valid[:, kv_offset : kv_offset + kv_length]
    mask = valid[:, None, None]
    if can_read_values(valid):
        if bool(valid.all()):
            return None
        setattr(mask, _READ, from_valid_keys(valid, mask))
    return mask


def _name_of_mask(function: Any) -> str:
    """With what transformers composed: and_masks(sliding_window_bidirectional_overlay, bidirectional_mask_function)."""
    name = getattr(function, "__qualname__", type(function).__name__).split(".<locals>")[0]
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    parts = [_name_of_mask(part) for value in held if isinstance(value, tuple) for part in value if callable(part)]
    return f"{name}({', '.join(parts)})" if parts else name
