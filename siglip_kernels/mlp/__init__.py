"""The MLP of a transformer layer, with or without the LayerNorm in front of it."""

from siglip_kernels.mlp.api import mlp, pre_norm_mlp

__all__ = ["mlp", "pre_norm_mlp"]
