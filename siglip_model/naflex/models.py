"""SigLIP 2's models at native resolution: SigLIP's, with another form of images and a vision tower that reads it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from siglip_model.classifier import SiglipForImageClassification
from siglip_model.config import Siglip2Config, Siglip2TextConfig, Siglip2VisionConfig
from siglip_model.encoder import HiddenStates
from siglip_model.model import SiglipModel
from siglip_model.naflex.capture import CapturedNaFlex, CapturedSiglip2
from siglip_model.naflex.embeddings import NaFlexEmbeddings
from siglip_model.naflex.layout import Layout, check_patches, layout
from siglip_model.outputs import BaseModelOutputWithPooling, ImageClassifierOutput, Siglip2Output
from siglip_model.pretrained import finish
from siglip_model.text_tower import SiglipTextModel
from siglip_model.vision_tower import SiglipVisionModel


class Siglip2TextModel(SiglipTextModel):
    """SigLIP 2's text encoder, which is SigLIP's."""

    config_class = Siglip2TextConfig


class Siglip2VisionModel(SiglipVisionModel):
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
        pixel_attention_mask: Tensor | Layout | None,
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
        mask: Tensor | Layout | None,
        shapes: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: HiddenStates | None,
    ) -> tuple[BaseModelOutputWithPooling, Tensor | None]:
        """The output without pooling, and the number of patches of each image (None without padding)."""
        self._check_backend()
        check_patches(pixel_values, self.config.num_channels * self.config.patch_size**2)
        dense = self._default(output_attentions, "attentions")
        where = mask if isinstance(mask, Layout) else layout(self.ops, pixel_values, mask, shapes, dense=dense)
        x = self.embeddings(pixel_values, where)
        output = self._encode_tokens(x, where.mask, output_attentions, output_hidden_states)
        output.last_hidden_state = where.restore_padding(output.last_hidden_state)  # type: ignore[arg-type]
        if output.hidden_states is not None:
            output.hidden_states = tuple(x if x is None else where.restore_padding(x) for x in output.hidden_states)
        return output, where.lengths

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | Layout | None = None,
        spatial_shapes: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode images of different sizes.

        pixel_values: floating point or uint8 (B, P, C · p · p), patches row by row, cast to the weights' dtype.
        pixel_attention_mask: (B, P), non-zero for the first height · width patches of each image; None if all are. Or
            a `Layout`, which `fixed_layout` made of the shapes.
        spatial_shapes: int64 (B, 2), height and width of each image in patches. On the CPU, also beside a model on a
            GPU, it is read without waiting for the GPU.
        Under eager, tokens of padding are what transformers computes; under the other backends they are zeros: triton,
        flash_attention_2 and, on a CPU, sdpa do not compute them, unless torch.compile or torch.export traces this
        method. To compile packed batches under triton, compile `encoder` with dynamic=True.
        Raises ValueError for other shapes and dtypes, for an image without patches or with more than P, and for a mask
        that contradicts spatial_shapes; which values are read for it, says `layout`.
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

    def capture(  # type: ignore[override]
        self, batch_size: int = 1, *, max_num_patches: int | None = None, token_budget: int | None = None
    ) -> CapturedNaFlex:
        """Record the forward pass into a CUDA graph, to be called as the model is. See `Siglip2Model.capture`."""
        return CapturedNaFlex(self, batch_size, max_num_patches, token_budget)


class Siglip2Model(SiglipModel):
    """An image tower at native resolution and a text tower that embed into one space."""

    config_class = Siglip2Config
    base_model_prefix = "siglip2"
    text_class = Siglip2TextModel
    vision_class = Siglip2VisionModel
    output_class = Siglip2Output

    def get_image_features(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | Layout | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """The vision tower's output; `pooler_output` (B, width) is not normalised. Arguments: Siglip2VisionModel."""
        return self.vision_model(pixel_values, pixel_attention_mask, spatial_shapes, **self._tuples(kwargs))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | Layout | None = None,
        spatial_shapes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
        return_logits: bool = True,
    ) -> Siglip2Output | tuple:
        """Compare every image with every text.

        pixel_values (I, P, C · p · p), pixel_attention_mask, spatial_shapes: see Siglip2VisionModel; the others: see
        SiglipModel.
        """
        images = (pixel_values, pixel_attention_mask, spatial_shapes)
        texts = (input_ids, attention_mask, position_ids)
        output = self._compare_inputs(
            images, texts, return_loss, output_attentions, output_hidden_states, return_logits
        )
        return finish(output, self, return_dict)

    def capture(  # type: ignore[override]
        self,
        batch_size: int = 1,
        *,
        text_batch_size: int | None = None,
        max_num_patches: int | None = None,
        token_budget: int | None = None,
        text_length: int | None = None,
        attention_mask: bool = False,
    ) -> CapturedSiglip2:
        """Record the forward pass into CUDA graphs. See `SiglipModel.capture`, whose are the other arguments.

        A call takes up to batch_size images of up to max_num_patches patches each, by default the configuration's
        num_patches, and costs as much as token_budget patches: by default those of a full batch. Fewer, where
        the backend packs images on the GPU, are as many as the images of any call have together; other backends
        compute full batches. Raises ValueError for a token_budget under these, also one that is larger than a batch.
        """
        sizes = (batch_size, text_batch_size, max_num_patches, token_budget, text_length, attention_mask)
        return CapturedSiglip2(self, *sizes, compare=self.compare)


class Siglip2ForImageClassification(SiglipForImageClassification):
    """The vision tower at native resolution with a linear classifier on the mean of each image's tokens."""

    config_class = Siglip2Config
    base_model_prefix = "siglip2"
    vision_class = Siglip2VisionModel

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | Layout | None = None,
        spatial_shapes: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """Classify images. The first three: see Siglip2VisionModel; the others: see SiglipForImageClassification."""
        images = (pixel_values, pixel_attention_mask, spatial_shapes)
        mask = pixel_attention_mask.valid() if isinstance(pixel_attention_mask, Layout) else pixel_attention_mask
        output = self._classify(images, mask, labels, output_attentions, output_hidden_states)
        return finish(output, self, return_dict)

    def capture(  # type: ignore[override]
        self, batch_size: int = 1, *, max_num_patches: int | None = None, token_budget: int | None = None
    ) -> CapturedNaFlex:
        """Record the forward pass into a CUDA graph, to be called as the model is. See `Siglip2Model.capture`."""
        return CapturedNaFlex(self, batch_size, max_num_patches, token_budget)
