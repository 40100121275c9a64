"""Projections and the MLP: linear.py, mlp.py and qkv.py; their product in gemm.py (hopper.py), cuBLAS in plain.py."""

from siglip_kernels.linear.linear import linear
from siglip_kernels.linear.mlp import mlp, pre_norm_mlp
from siglip_kernels.linear.qkv import pre_norm_qkv

__all__ = ["linear", "mlp", "pre_norm_mlp", "pre_norm_qkv"]
