"""The choice of an engine, which computes the blocks of a loss.

"chunked" is `TorchEngine`. "triton" is `TritonEngine`, or `HopperEngine` where SIGLIP_KERNELS_HOPPER=1; neither is
imported before it is chosen, so that the package works without Triton.
"""

import torch
from torch import Tensor

from siglip_kernels.device import hopper_kernels_enabled, require_kernels
from siglip_kernels.sigmoid_loss.blocks import Engine
from siglip_kernels.sigmoid_loss.torch_engine import TorchEngine


def make_engine(name: str, embeds: Tensor, chunk_size: int = 0) -> Engine:
    """The engine of this name for embeddings of this dtype, width and device.

    Raises MissingBackendError where "triton" cannot run, and UnsupportedInputError where HopperEngine is on and cannot.
    """
    if name == "triton":
        # Checked here and not with the arguments, because torch.compile cannot trace the check.
        if embeds.device.type != "meta":
            instead = "siglip_kernels.chunked_sigmoid_loss, or a model's backend 'sdpa' or 'eager'"
            require_kernels("sigmoid_loss", "image_embeds", embeds, instead)
        if hopper_kernels_enabled():
            from siglip_kernels.sigmoid_loss.hopper_engine import HopperEngine

            return HopperEngine(embeds, chunk_size)
        from siglip_kernels.sigmoid_loss.triton_engine import TritonEngine, config_for

        return TritonEngine(embeds.dtype, config_for(embeds), chunk_size)
    return TorchEngine(embeds.dtype, embeds.device, chunk_size)


def saved_dtype(engine: str, dtype: torch.dtype) -> torch.dtype:
    """The engine's `saved_dtype`, without making the engine: while tracing there may be no device."""
    return dtype if engine == "triton" and dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)
