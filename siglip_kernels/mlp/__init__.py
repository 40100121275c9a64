"""The MLP of a transformer layer, with and without the layer normalisation before it; kernels in gemm/."""

from siglip_kernels.mlp.api import mlp, pre_norm_mlp

__all__ = ["mlp", "pre_norm_mlp"]
