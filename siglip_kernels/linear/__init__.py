"""A projection, y = x Wᵀ + b + residual; kernels in gemm/."""

from siglip_kernels.linear.api import linear

__all__ = ["linear"]
