"""The attention half of an encoder layer as one operation; kernels in layer_norm/, gemm/ and attention/."""

from siglip_kernels.pre_norm_attention.api import pre_norm_attention

__all__ = ["pre_norm_attention"]
