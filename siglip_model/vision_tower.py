"""The vision tower: a ViT whose tokens are pooled by attention from one learned probe (the MAP head)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import Parameter

from siglip_kernels.errors import unsupported
from siglip_kernels.fusable import is_fusable
from siglip_model.capture import CapturedVision
from siglip_model.config import PretrainedConfig, SiglipVisionConfig
from siglip_model.encoder import Encoder, HiddenStates, MaskArguments
from siglip_model.layers import MLP, UsesBackend, add_pre_norm_mlp, apply_layer_norm, lecun_normal_
from siglip_model.outputs import BaseModelOutputWithPooling
from siglip_model.pretrained import PreTrainedModel, finish


class VisionEmbeddings(UsesBackend, nn.Module):
    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.embed_dim, self.image_size, self.patch_size = config.hidden_size, config.image_size, config.patch_size
        self.grid = config.image_size // config.patch_size
        self.num_patches = self.num_positions = self.grid**2
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(self.grid**2, config.hidden_size)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """pixel_values: floating point or uint8 (B, C, H, W). Returns (B, patches, width)."""
        weight = self.patch_embedding.weight
        has_pixels = pixel_values.is_floating_point() or pixel_values.dtype == torch.uint8
        if pixel_values.dim() != 4 or pixel_values.shape[1] != weight.shape[1] or not has_pixels:
            raise unsupported(
                "SiglipVisionModel",
                "pixel_values",
                f"has shape {tuple(pixel_values.shape)} and dtype {pixel_values.dtype}",
                f"floating point or uint8 (batch, {weight.shape[1]}, height, width)",
            )
        height, width = pixel_values.shape[-2:]
        rows, columns = height // self.patch_size, width // self.patch_size
        fits = interpolate_pos_encoding or rows * columns in (1, self.grid**2)
        if rows * columns == 0 or not fits:
            side = self.grid * self.patch_size
            raise ValueError(
                f"SiglipVisionModel: pixel_values are {height} × {width}, {rows * columns} patches; supported: "
                f"{self.grid**2} patches ({side} × {side}), or interpolate_pos_encoding=True for other sizes"
            )
        position = position_table(self.position_embedding)
        if interpolate_pos_encoding and not (rows * columns == len(position) and height == width):
            position = self._interpolated(position, rows, columns)
        pixel_values = pixel_values.to(weight.dtype)
        if not is_fusable(self.patch_embedding, nn.Conv2d):
            return self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + position
        return self.ops.patch_embed(pixel_values, weight, self.patch_embedding.bias, position)

    @property
    def position_ids(self) -> Tensor:
        """int64 (1, patches)."""
        return torch.arange(self.num_positions, device=self.position_embedding.weight.device)[None]

    def _interpolated(self, position: Tensor, rows: int, columns: int) -> Tensor:
        square = position.T.reshape(1, -1, self.grid, self.grid)  # [1, width, grid, grid]
        return F.interpolate(square, (rows, columns), mode="bicubic", align_corners=False).flatten(2).squeeze(0).T


def position_table(embedding: nn.Module) -> Tensor:
    """All position embeddings (positions, width), by calling a module that was replaced, wrapped or hooked."""
    weight: Any = embedding.weight
    if is_fusable(embedding, nn.Embedding):
        return weight
    return embedding(torch.arange(len(weight), device=weight.device)[None])[0]


class PoolingHead(UsesBackend, nn.Module):
    """Multi-head attention pooling ("Scaling Vision Transformers", Zhai et al., 2022)."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.probe = Parameter(torch.zeros(1, 1, width))
        # Holds the parameters under the names of checkpoints. The backend computes, unless the module is not fusable.
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, hidden_state: Tensor, lengths: Tensor | None = None) -> Tensor:
        """hidden_state: (B, S, width). lengths: (B,), how many tokens of each image are valid. Returns (B, width)."""
        pooled = self._pool(hidden_state, lengths)[:, None]  # [B, 1, width], as hooks see it in transformers
        return add_pre_norm_mlp(self.ops, self.layernorm, self.mlp, pooled)[:, 0]

    def _pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        attention = self.attention
        if not is_fusable(attention, nn.MultiheadAttention):
            padding: dict[str, Tensor] = {}
            if lengths is not None:
                padding["key_padding_mask"] = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            return attention(self.probe.expand(x.shape[0], -1, -1), x, x, **padding)[0].squeeze(1)
        weight, bias, out_proj = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj
        arguments = (x, self.probe, weight, bias)
        if is_fusable(out_proj, NonDynamicallyQuantizableLinear):
            return self.ops.attention_pool(*arguments, out_proj.weight, out_proj.bias, attention.num_heads, lengths)
        identity = torch.eye(len(self.probe[0, 0]), dtype=weight.dtype, device=weight.device)
        return out_proj(
            self.ops.attention_pool(*arguments, identity, torch.zeros_like(identity[0]), attention.num_heads, lengths)
        )

    def init_weights(self) -> None:
        nn.init.xavier_uniform_(self.probe)
        nn.init.xavier_uniform_(self.attention.in_proj_weight)
        nn.init.zeros_(self.attention.in_proj_bias)
        lecun_normal_(self.attention.out_proj.weight)
        nn.init.zeros_(self.attention.out_proj.bias)
        self.layernorm.reset_parameters()


class SiglipVisionModel(UsesBackend, PreTrainedModel):
    """SigLIP's image encoder, with its pooling head unless the configuration says otherwise."""

    config_class: ClassVar[type[PretrainedConfig]] = SiglipVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    embeddings_class: ClassVar[type[nn.Module]] = VisionEmbeddings

    def __init__(self, config: SiglipVisionConfig, **kwargs: str):
        super().__init__(config, **kwargs)
        self.embeddings: Any = self.embeddings_class(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = PoolingHead(config) if config.vision_use_head else None
        self.post_init()

    def _input_embeddings(self) -> tuple[nn.Module, str]:
        return self.embeddings, "patch_embedding"

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """See `PreTrainedModel`."""
        shape = (3, self.config.num_channels, self.config.image_size, self.config.image_size)
        return {"pixel_values": torch.zeros(shape, dtype=self.dtype, device=self.device)}

    def encode(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
    ) -> BaseModelOutputWithPooling:
        """The part of `forward` before the pooling head."""
        self._check_backend()
        if not isinstance(pixel_values, Tensor):
            got = "is None" if pixel_values is None else f"is {type(pixel_values).__name__}"
            raise unsupported("SiglipVisionModel", "pixel_values", got, "a tensor (batch, channels, height, width)")
        x = self.embeddings(pixel_values, interpolate_pos_encoding)  # [B, S, width]
        return self._encode_tokens(x, None, output_attentions, output_hidden_states)

    def _encode_tokens(
        self,
        x: Tensor,
        mask: MaskArguments | None,
        output_attentions: bool | None,
        output_hidden_states: HiddenStates | None,
    ) -> BaseModelOutputWithPooling:
        """The layers and the final LayerNorm. x: (B, S, width). mask: see `EncoderLayer`."""
        encoded = self.encoder(
            x,
            mask,
            self._default(output_hidden_states, "hidden_states"),
            self._default(output_attentions, "attentions"),
        )
        x = apply_layer_norm(self.ops, self.post_layernorm, encoded.last_hidden_state)
        return BaseModelOutputWithPooling(x, None, encoded.hidden_states, encoded.attentions)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode images.

        pixel_values: floating point or uint8 (B, C, H, W), cast to the weights' dtype.
        interpolate_pos_encoding: resample the position embedding (bicubic) for images of another size.
        output_hidden_states: all of them, or those of the given indices, see `Encoder`.
        Raises ValueError for another number of dimensions, of channels or (without interpolation) of patches.
        """
        output = self.encode(pixel_values, interpolate_pos_encoding, output_attentions, output_hidden_states)
        if self.head is not None:
            output.pooler_output = self.head(output.last_hidden_state)
        return finish(output, self, return_dict)

    def capture(self, batch_size: int = 1, *, image_size: int | tuple[int, int] | None = None) -> CapturedVision:
        """Record the forward pass into a CUDA graph, to be called with pixel_values. See `SiglipModel.capture`."""
        return CapturedVision(self, batch_size, image_size)

    def init_weights(self) -> None:
        super().init_weights()
        lecun_normal_(self.embeddings.patch_embedding.weight)
        nn.init.zeros_(self.embeddings.patch_embedding.bias)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=self.config.hidden_size**-0.5)
        self.post_layernorm.reset_parameters()
