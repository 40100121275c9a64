"""Layer normalisation, then the projections to queries, keys and values as one GEMM; kernels in gemm/."""

from siglip_kernels.qkv.api import pre_norm_qkv

__all__ = ["pre_norm_qkv"]
