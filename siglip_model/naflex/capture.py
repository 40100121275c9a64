"""CUDA graphs of images at native resolution: a graph has one number of tokens, which its images share as they like.

The shapes of the images are tensors that the graph reads on the GPU. A call may have fewer images, of fewer patches,
than the graph: those that are missing have no tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from siglip_kernels.errors import unsupported
from siglip_model.capture import (
    Captured,
    CapturedSiglip,
    Recorder,
    Recording,
    Weights,
    buffer_of,
    check_sizes,
    recorder_of,
    refused,
)
from siglip_model.naflex.layout import Layout, check_forms, check_patches, check_values, fixed_layout
from siglip_model.outputs import BaseModelOutputWithPooling, SiglipOutput

if TYPE_CHECKING:
    from siglip_model.pretrained import PreTrainedModel


class Sizes(NamedTuple):
    """Of a recording: at most so many images in a call, of so many patches each, and of so many `tokens` together.

    Backends that pack compute `tokens`, others images · patches.
    """

    images: int
    patches: int
    tokens: int

    @classmethod
    def around(cls, pixel_values: Tensor, spatial_shapes: Tensor) -> Sizes:
        """Rounded up, so that similar batches share a recording.

        pixel_values: (B, P, ...). spatial_shapes: (B, 2) on the CPU.
        """
        images, patches = map(_rounded_up, pixel_values.shape[:2])
        return cls(images, patches, min(_rounded_up(int(spatial_shapes.prod(-1).sum())), images * patches))


def _rounded_up(number: int) -> int:
    """To three binary digits after the first, so by at most an eighth, and by less than 512."""
    step = min(512, max(1, 2 ** (number.bit_length() - 4)))
    return -(-number // step) * step


class NaFlexRecording:
    """A recorded function (pixel_values, layout, spatial_shapes) of images of different sizes."""

    def __init__(
        self,
        function: Callable[[Tensor, Layout, Tensor], Any],
        model: PreTrainedModel,
        sizes: Sizes,
        dtype: torch.dtype,
        record: Recorder,
    ):
        self._images, self._patches, self._tokens = sizes
        tower: Any = getattr(model, "vision_model", model)
        self._values = tower.config.num_channels * tower.config.patch_size**2
        dense = model.config.output_attentions or tower.config.output_attentions

        def run(pixel_values: Tensor, spatial_shapes: Tensor) -> Any:
            where = fixed_layout(tower.ops, spatial_shapes, self._patches, self._tokens, dense=dense)
            return function(pixel_values, where, spatial_shapes)

        inputs = {
            "pixel_values": buffer_of(model, (self._images, self._patches, self._values), dtype),
            "spatial_shapes": buffer_of(model, (self._images, 2), torch.int64),
        }
        self._recording = Recording(run, inputs, record)
        self.results = self._recording.results

    def replay(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> None:
        pixels, shapes = self._recording.inputs["pixel_values"], self._recording.inputs["spatial_shapes"]
        self._check(pixel_values, pixel_attention_mask, spatial_shapes)
        assert spatial_shapes is not None
        self.given = images, patches = pixel_values.shape[:2]
        with torch.no_grad():
            if self.given != pixels.shape[:2]:  # what an earlier call left may be infinite, and a mask multiplies it
                pixels.zero_()
                shapes.zero_()
            pixels[:images, :patches].copy_(pixel_values)
            shapes[:images].copy_(spatial_shapes, non_blocking=True)
        self._recording.replay()

    def _check(self, pixel_values: Tensor, mask: Tensor | None, shapes: Tensor | None) -> None:
        """Raises as the model does, and for what does not fit the graph."""
        buffer = self._recording.inputs["pixel_values"]
        check_patches(pixel_values, self._values)
        images, patches = pixel_values.shape[:2]
        check_forms(mask, shapes, images, patches)
        assert shapes is not None
        if images > self._images or patches > self._patches:
            most = f"up to {tuple(buffer.shape)}; capture again for more"
            raise refused("pixel_values", f"has shape {tuple(pixel_values.shape)}", most)
        if pixel_values.device != buffer.device:
            raise refused("pixel_values", f"is on {pixel_values.device}", f"{buffer.device}")
        counts = check_values(mask, shapes, patches, buffer.device, read=shapes.device.type == "cpu")
        if counts is None:
            fits = shapes.prod(-1).sum() <= self._tokens
            torch._assert_async(fits, "captured model: the images have more patches than its token_budget")
        elif sum(counts) > self._tokens:
            got = f"says {sum(counts)} patches of all images"
            raise refused("spatial_shapes", got, f"a token_budget of {self._tokens}; capture again for more")

    def copy_results(self) -> Any:
        """Copies of what the last replay computed of the given images and patches."""
        return pytree.tree_map_only(Tensor, self._given_part, self.results)

    def _given_part(self, tensor: Tensor) -> Tensor:
        images, patches = self.given
        tensor = tensor[:images]
        if tensor.dim() == 3:  # tokens
            tensor = tensor[:, :patches]
        if tensor.dim() == 4:  # attention weights
            tensor = tensor[:, :, :patches, :patches]
        return tensor.clone()


class CapturedNaFlex(Captured):
    """A vision tower, or an image classifier, at native resolution.

    `captured(pixel_values, pixel_attention_mask, spatial_shapes)`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int,
        max_num_patches: int | None,
        token_budget: int | None,
        record: Recorder | None = None,
    ):
        tower: Any = getattr(model, "vision_model", model)
        patches = tower.config.num_patches if max_num_patches is None else max_num_patches
        _check_sizes(batch_size, patches, token_budget)
        record = record or recorder_of(model)
        tokens = batch_size * patches if token_budget is None else token_budget
        if token_budget is not None and model.device.type not in tower.ops.packs_on:
            got = f"is {token_budget} with the backend {tower.ops.name}, which computes padding on {model.device.type}"
            raise unsupported("capture", "token_budget", got, "None, or the backend triton or flash_attention_2")
        if tokens > batch_size * patches:
            full = f"up to the {batch_size * patches} patches of a full batch"
            raise unsupported("capture", "token_budget", f"is {token_budget}", full)

        def encode(pixel_values: Tensor, where: Layout, spatial_shapes: Tensor) -> Any:
            return model(pixel_values, where, spatial_shapes, return_dict=True)

        self._weights = Weights(model.modules())
        dtype = model.get_input_embeddings().weight.dtype
        self.recording = NaFlexRecording(encode, model, Sizes(batch_size, patches, tokens), dtype, record)

    def replay(self, pixel_values: Tensor, pixel_attention_mask: Tensor | None, spatial_shapes: Tensor | None) -> None:
        self.recording.replay(pixel_values, pixel_attention_mask, spatial_shapes)
        self._weights.check()  # after the launch, so that it overlaps with the GPU's work

    @torch.no_grad()
    def __call__(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> Any:
        """Arguments and result: the model's. At most as many images and patches as were captured."""
        self.replay(pixel_values, pixel_attention_mask, spatial_shapes)
        return self.recording.copy_results()


class CapturedSiglip2(CapturedSiglip):
    """A Siglip2Model for up to so many images and patches, and texts of one shape, together or separately."""

    _vision: CapturedNaFlex  # type: ignore[assignment]

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int,
        text_batch_size: int | None,
        max_num_patches: int | None,
        token_budget: int | None,
        text_length: int | None,
        attention_mask: bool,
        record: Recorder | None = None,
        *,
        compare: Callable[[Any, Any], SiglipOutput],  # Siglip2Model.compare
    ):
        _check_sizes(batch_size, max_num_patches, token_budget)

        def capture_vision(record: Recorder) -> CapturedNaFlex:
            tower: Any = model.vision_model
            return CapturedNaFlex(tower, batch_size, max_num_patches, token_budget, record)

        self._capture(model, capture_vision, batch_size, text_batch_size, text_length, attention_mask, record, compare)

    @torch.no_grad()
    def get_image_features(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """See the model's. At most as many images and patches as were captured."""
        return self._vision(pixel_values, pixel_attention_mask, spatial_shapes)

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> SiglipOutput:
        """See the model's forward; without loss."""
        self._vision.replay(pixel_values, pixel_attention_mask, spatial_shapes)
        self._text.replay(input_ids, attention_mask)
        output = self._compare_towers()
        given = slice(len(pixel_values))
        parts: Any = {"logits_per_image": given, "logits_per_text": (slice(None), given), "image_embeds": given}
        for name, part in parts.items():
            output[name] = output[name][part]
        output.vision_model_output = self._vision.recording.copy_results()
        return output


def _check_sizes(batch_size: int, max_num_patches: int | None, token_budget: int | None) -> None:
    sizes = {"batch_size": batch_size, "max_num_patches": max_num_patches, "token_budget": token_budget}
    check_sizes(**{name: size for name, size in sizes.items() if size is not None})
