"""SigLIP's operations as hand-written Triton kernels. Importing needs neither a GPU nor Triton."""

from siglip_kernels import reference
from siglip_kernels.errors import MissingBackendError, UnsupportedInputError

__all__ = ["MissingBackendError", "UnsupportedInputError", "reference"]
