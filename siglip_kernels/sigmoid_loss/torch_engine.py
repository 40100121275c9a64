"""The engine in PyTorch operations, for any device and any floating-point dtype.

Logits of half-precision inputs are fp32: on CUDA the matrix product accumulates and returns fp32, elsewhere the inputs
are converted first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.sigmoid_loss.pairs import Pairs

# The default images and texts per block: large enough that threads of a busy CPU seldom wait for each other, and that
# launch overhead is negligible on a GPU. A block and its temporaries take 50 MB and 400 MB in fp32, with groups or
# weights 85 MB and 670 MB.
_CPU_BLOCK = (1024, 4096)
_GPU_BLOCK = (4096, 8192)


class TorchEngine:
    """See `blocks.Engine`."""

    name = "chunked"

    def __init__(self, dtype: torch.dtype, device: torch.device, chunk_size: int = 0) -> None:
        self.rows, self.columns = _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK
        if chunk_size:
            self.rows = chunk_size
        self.sum_dtype = self.saved_dtype = torch.promote_types(dtype, torch.float32)
        # Tensor cores multiply half-precision operands into fp32; elsewhere operands are converted first.
        self.mixed = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
        self.logit_grad_dtype = dtype if self.mixed else self.sum_dtype
        self.logit_grad_scale = 2.0**15 if self.logit_grad_dtype == torch.float16 else 1.0

    def totals(self, device: torch.device, pairs: Pairs) -> Tensor:
        # MPS has no fp64.
        dtype = self.sum_dtype if device.type == "mps" else torch.float64
        return torch.zeros((3, 1), dtype=dtype, device=device)

    def _matmul(self, a: Tensor, b: Tensor) -> Tensor:
        if self.mixed:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a.to(self.sum_dtype), b.to(self.sum_dtype))

    def image_losses(self, images: int, device: torch.device, pairs: Pairs) -> Tensor:
        return self.totals(device, pairs).new_zeros(1, images)

    def logit_grad(
        self,
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        pairs: Pairs,
        totals: Tensor,
        gradients: bool,
        out: Tensor | None,
        image_losses: Tensor | None = None,
    ) -> None:
        products = self._matmul(x, y.T)
        logits = torch.addcmul(logit_bias, products, logit_scale)
        logit_grad = self.logit_grad_of(logits, pairs, totals, gradients, image_losses)
        if not gradients:
            return
        totals[1] += torch.mul(logit_grad, products, out=products).sum()
        totals[2] += logit_grad.sum()
        if out is not None:
            out.copy_(logit_grad if self.logit_grad_scale == 1 else logit_grad.mul_(self.logit_grad_scale))

    @staticmethod
    def logit_grad_of(
        logits: Tensor, pairs: Pairs, totals: Tensor, gradients: bool, image_losses: Tensor | None = None
    ) -> Tensor:
        """G of a block's logits, which may be overwritten. Adds its loss to totals[0], and as `logit_grad` says."""
        if pairs.image_groups is not None or pairs.positive_weight is not None or image_losses is not None:
            return _with_options(logits, pairs, totals, gradients, image_losses)
        return _plain(logits, pairs.diagonal, totals, gradients)

    def product(
        self,
        logit_grad: Tensor,
        operand: Tensor,
        transposed: bool,
        previous: Tensor | None,
        out: Tensor,
        logit_scale: Tensor | None,
        factor: float,
    ) -> None:
        logit_grad = logit_grad.T if transposed else logit_grad
        if self.mixed:
            product = self._matmul(logit_grad, operand)
            torch.add(previous, product, out=out) if previous is not None else out.copy_(product)
        elif previous is not None:
            torch.addmm(previous, logit_grad, operand.to(self.sum_dtype), out=out)
        else:
            torch.mm(logit_grad, operand.to(self.sum_dtype), out=out)
        if logit_scale is not None:
            out.mul_(logit_scale * factor)

    def scale(self, source: Tensor, scale: Tensor, factor: float, out: Tensor) -> Tensor:
        return out.copy_(source * (scale * factor))


def _plain(logits: Tensor, diagonal: int, totals: Tensor, gradients: bool) -> Tensor:
    """G of a block whose pairs weigh 1 and are positive on a diagonal, in the memory of the logits."""
    images, texts = logits.shape
    if -images < diagonal < texts:
        positives = logits.diagonal(diagonal)
        positive_logits = positives.clone()
        positives.fill_(-torch.inf)  # as negatives they add no loss and no gradient
    else:
        positive_logits = logits.new_empty(0)
    totals[0] += _softplus(logits).sum() - F.logsigmoid(positive_logits).sum()
    if not gradients:
        return logits
    logit_grad = logits.sigmoid_()
    if len(positive_logits):
        logit_grad.diagonal(diagonal).copy_(-torch.sigmoid(-positive_logits))
    return logit_grad


def _with_options(logits: Tensor, pairs: Pairs, totals: Tensor, gradients: bool, image_losses: Tensor | None) -> Tensor:
    """G of any block, in the memory of the logits, with its signs and its weights in further memory."""
    images, texts = (torch.arange(size, device=logits.device) for size in logits.shape)
    if pairs.image_groups is not None and pairs.text_groups is not None:
        positive = pairs.image_groups[:, None] == pairs.text_groups
    else:
        positive = images[:, None] + pairs.diagonal == texts
    sign = torch.ones_like(logits).masked_fill_(positive, -1)
    wrong = logits.mul_(sign)
    losses, weight = _softplus(wrong), None
    if pairs.positive_weight is not None and pairs.negative_weight is not None and pairs.text_weight is not None:
        weight = torch.where(positive, pairs.positive_weight[:, None], pairs.negative_weight[:, None])
        losses.mul_(weight.mul_(pairs.text_weight))
    totals[0] += losses.sum()
    if image_losses is not None:
        image_losses += losses.sum(1)
    if not gradients:
        return logits
    del losses
    logit_grad = wrong.sigmoid_().mul_(sign)
    return logit_grad if weight is None else logit_grad.mul_(weight)


def _softplus(logits: Tensor) -> Tensor:
    # Beyond 40, softplus(z) = z to the last bit even in fp64; the default threshold of 20 would show.
    return F.softplus(logits, threshold=40)
