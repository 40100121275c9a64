"""Patch embedding: the registered op in api.py, its kernel in forward.py."""

from siglip_kernels.patch_embed.api import patch_embed

__all__ = ["patch_embed"]
