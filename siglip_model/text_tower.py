"""The text tower: a bidirectional transformer whose last position is the text's embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siglip_kernels.errors import unsupported
from siglip_model.config import SiglipTextConfig
from siglip_model.cuda_graphs import CapturedText
from siglip_model.encoder import Encoder, MaskArguments
from siglip_model.layers import LayerNorm, Linear, UsesBackend, is_plain, lecun_normal_
from siglip_model.outputs import BaseModelOutputWithPooling
from siglip_model.pretrained import PreTrainedModel, finish


class TextEmbeddings(nn.Module):
    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        tokens, positions = input_ids.shape[-1], self.position_embedding.weight
        if tokens > len(positions):
            raise ValueError(
                f"SiglipTextModel: input_ids has {tokens} tokens a text; supported: at most max_position_embeddings "
                f"= {len(positions)} (tokenize with truncation=True, max_length={len(positions)})"
            )
        if position_ids is None and is_plain(self.position_embedding, nn.Embedding):
            return self.token_embedding(input_ids) + positions[:tokens]
        if position_ids is None:
            position_ids = torch.arange(tokens, device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


class SiglipTextModel(UsesBackend, PreTrainedModel):
    """SigLIP's text encoder with its projection."""

    config_class = SiglipTextConfig
    base_model_prefix = "text_model"

    def __init__(self, config: SiglipTextConfig, **kwargs: str):
        super().__init__(config, **kwargs)
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = Linear(config.hidden_size, config.projection_size or config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.token_embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | MaskArguments | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode texts.

        input_ids: integers (B, L), L up to max_position_embeddings; SigLIP is trained with padding="max_length".
        attention_mask: (B, L), non-zero where a token may be attended to, or what the backend takes beyond that; or
        what the backend's `attention_mask` has made of it, so that a CUDA graph need not read it.
        position_ids: integers (B, L) or (1, L), 0 … L - 1 unless given.
        Raises ValueError for ids that are missing, too long or not integers.
        """
        if input_ids is None:
            raise ValueError("SiglipTextModel: input_ids is None; supported: integers (batch, tokens)")
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool or input_ids.dim() < 1:
            raise unsupported(
                "SiglipTextModel",
                "input_ids",
                f"has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}",
                "integers (batch, tokens)",
            )
        x = self.embeddings(input_ids.view(-1, input_ids.shape[-1]), position_ids)  # [B, L, width]
        mask = self._mask(attention_mask, *x.shape[:2]) if isinstance(attention_mask, Tensor) else attention_mask or {}
        x, hidden_states, attentions = self.encoder(
            x,
            mask,
            self._default(output_hidden_states, "hidden_states"),
            self._default(output_attentions, "attentions"),
        )
        x = self.final_layer_norm(x)
        # The last position is the text's, padding or not: SigLIP is trained that way.
        return finish(BaseModelOutputWithPooling(x, self.head(x[:, -1]), hidden_states, attentions), self, return_dict)

    def _mask(self, attention_mask: Tensor, batch: int, tokens: int) -> MaskArguments:
        if attention_mask.dim() == 2:
            if attention_mask.shape not in ((batch, tokens), (1, tokens)):
                got = f"has shape {tuple(attention_mask.shape)}"
                raise unsupported("SiglipTextModel", "attention_mask", got, f"{(batch, tokens)}, that of input_ids")
            attention_mask = attention_mask.expand(batch, tokens)
        return self.ops.attention_mask(attention_mask)

    def capture(
        self, batch_size: int = 1, *, text_length: int | None = None, attention_mask: bool = False
    ) -> CapturedText:
        """Record the forward pass into a CUDA graph; returns what is called with input_ids. See SiglipModel."""
        return CapturedText(self, batch_size, text_length, attention_mask)

    def init_weights(self) -> None:
        super().init_weights()
        for embedding in (self.embeddings.token_embedding, self.embeddings.position_embedding):
            nn.init.normal_(embedding.weight, std=embedding.embedding_dim**-0.5)
        lecun_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)
