"""The choice of an engine, as in `siglip_kernels.sigmoid_loss.engines`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from siglip_kernels.device import require_kernels
from siglip_kernels.sigmoid_loss.matryoshka.blocks import PrefixEngine
from siglip_kernels.sigmoid_loss.matryoshka.torch_engine import TorchPrefixEngine


def make_prefix_engine(name: str, embeds: Tensor, widths: Sequence[int], chunk_size: int = 0) -> PrefixEngine:
    """The engine of this name. Raises MissingBackendError where "triton" cannot run."""
    if name == "triton":
        if embeds.device.type != "meta":
            instead = "loss=siglip_kernels.chunked_sigmoid_loss"
            require_kernels("matryoshka_sigmoid_loss", "image_embeds", embeds, instead)
        from siglip_kernels.sigmoid_loss.matryoshka.triton_engine import TritonPrefixEngine

        return TritonPrefixEngine(embeds, widths, chunk_size)
    return TorchPrefixEngine(embeds.dtype, embeds.device, chunk_size)


def gradients_early(engine: str, device: torch.device) -> bool:
    """Whether the forward pass computes gradients: where the backward pass can tell, without waiting for the device,
    that they need no correction.
    """
    return engine == "triton" or device.type == "cpu"
