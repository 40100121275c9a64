"""The transformer that both towers share: pre-norm blocks, bidirectional attention."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from siglip_kernels import reference
from siglip_kernels.errors import unsupported
from siglip_kernels.fusable import is_fusable
from siglip_model.backends import Backend
from siglip_model.config import SiglipTextConfig, SiglipVisionConfig
from siglip_model.layers import MLP, UsesBackend, add_pre_norm_mlp, apply_layer_norm, apply_linear, weights_of
from siglip_model.outputs import BaseModelOutput

logger = logging.getLogger(__name__)

MaskArguments = dict[str, Any]  # keyword arguments of the backend's attention
Projected = tuple[Tensor, Tensor, Tensor]  # q, k and v, each [B, S, H, D]
HiddenStates = bool | int | Sequence[int]  # which of them an output has: all, none, or those of these indices


class AttentionWeights:
    """The weights of each layer so far. Not a list, which wrappers of layers copy with the other arguments."""

    def __init__(self) -> None:
        self.by_layer: list[Any] = []


def mask_arguments(ops: Backend, attention_mask: Tensor | MaskArguments | None) -> MaskArguments:
    """Keyword arguments of `ops.attention`, from a mask that may be converted already."""
    if isinstance(attention_mask, Tensor):
        return ops.attention_mask(attention_mask)
    return attention_mask or {}


@functools.cache
def _warn_once_about_reference_attention(backend: str) -> None:
    logger.warning(
        "The %s backend keeps no attention weights: with output_attentions=True attention is computed by the "
        "reference (eager) path.",
        backend,
    )


class Attention(UsesBackend, nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017) with its output projection and residual."""

    def __init__(self, config: SiglipTextConfig | SiglipVisionConfig):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        if width % self.num_heads:
            raise ValueError(
                f"{type(config).__name__}: hidden_size {width} is not divisible by num_attention_heads {self.num_heads}"
            )
        self.config = config
        self.embed_dim, self.head_dim = width, width // self.num_heads
        self.scale = self.head_dim**-0.5
        self.is_causal = False
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | MaskArguments | None = None,
        return_weights: bool = False,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: (B, S, width), normalised. attention_mask: see `EncoderLayer`.

        Returns (B, S, width) and, with return_weights, the weights (B, H, S, S).
        """
        x, heads = hidden_states, (self.num_heads, -1)
        q = apply_linear(self.ops, self.q_proj, x).unflatten(-1, heads)
        k = apply_linear(self.ops, self.k_proj, x).unflatten(-1, heads)
        v = apply_linear(self.ops, self.v_proj, x).unflatten(-1, heads)
        return self.attend((q, k, v), mask_arguments(self.ops, attention_mask), return_weights, residual)

    def attend(
        self, projected: Projected, mask: MaskArguments, return_weights: bool, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The part of `forward` after the projections."""
        q, k, v = projected
        if self.drops_weights():
            mask = {**mask, "dropout": self.dropout}
        weights = None
        if return_weights:
            if not self.ops.returns_weights and not torch.compiler.is_compiling():  # which cannot trace logging
                _warn_once_about_reference_attention(self.ops.name)
            out, weights = reference.attention_with_weights(q, k, v, **mask)
        else:
            out = self.ops.attention(q, k, v, **mask)
        return apply_linear(self.ops, self.out_proj, out.flatten(-2), residual), weights

    def drops_weights(self) -> bool:
        """Whether dropout is applied to the attention weights."""
        return bool(self.training and self.dropout)

    def has_fusable_weights(self) -> bool:
        """Whether a backend may compute queries, keys and values from their weights, as one operation."""
        return all(is_fusable(projection, nn.Linear) for projection in (self.q_proj, self.k_proj, self.v_proj))

    def init_weights(self) -> None:
        for layer in (self.k_proj, self.v_proj, self.q_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class EncoderLayer(UsesBackend, nn.Module):
    """Two halves, each LayerNorm, attention or MLP, and residual; each is one operation where the backend has it."""

    def __init__(self, config: SiglipTextConfig | SiglipVisionConfig):
        super().__init__()
        self.embed_dim = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | MaskArguments | None = None,
        weights: AttentionWeights | None = None,
    ) -> Tensor:
        """hidden_states: (B, S, width). Returns the same shape.

        attention_mask: what the backend's `attention_mask` takes or returns, such as (B, S), non-zero for valid keys.
        weights: receives the attention weights (B, H, S, S) if it is given.
        """
        mask = mask_arguments(self.ops, attention_mask)
        x, layer_weights = self._add_attention(hidden_states, mask, weights is not None)
        if weights is not None:
            weights.by_layer.append(layer_weights)
        return add_pre_norm_mlp(self.ops, self.layer_norm2, self.mlp, x)

    def _add_attention(self, x: Tensor, mask: MaskArguments, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        norm, attention = self.layer_norm1, self.self_attn
        if not is_fusable(attention, Attention):
            # No more than transformers passes, for a forward that was patched in with its signature.
            asked = {"return_weights": True} if return_weights else {}
            out, weights = attention(apply_layer_norm(self.ops, norm, x), mask or None, **asked)
            return x + out, weights
        if not (attention.ops is self.ops and attention.has_fusable_weights() and is_fusable(norm, nn.LayerNorm)):
            return attention(apply_layer_norm(self.ops, norm, x), mask, return_weights, residual=x)
        q, k, v, out = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
        parameters = (norm.weight, norm.bias, norm.eps, q.weight, q.bias, k.weight, k.bias, v.weight, v.bias)
        fused = self.ops.pre_norm_attention
        if fused is None or return_weights or attention.drops_weights() or not is_fusable(out, nn.Linear):
            projected = self.ops.pre_norm_qkv(x, *parameters, attention.num_heads)
            return attention.attend(projected, mask, return_weights, residual=x)
        return fused(x, *parameters, out.weight, out.bias, attention.num_heads, **mask), None

    def init_weights(self) -> None:
        self.layer_norm1.reset_parameters()
        self.layer_norm2.reset_parameters()


class Encoder(nn.Module):
    """The layers, with activation checkpointing."""

    def __init__(self, config: SiglipTextConfig | SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.checkpointing: dict[str, Any] | None = None  # arguments of `checkpoint`
        self.checkpointed_every = 1  # layers

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | MaskArguments | None = None,
        output_hidden_states: HiddenStates = False,
        output_attentions: bool = False,
    ) -> BaseModelOutput:
        """inputs_embeds: (B, S, width). attention_mask: see `EncoderLayer`.

        output_hidden_states: True for the embeddings and each layer's output, or the indices of those to return; the
        others are None then, as in transformers. Negative indices count from the last one.
        Returns the last hidden state and, if asked for, layers + 1 hidden states and the attention weights per layer.
        """
        kept = _kept(output_hidden_states, len(self.layers) + 1)
        x = inputs_embeds
        checkpointing = self.checkpointing if self.training else None
        if checkpointing is not None and checkpointing.get("use_reentrant") and self._is_trained_alone(x):
            x = x.detach().requires_grad_()  # reentrant checkpoints give no gradients if their input needs none
        hidden_states = [x if 0 in kept else None]
        weights = AttentionWeights() if output_attentions else None
        if not isinstance(attention_mask, Tensor):
            attention_mask = attention_mask or None
        # No more than transformers passes, for a forward that was patched in with its signature.
        arguments = (attention_mask,) if weights is None else (attention_mask, weights)
        for number, layer in enumerate(self.layers):
            if checkpointing is not None and number % self.checkpointed_every == 0:
                x = checkpoint(layer, x, *arguments, **checkpointing)
            else:
                x = layer(x, *arguments)
            hidden_states.append(x if number + 1 in kept else None)
        return BaseModelOutput(
            x,
            tuple(hidden_states) if output_hidden_states else None,
            None if weights is None else tuple(weights.by_layer),
        )

    def _is_trained_alone(self, x: Tensor) -> bool:
        """Whether the layers need gradients and their input does not, as with adapters and frozen embeddings."""
        trains = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # where no checkpoint is reentrant
        return trains and not x.requires_grad and any(weight.requires_grad for weight in weights_of(self))


def _kept(asked: HiddenStates, number: int) -> Sequence[int]:
    """The indices of the hidden states to return, of so many. Those out of range select none, as in transformers."""
    if isinstance(asked, bool) or asked is None:
        return range(number) if asked else ()
    indices = (asked,) if isinstance(asked, int) else tuple(asked)
    if not all(isinstance(index, int) for index in indices):
        raise unsupported("SigLIP", "output_hidden_states", f"is {asked!r}", "True, False, an index or a list of them")
    return [index % number for index in indices if -number <= index < number]
