"""Layer normalisation over the last dimension."""

from siglip_kernels.layer_norm.api import layer_norm

__all__ = ["layer_norm"]
