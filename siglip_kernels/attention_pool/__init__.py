"""The attention of the MAP head: its algebra in folded.py, the registered op in api.py, its kernels in kernels.py."""

from siglip_kernels.attention_pool.api import attention_pool
from siglip_kernels.attention_pool.folded import folded_attention_pool

__all__ = ["attention_pool", "folded_attention_pool"]
