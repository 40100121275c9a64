"""A projection: y = x Wᵀ + b + residual."""

from siglip_kernels.linear.api import linear

__all__ = ["linear"]
