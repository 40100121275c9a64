"""Exact softmax attention: api.py, and its kernels in forward.py, backward.py and, for short sequences, short.py."""

from siglip_kernels.attention.api import attention

__all__ = ["attention"]
