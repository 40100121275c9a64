"""The pairwise sigmoid loss: fused in Triton, chunked in PyTorch operations, and distributed over processes.

The ops are in api.py, `SigLipLoss` and `SigLIPPlusLoss` in module.py on top of distributed.py. pairs.py defines which
pairs are positive and what they weigh, blocks.py is the algorithm, which an engine (engines.py) executes:
torch_engine.py, triton_engine.py with kernels.py, or hopper_engine.py with hopper_kernels.py. matryoshka
has the losses of prefixes.
"""

from siglip_kernels.sigmoid_loss.api import chunked_sigmoid_loss, plain_sigmoid_loss, sigmoid_loss
from siglip_kernels.sigmoid_loss.matryoshka import matryoshka_sigmoid_loss
from siglip_kernels.sigmoid_loss.module import SigLipLoss, SigLIPPlusLoss

__all__ = [
    "SigLIPPlusLoss",
    "SigLipLoss",
    "chunked_sigmoid_loss",
    "matryoshka_sigmoid_loss",
    "plain_sigmoid_loss",
    "sigmoid_loss",
]
