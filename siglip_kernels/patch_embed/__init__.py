"""Patch embedding: api.py, and its kernel in forward.py."""

from siglip_kernels.patch_embed.api import patch_embed

__all__ = ["patch_embed"]
