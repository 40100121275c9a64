"""Layer normalisation over the last dimension: the registered op in api.py, its kernels in kernels.py."""

from siglip_kernels.layer_norm.api import layer_norm

__all__ = ["layer_norm"]
