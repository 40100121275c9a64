"""Exact softmax attention. api.py dispatches to forward.py and backward.py, or to short.py for short sequences.

hopper.py launches the Gluon kernels of hopper_forward.py and hopper_backward.py where SIGLIP_KERNELS_HOPPER=1.
"""

from siglip_kernels.attention.api import attention

__all__ = ["attention"]
