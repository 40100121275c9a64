"""SigLIP 2's models at native resolution: SigLIP's, with another form of images and a vision tower that reads it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from siglip_kernels.errors import unsupported
from siglip_model.classifier import SiglipForImageClassification
from siglip_model.config import Siglip2Config, Siglip2TextConfig, Siglip2VisionConfig
from siglip_model.encoder import HiddenStates
from siglip_model.model import SiglipModel
from siglip_model.naflex.embeddings import NaFlexEmbeddings, check_patches
from siglip_model.naflex.layout import layout
from siglip_model.outputs import BaseModelOutputWithPooling, ImageClassifierOutput, Siglip2Output
from siglip_model.pretrained import finish
from siglip_model.text_tower import SiglipTextModel
from siglip_model.vision_tower import SiglipVisionModel


class _NaFlex:
    """What the models of patches have in common."""

    def capture(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raises ValueError: CUDA graphs of images have one shape."""
        raise unsupported(type(self).__name__, "capture", "is called", "models of images of one size, or torch.compile")


class Siglip2TextModel(SiglipTextModel):
    """SigLIP 2's text encoder, which is SigLIP's."""

    config_class = Siglip2TextConfig


class Siglip2VisionModel(_NaFlex, SiglipVisionModel):
    """SigLIP 2's image encoder at native resolution."""

    config_class = Siglip2VisionConfig
    embeddings_class = NaFlexEmbeddings

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """See `PreTrainedModel`; square images."""
        config = self.config
        patches = (3, config.num_patches, config.num_channels * config.patch_size**2)
        return {
            "pixel_values": torch.zeros(patches, dtype=self.dtype, device=self.device),
            "spatial_shapes": torch.full((3, 2), math.isqrt(config.num_patches)),
        }

    def encode(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None,
        spatial_shapes: Tensor | None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
    ) -> BaseModelOutputWithPooling:
        """The part of `forward` before the pooling head."""
        return self._encode_patches(
            pixel_values, pixel_attention_mask, spatial_shapes, output_attentions, output_hidden_states
        )[0]

    def _encode_patches(
        self,
        pixel_values: Tensor,
        mask: Tensor | None,
        shapes: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: HiddenStates | None,
    ) -> tuple[BaseModelOutputWithPooling, Tensor | None]:
        """The output without pooling, and the number of patches of each image (None without padding)."""
        self._check_exporter()
        check_patches(pixel_values, self.config.num_channels * self.config.patch_size**2)
        dense = self._default(output_attentions, "attentions")
        where = layout(self.ops, pixel_values, mask, shapes, dense=dense)
        x = self.embeddings(pixel_values, where)
        output = self._encode_tokens(x, where.mask, output_attentions, output_hidden_states)
        hidden = output.hidden_states
        return replace(
            output,
            last_hidden_state=where.restore_padding(output.last_hidden_state),  # type: ignore[arg-type]
            hidden_states=None
            if hidden is None
            else tuple(x if x is None else where.restore_padding(x) for x in hidden),
        ), where.lengths

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode images of different sizes.

        pixel_values: floating point or uint8 (B, P, C · p · p), patches row by row, cast to the weights' dtype.
        pixel_attention_mask: (B, P), non-zero for the first height · width patches of each image; None if all are.
        spatial_shapes: int64 (B, 2), height and width of each image in patches. On the CPU, also beside a model on a
            GPU, it is read without waiting for the GPU.
        Under eager, tokens of padding are what transformers computes; under the other backends they are zeros: triton,
        flash_attention_2 and, on a CPU, sdpa do not compute them.
        Raises ValueError for other shapes and dtypes and, of what the host may read, for an image without patches or
        with more than P, and for a mask that contradicts spatial_shapes.
        """
        output, lengths = self._encode_patches(
            pixel_values,
            pixel_attention_mask,
            spatial_shapes,
            output_attentions,
            output_hidden_states,
        )
        if self.head is not None:
            output.pooler_output = self.head(output.last_hidden_state, lengths)
        return finish(output, self, return_dict)


class Siglip2Model(_NaFlex, SiglipModel):
    """An image tower at native resolution and a text tower that embed into one space."""

    config_class = Siglip2Config
    text_class = Siglip2TextModel
    vision_class = Siglip2VisionModel
    output_class = Siglip2Output

    def get_image_features(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """The vision tower's output; `pooler_output` (B, width) is not normalised. Arguments: Siglip2VisionModel."""
        return self.vision_model(pixel_values, pixel_attention_mask, spatial_shapes, **self._tuples(kwargs))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Siglip2Output | tuple:
        """Compare every image with every text.

        pixel_values (I, P, C · p · p), pixel_attention_mask, spatial_shapes: see Siglip2VisionModel; the others: see
        SiglipModel.
        """
        images = (pixel_values, pixel_attention_mask, spatial_shapes)
        texts = (input_ids, attention_mask, position_ids)
        output = self._compare_inputs(images, texts, return_loss, output_attentions, output_hidden_states)
        return finish(output, self, return_dict)


class Siglip2ForImageClassification(_NaFlex, SiglipForImageClassification):
    """The vision tower at native resolution with a linear classifier on the mean of each image's tokens."""

    config_class = Siglip2Config
    vision_class = Siglip2VisionModel

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """Classify images. The first three: see Siglip2VisionModel; the others: see SiglipForImageClassification."""
        images = (pixel_values, pixel_attention_mask, spatial_shapes)
        output = self._classify(images, pixel_attention_mask, labels, output_attentions, output_hidden_states)
        return finish(output, self, return_dict)
