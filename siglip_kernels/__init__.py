"""SigLIP's operations as hand-written Triton kernels. Importing needs neither a GPU nor Triton."""

from siglip_kernels import fp8, reference
from siglip_kernels.attention import attention
from siglip_kernels.attention_pool import attention_pool
from siglip_kernels.errors import MissingBackendError, UnsupportedInputError
from siglip_kernels.layer_norm import layer_norm
from siglip_kernels.linear import linear
from siglip_kernels.mlp import mlp, pre_norm_mlp
from siglip_kernels.patch_embed import patch_embed
from siglip_kernels.pre_norm_attention import pre_norm_attention
from siglip_kernels.qkv import pre_norm_qkv
from siglip_kernels.resize_normalize import resize_normalize
from siglip_kernels.sigmoid_loss import (
    SigLipLoss,
    SigLIPPlusLoss,
    chunked_sigmoid_loss,
    matryoshka_sigmoid_loss,
    plain_sigmoid_loss,
    sigmoid_loss,
)

__all__ = [
    "MissingBackendError",
    "SigLIPPlusLoss",
    "SigLipLoss",
    "UnsupportedInputError",
    "attention",
    "attention_pool",
    "chunked_sigmoid_loss",
    "fp8",
    "layer_norm",
    "linear",
    "matryoshka_sigmoid_loss",
    "mlp",
    "patch_embed",
    "plain_sigmoid_loss",
    "pre_norm_attention",
    "pre_norm_mlp",
    "pre_norm_qkv",
    "reference",
    "resize_normalize",
    "sigmoid_loss",
]
