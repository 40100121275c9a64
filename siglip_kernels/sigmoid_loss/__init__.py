"""The pairwise sigmoid loss: fused in Triton, chunked in plain PyTorch, and over many processes."""

from siglip_kernels.sigmoid_loss.api import chunked_sigmoid_loss, plain_sigmoid_loss, sigmoid_loss
from siglip_kernels.sigmoid_loss.module import SigLipLoss

__all__ = ["SigLipLoss", "chunked_sigmoid_loss", "plain_sigmoid_loss", "sigmoid_loss"]
