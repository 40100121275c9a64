"""Inference in fp8: the products of encoder layers with e4m3 operands. Importing needs neither a GPU nor Triton."""

from siglip_kernels.fp8.api import mlp, pre_norm_attention, pre_norm_mlp, pre_norm_qkv
from siglip_kernels.fp8.devices import why_no_gpu, why_not, why_not_here
from siglip_kernels.fp8.report import LEAST_COSINE, Quantised
from siglip_kernels.fp8.weights import forget

__all__ = [
    "LEAST_COSINE",
    "Quantised",
    "forget",
    "mlp",
    "pre_norm_attention",
    "pre_norm_mlp",
    "pre_norm_qkv",
    "why_no_gpu",
    "why_not",
    "why_not_here",
]
