"""Images in uint8 to pixel values: the registered op in api.py, its kernel in forward.py."""

from siglip_kernels.resize_normalize.api import resize_normalize

__all__ = ["resize_normalize"]
