"""LayerNorm and the projections to queries, keys and values as one GEMM."""

from siglip_kernels.qkv.api import pre_norm_qkv

__all__ = ["pre_norm_qkv"]
