"""The text tower: a bidirectional transformer whose last position is the text's embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siglip_kernels.errors import unsupported
from siglip_kernels.fusable import is_fusable
from siglip_model.capture import CapturedText
from siglip_model.config import SiglipTextConfig
from siglip_model.encoder import Encoder, HiddenStates, MaskArguments
from siglip_model.layers import UsesBackend, apply_layer_norm, apply_linear, lecun_normal_
from siglip_model.outputs import BaseModelOutputWithPooling
from siglip_model.pretrained import PreTrainedModel, finish


class TextEmbeddings(nn.Module):
    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    @property
    def position_ids(self) -> Tensor:
        """int64 (1, max_position_embeddings)."""
        weight = self.position_embedding.weight
        return torch.arange(len(weight), device=weight.device)[None]

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """input_ids: integers (B, L). inputs_embeds: (B, L, width), instead of the tokens' embeddings.

        Returns (B, L, width), with the embeddings of the positions.
        """
        if inputs_embeds is None and input_ids is None:
            raise unsupported("SiglipTextModel", "input_ids", "is None, as is inputs_embeds", "one of both")
        source: Tensor = input_ids if inputs_embeds is None else inputs_embeds  # type: ignore[assignment]
        tokens, positions = source.shape[1 if source is inputs_embeds else -1], self.position_embedding.weight
        if tokens > len(positions):
            raise ValueError(
                f"SiglipTextModel: input_ids has {tokens} tokens per text; supported: at most max_position_embeddings "
                f"= {len(positions)} (tokenize with truncation=True, max_length={len(positions)})"
            )
        x = inputs_embeds
        if x is None:
            x = _looked_up(self.token_embedding, source, "input_ids")
        if position_ids is None and is_fusable(self.position_embedding, nn.Embedding):
            return x + positions[:tokens]
        if position_ids is None:
            position_ids = self.position_ids[:, :tokens]
        return x + _looked_up(self.position_embedding, position_ids, "position_ids")


def _looked_up(embedding: nn.Module, ids: Tensor, name: str) -> Tensor:
    try:
        return embedding(ids)
    except IndexError as error:  # on the CPU; a GPU fails with a device-side assertion, and a check would synchronise
        got = f"goes from {ids.min()} to {ids.max()}"
        raise unsupported("SiglipTextModel", name, got, f"0 to {len(embedding.weight) - 1}") from error  # type: ignore[arg-type]


def _check_ids(name: str, ids: Tensor | None) -> None:
    """Raises ValueError for ids that an embedding does not support."""
    if not isinstance(ids, Tensor):
        got = "is None" if ids is None else f"is {type(ids).__name__}"
    elif ids.dtype not in (torch.int64, torch.int32) or ids.dim() < 1 or ids.shape[-1] < 1:
        got = f"has shape {tuple(ids.shape)} and dtype {ids.dtype}"
    else:
        return
    raise unsupported("SiglipTextModel", name, got, "integers (int64, int32) of (batch, tokens), at least one token")


class SiglipTextModel(UsesBackend, PreTrainedModel):
    """SigLIP's text encoder with the projection to the shared space."""

    config_class = SiglipTextConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)

    def __init__(self, config: SiglipTextConfig, **kwargs: str):
        super().__init__(config, **kwargs)
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.projection_size or config.hidden_size)
        self.post_init()

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    def _input_embeddings(self) -> tuple[nn.Module, str]:
        return self.embeddings, "token_embedding"

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """See `PreTrainedModel`; the ids of transformers."""
        return {"input_ids": torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]], device=self.device)}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | MaskArguments | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode texts.

        input_ids: integers (B, L), L up to max_position_embeddings; SigLIP is trained with padding="max_length".
        attention_mask: (B, L), non-zero where a token may be attended to; eager and sdpa also support four dimensions.
            Or the keyword arguments that the backend's `attention_mask` returned, which a CUDA graph reads.
        position_ids: integers (B, L) or (1, L); by default 0 … L - 1.
        output_hidden_states: all of them, or those of the given indices, see `Encoder`.
        token_type_ids: ignored, as in transformers: some tokenizers return them.
        Raises ValueError for ids that are missing, too long, not integers or (on the CPU) out of range, and for masks
        and positions of other shapes.
        """
        self._check_backend()
        _check_ids("input_ids", input_ids)
        input_ids = input_ids.reshape(-1, input_ids.shape[-1])  # type: ignore[union-attr]
        batch, tokens = input_ids.shape
        if position_ids is not None:
            _check_ids("position_ids", position_ids)
            if position_ids.shape not in ((batch, tokens), (1, tokens), (tokens,)):
                got = f"has shape {tuple(position_ids.shape)}"
                raise unsupported("SiglipTextModel", "position_ids", got, f"{(batch, tokens)} or {(1, tokens)}")
        x = self.embeddings(input_ids, position_ids)  # [B, L, width]
        mask = self._mask(attention_mask, batch, tokens)
        encoded = self.encoder(
            x,
            mask,
            self._default(output_hidden_states, "hidden_states"),
            self._default(output_attentions, "attentions"),
        )
        x = apply_layer_norm(self.ops, self.final_layer_norm, encoded.last_hidden_state)
        # The last position is the text's embedding even if it is padding: SigLIP is trained that way.
        pooled = apply_linear(self.ops, self.head, x[:, -1])
        output = BaseModelOutputWithPooling(x, pooled, encoded.hidden_states, encoded.attentions)
        return finish(output, self, return_dict)

    def _mask(self, attention_mask: Tensor | MaskArguments | None, batch: int, tokens: int) -> MaskArguments:
        if attention_mask is None or isinstance(attention_mask, dict):
            return attention_mask or {}
        if not isinstance(attention_mask, Tensor):
            got = f"is {type(attention_mask).__name__}"
            raise unsupported("SiglipTextModel", "attention_mask", got, f"a tensor of shape {(batch, tokens)}")
        if attention_mask.dim() == 2:
            if attention_mask.shape not in ((batch, tokens), (1, tokens)):
                got = f"has shape {tuple(attention_mask.shape)}"
                raise unsupported("SiglipTextModel", "attention_mask", got, f"{(batch, tokens)}, that of input_ids")
            attention_mask = attention_mask.expand(batch, tokens)
        elif attention_mask.dim() == 4:
            scores = (batch, self.config.num_attention_heads, tokens, tokens)
            if any(size not in (1, full) for size, full in zip(attention_mask.shape, scores, strict=True)):
                got = f"has shape {tuple(attention_mask.shape)}"
                raise unsupported("SiglipTextModel", "attention_mask", got, f"what broadcasts to {scores}")
        return self.ops.attention_mask(attention_mask)

    def capture(
        self, batch_size: int = 1, *, text_length: int | None = None, attention_mask: bool = False
    ) -> CapturedText:
        """Record the forward pass into a CUDA graph, to be called with input_ids. See `SiglipModel.capture`."""
        return CapturedText(self, batch_size, text_length, attention_mask)

    def init_weights(self) -> None:
        super().init_weights()
        for embedding in (self.embeddings.token_embedding, self.embeddings.position_embedding):
            nn.init.normal_(embedding.weight, std=embedding.embedding_dim**-0.5)
        self.final_layer_norm.reset_parameters()
        lecun_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)
