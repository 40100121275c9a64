"""Layer normalisation: api.py, its launchers in launch.py, and the kernels in kernels.py."""

from siglip_kernels.layer_norm.api import layer_norm
from siglip_kernels.layer_norm.launch import layer_norm_backward, layer_norm_forward

__all__ = ["layer_norm", "layer_norm_backward", "layer_norm_forward"]
