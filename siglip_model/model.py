"""SigLIP (Zhai et al. 2023, arXiv 2303.15343): two towers, one temperature, one bias."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from siglip_kernels import SigLipLoss
from siglip_kernels.errors import unsupported
from siglip_model.capture import CapturedSiglip
from siglip_model.config import SiglipConfig
from siglip_model.encoder import HiddenStates
from siglip_model.layers import UsesBackend
from siglip_model.outputs import BaseModelOutputWithPooling, SiglipOutput, pooled, unit_length
from siglip_model.pretrained import PreTrainedModel, finish
from siglip_model.text_tower import SiglipTextModel
from siglip_model.vision_tower import SiglipVisionModel


class SiglipModel(UsesBackend, PreTrainedModel):
    """An image tower and a text tower that embed into one space."""

    config_class = SiglipConfig
    base_model_prefix = "siglip"
    text_class: ClassVar[type[SiglipTextModel]] = SiglipTextModel
    vision_class: ClassVar[type[SiglipVisionModel]] = SiglipVisionModel
    output_class: ClassVar[type[SiglipOutput]] = SiglipOutput

    def __init__(self, config: SiglipConfig, **kwargs: str):
        super().__init__(config, **kwargs)
        self.text_model = self.text_class(config.text_config, **kwargs)  # type: ignore[arg-type]
        self.vision_model = self.vision_class(config.vision_config, **kwargs)  # type: ignore[arg-type]
        self.logit_scale = nn.Parameter(torch.zeros(1))  # log of the paper's t
        self.logit_bias = nn.Parameter(torch.zeros(1))
        self.global_loss: SigLipLoss | None = None
        self.post_init()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.zeros_(self.logit_scale)
        nn.init.zeros_(self.logit_bias)

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    def _input_embeddings(self) -> tuple[nn.Module, str]:
        return self.text_model._input_embeddings()

    def use_global_loss(
        self, enable: bool = True, *, group: dist.ProcessGroup | None = None, dist_impl: str = "ring"
    ) -> None:
        """Compute the loss of `return_loss` over the global batch across ranks, for DDP and FSDP.

        Every image is then compared with the texts of every rank; transformers' loss is local to the rank. The
        gradients that DDP or FSDP average equal those of one process with the whole batch. group, dist_impl: as in
        `SigLipLoss`, which also says how copies and pickles of the model treat the group. Raises RuntimeError if
        torch.distributed has no process group.
        """
        if not enable:
            self.global_loss = None
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("use_global_loss: torch.distributed has no process group; call init_process_group first")
        self.global_loss = SigLipLoss(
            rank=dist.get_rank(group), world_size=dist.get_world_size(group), group=group, dist_impl=dist_impl
        )

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """The text tower's output; `pooler_output` (B, projection) is not normalised. Arguments: SiglipTextModel."""
        return self.text_model(input_ids, attention_mask, position_ids, **self._tuples(kwargs))

    def get_image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """The vision tower's output; `pooler_output` (B, width) is not normalised. Arguments: SiglipVisionModel."""
        return self.vision_model(pixel_values, interpolate_pos_encoding, **self._tuples(kwargs))

    def _tuples(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A tower's arguments, with this model's `return_dict` as default instead of the tower's."""
        return {"return_dict": self.config.return_dict, **kwargs}

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
        return_logits: bool = True,
    ) -> SiglipOutput | tuple:
        """Compare every image with every text.

        input_ids (T, L), attention_mask, position_ids: see SiglipTextModel; pixel_values (I, C, H, W),
        interpolate_pos_encoding: see SiglipVisionModel. return_loss: also return the sigmoid loss, which pairs image i
        with text i and needs I = T. token_type_ids: ignored, as in transformers. return_logits: False leaves out both
        logits, with which training through `return_loss` has the memory of the loss, O(I·D), instead of I·T logits.
        Raises ValueError for inputs that the towers do not support.
        """
        images, texts = (pixel_values, interpolate_pos_encoding), (input_ids, attention_mask, position_ids)
        output = self._compare_inputs(
            images, texts, return_loss, output_attentions, output_hidden_states, return_logits
        )
        return finish(output, self, return_dict)

    def _compare_inputs(
        self,
        images: tuple[Any, ...],
        texts: tuple[Any, ...],
        return_loss: bool | None,
        output_attentions: bool | None,
        output_hidden_states: HiddenStates | None,
        return_logits: bool,
    ) -> SiglipOutput:
        """images, texts: arguments of the towers, in their order."""
        asked = {
            "output_attentions": self._default(output_attentions, "attentions"),
            "output_hidden_states": self._default(output_hidden_states, "hidden_states"),
            "return_dict": True,
        }
        vision, text = self.vision_model(*images, **asked), self.text_model(*texts, **asked)
        return self.compare(vision, text, return_loss, return_logits)

    def compare(
        self,
        vision: BaseModelOutputWithPooling,
        text: BaseModelOutputWithPooling,
        return_loss: bool | None = None,
        return_logits: bool = True,
    ) -> SiglipOutput:
        """The part of `forward` after the towers."""
        image_embeds = unit_length(pooled(vision))  # [I, D]
        text_embeds = unit_length(pooled(text))  # [T, D]
        logits_per_text = logits_per_image = loss = None
        if return_logits:
            logits_per_text = self.logits_per_text(text_embeds, image_embeds)  # [T, I]
            logits_per_image = logits_per_text.T
        if return_loss:
            images, texts = image_embeds.shape[0], text_embeds.shape[0]
            if texts != images:
                raise unsupported(
                    "SiglipModel",
                    "return_loss",
                    f"asks for the loss of {images} images and {texts} texts",
                    "pairs, so as many images as texts",
                )
            compute = self.ops.sigmoid_loss if self.global_loss is None else self.global_loss
            loss = compute(image_embeds, text_embeds, self.logit_scale.exp().squeeze(), self.logit_bias.squeeze())
        return self.output_class(loss, logits_per_image, logits_per_text, text_embeds, image_embeds, text, vision)

    def logits_per_text(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """t·⟨text, image⟩ + b: (T, I) from unit embeddings (T, D) and (I, D). The sigmoid of it is a probability."""
        return text_embeds @ image_embeds.T * self.logit_scale.exp() + self.logit_bias

    def capture(
        self,
        batch_size: int = 1,
        *,
        text_batch_size: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        text_length: int | None = None,
        attention_mask: bool = False,
    ) -> CapturedSiglip:
        """Record the forward pass into CUDA graphs: at small batch sizes inference is bound by launch overhead.

        Returns an object with the model's `get_image_features` and `get_text_features`; calling it returns both and the
        logits. Outputs are fresh copies without gradients.
        batch_size: number of images, and of texts unless text_batch_size is given. image_size: (height, width) or one
        number, by default the configuration's; otherwise the position embedding is interpolated. text_length: tokens,
        by default max_position_embeddings. attention_mask: whether calls may pass one. Inputs of any other shape raise
        ValueError. Weights may change in place (an optimizer's step, load_state_dict); calls after moving or casting
        the model raise RuntimeError. Not safe for concurrent threads or streams.
        Raises MissingBackendError unless the model is on a CUDA device, ValueError in training mode.
        """
        return CapturedSiglip(
            self, batch_size, text_batch_size, image_size, text_length, attention_mask, compare=self.compare
        )
