"""Exact softmax attention. api.py dispatches to forward.py and backward.py, or to short.py for short sequences.

variable_length.py is the same over packed sequences. hopper.py launches the Gluon kernels of hopper_forward.py and
hopper_backward.py where SIGLIP_KERNELS_HOPPER=1.
"""

from siglip_kernels.attention.api import attention
from siglip_kernels.attention.variable_length import flash_attn_varlen_func

__all__ = ["attention", "flash_attn_varlen_func"]
