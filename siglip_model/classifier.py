"""Image classification on the vision tower."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_kernels.errors import unsupported
from siglip_kernels.fusable import is_fusable, is_unhooked
from siglip_model.capture import CapturedVision
from siglip_model.config import SiglipConfig
from siglip_model.encoder import HiddenStates
from siglip_model.outputs import ImageClassifierOutput
from siglip_model.pretrained import PreTrainedModel, finish
from siglip_model.vision_tower import SiglipVisionModel


class SiglipForImageClassification(PreTrainedModel):
    """The vision tower with a linear classifier on the mean of its tokens; the pooling head is not used."""

    config_class = SiglipConfig
    base_model_prefix = "siglip"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    new_parameters = ("classifier.",)
    vision_class: ClassVar[type[SiglipVisionModel]] = SiglipVisionModel

    def __init__(self, config: SiglipConfig, **kwargs: str):
        super().__init__(config, **kwargs)
        if config.num_labels < 1:
            raise unsupported("SiglipForImageClassification", "num_labels", f"is {config.num_labels}", "at least 1")
        self.vision_model = self.vision_class(config.vision_config, **kwargs)  # type: ignore[arg-type]
        self.classifier = nn.Linear(config.vision_config.hidden_size, config.num_labels)  # type: ignore[union-attr]
        self.post_init()

    @property
    def num_labels(self) -> int:
        return self.config.num_labels

    def _input_embeddings(self) -> tuple[nn.Module, str]:
        return self.vision_model._input_embeddings()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStates | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """Classify images.

        pixel_values: (B, C, H, W). labels: (B,) class indices; (B, num_labels) floating point for several classes per
        image; (B,) floating point for num_labels = 1. config.problem_type selects the loss; if it is None, it is
        inferred from the labels and set. Returns logits (B, num_labels).
        """
        images = (pixel_values, interpolate_pos_encoding)
        output = self._classify(images, None, labels, output_attentions, output_hidden_states)
        return finish(output, self, return_dict)

    def _classify(
        self,
        images: tuple[Any, ...],
        mask: Tensor | None,
        labels: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: HiddenStates | None,
    ) -> ImageClassifierOutput:
        """images: arguments of the vision tower, in its order. mask: (B, S), non-zero for the tokens to average."""
        if labels is not None and not isinstance(labels, Tensor):
            raise unsupported("SiglipForImageClassification", "labels", f"is {type(labels).__name__}", "a tensor")
        asked = (self._default(output_attentions, "attentions"), self._default(output_hidden_states, "hidden_states"))
        head = self.vision_model.head
        # transformers computes the pooling head and drops its output: a hook in it sees that here as well.
        unseen = head is None or all(is_unhooked(module) for module in head.modules())
        if is_fusable(self.vision_model, self.vision_class) and unseen:
            vision = self.vision_model.encode(*images, *asked)  # type: ignore[call-arg]  # its own class's images
        else:
            vision = self.vision_model(*images, *asked, return_dict=True)
        tokens: Any = vision.last_hidden_state  # [B, S, width]
        if mask is None:
            mean = tokens.mean(dim=1)
        else:
            mask = mask[..., None].to(tokens.device, torch.bool)
            mean = (tokens * mask).sum(dim=1) / mask.sum(dim=1)
        logits = self.classifier(mean)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss, logits, vision.hidden_states, vision.attentions)

    def capture(self, batch_size: int = 1, *, image_size: int | tuple[int, int] | None = None) -> CapturedVision:
        """Record the forward pass into a CUDA graph, to be called with pixel_values. See `SiglipModel.capture`."""
        return CapturedVision(self, batch_size, image_size)

    def loss_function(self, labels: Tensor, logits: Tensor, config: SiglipConfig) -> Tensor:
        """The loss of `forward`. `model.loss_function = ...` replaces it, as in transformers."""
        labels = labels.to(logits.device)
        if config.problem_type is None:
            if config.num_labels == 1:
                config.problem_type = "regression"
            elif labels.dtype in (torch.int64, torch.int32):
                config.problem_type = "single_label_classification"
            else:
                config.problem_type = "multi_label_classification"
        if config.problem_type == "regression":
            return (
                F.mse_loss(logits.squeeze(), labels.squeeze()) if config.num_labels == 1 else F.mse_loss(logits, labels)
            )
        if config.problem_type == "single_label_classification":
            return F.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1).long())
        return F.binary_cross_entropy_with_logits(logits, labels)

    def init_weights(self) -> None:
        super().init_weights()
        std = self.config.vision_config.hidden_size**-0.5 * self.config.initializer_factor
        nn.init.normal_(self.classifier.weight, std=std)
        nn.init.zeros_(self.classifier.bias)
