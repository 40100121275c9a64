"""The transformer that both towers share: pre-norm blocks, bidirectional attention."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from siglip_kernels import reference
from siglip_model.config import SiglipTextConfig, SiglipVisionConfig
from siglip_model.layers import MLP, LayerNorm, Linear, UsesBackend

logger = logging.getLogger(__name__)

MaskArguments = dict[str, Any]  # keyword arguments of the backend's attention


@functools.cache
def _say_once_that_weights_are_eager(backend: str) -> None:
    logger.warning(
        "The %s backend keeps no attention weights: with output_attentions=True attention is computed by the "
        "reference (eager) path.",
        backend,
    )


class Attention(UsesBackend, nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017) with its output projection and residual."""

    def __init__(self, config: SiglipTextConfig | SiglipVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.q_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(
        self, x: Tensor, residual: Tensor, mask: MaskArguments, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        heads = (self.num_heads, -1)
        q = self.q_proj(x).unflatten(-1, heads)  # [B, S, H, D]
        k = self.k_proj(x).unflatten(-1, heads)
        v = self.v_proj(x).unflatten(-1, heads)
        if self.training and self.dropout:
            mask = {**mask, "dropout": self.dropout}
        weights = None
        if return_weights:
            if self.ops.name != "eager":
                _say_once_that_weights_are_eager(self.ops.name)
            out, weights = reference.attention_with_weights(q, k, v, **mask)
        else:
            out = self.ops.attention(q, k, v, **mask)
        return self.out_proj(out.flatten(-2), residual), weights

    def init_weights(self) -> None:
        for layer in (self.k_proj, self.v_proj, self.q_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class EncoderLayer(nn.Module):
    def __init__(self, config: SiglipTextConfig | SiglipVisionConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, mask: MaskArguments, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        x, weights = self.self_attn(self.layer_norm1(x), x, mask, return_weights)
        return self.mlp(self.layer_norm2(x), x), weights


class Encoder(nn.Module):
    def __init__(self, config: SiglipTextConfig | SiglipVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self, x: Tensor, mask: MaskArguments, output_hidden_states: bool, output_attentions: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """x: (B, S, width). Returns the last hidden state, all of them (layers + 1), each layer's attention weights."""
        hidden_states = [x]
        attentions = []
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x, weights = checkpoint(layer, x, mask, output_attentions, use_reentrant=False)
            else:
                x, weights = layer(x, mask, output_attentions)
            hidden_states.append(x)
            attentions.append(weights)
        return (
            x,
            tuple(hidden_states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )
