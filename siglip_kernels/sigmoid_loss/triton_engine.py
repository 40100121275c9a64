"""The engine in Triton: launches the kernels of `kernels.py`, one block at a time, without a synchronisation."""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from siglip_kernels.device import facts, precision
from siglip_kernels.sigmoid_loss.blocks import round_up
from siglip_kernels.sigmoid_loss.config import Config, Tile, choose
from siglip_kernels.sigmoid_loss.kernels import logit_grad_kernel, product_kernel, scale_kernel
from siglip_kernels.sigmoid_loss.pairs import Pairs


def config_for(embeds: Tensor) -> Config:
    """The configuration for embeddings like these on their device."""
    return choose(embeds.dtype, embeds.shape[1], facts(embeds.device), precision(embeds.dtype))


def pair_arguments(pairs: Pairs) -> dict[str, Any]:
    """The arguments of a kernel that say which pairs are positive and what they weigh."""
    return {
        "diagonal": pairs.diagonal,
        "image_groups_ptr": pairs.image_groups,
        "text_groups_ptr": pairs.text_groups,
        "positive_weight_ptr": pairs.positive_weight,
        "negative_weight_ptr": pairs.negative_weight,
        "text_weight_ptr": pairs.text_weight,
    }


class TritonEngine:
    """See `blocks.Engine`.

    Counted for an H200 at D = 768 by `python -m bench.compiled.tile_cost sigmoid_loss --only "bf16 D=768"` with triton
    3.7.1, in clocks of one warp on its quarter of a multiprocessor, of which two share it: the epilogue of 128 × 256
    logits takes 2265 clocks of issue, with groups 3126; of 128 × 128 with groups and weights 2531. The products of a
    tile take 12,288 and 6,144, so that all three products run at 89, 85 and 78 % of the peak at best.
    """

    name = "triton"

    def __init__(self, dtype: torch.dtype, config: Config, chunk_size: int = 0) -> None:
        self.config = config
        self.rows = self.columns = config.block
        if chunk_size:
            self.rows = min(self.rows, round_up(chunk_size))
        self.logit_grad_dtype = dtype
        # σ(-10) = 4.5e-5 is subnormal in fp16; multiplied by a power of two it keeps all its bits.
        self.logit_grad_scale = 2.0**15 if dtype == torch.float16 else 1.0
        self.sum_dtype = torch.float32
        # Gradients times t/n fit bf16; in fp16 they would underflow before a GradScaler multiplies them.
        self.saved_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    def totals(self, device: torch.device, pairs: Pairs) -> Tensor:
        tile = self._tile(pairs)
        slots = triton.cdiv(self.rows, tile.rows) * triton.cdiv(self.columns, tile.columns)
        return torch.zeros((3, slots), dtype=torch.float64, device=device)

    def image_losses(self, images: int, device: torch.device, pairs: Pairs) -> Tensor:
        tiles = triton.cdiv(self.columns, self._tile(pairs).columns)
        return torch.zeros((tiles, images), dtype=torch.float64, device=device)

    def _tile(self, pairs: Pairs) -> Tile:
        return self.config.logit_grad if pairs.positive_weight is None else self.config.weighted

    def _source(self, tensor: Tensor, rows: int, columns: int) -> Tensor | TensorDescriptor:
        if not self.config.descriptors:
            return tensor
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])

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
        tile = self._tile(pairs)
        grid = (triton.cdiv(len(x), tile.rows), triton.cdiv(len(y), tile.columns))
        logit_grad_kernel[grid](
            image_source=self._source(x, tile.rows, tile.depth),
            text_source=self._source(y, tile.columns, tile.depth),
            logit_grad_target=None if out is None else self._source(out, tile.rows, tile.columns // 4),
            logit_grad_stride=0 if out is None else out.stride(0),
            logit_scale_ptr=logit_scale,
            logit_bias_ptr=logit_bias,
            totals_ptr=totals,
            slots=totals.shape[1],
            images=len(x),
            texts=len(y),
            **pair_arguments(pairs),
            image_losses_ptr=image_losses,
            image_losses_stride=0 if image_losses is None else image_losses.stride(0),
            WIDTH=x.shape[1],
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            GRADIENTS=gradients,
            LOGIT_GRAD_SCALE=self.logit_grad_scale,
            PRECISION=self.config.precision,
            DESCRIPTORS=self.config.descriptors,
            SUMS=self.config.folding.columns,
            ROWS=self.config.folding.rows,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

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
        tile = self.config.product
        rows, width = out.shape
        block = (tile.depth, tile.rows) if transposed else (tile.rows, tile.depth)
        product_kernel[triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.columns)](
            logit_grad_source=self._source(logit_grad, *block),
            logit_grad_stride=logit_grad.stride(0),
            operand_source=self._source(operand, tile.depth, tile.columns),
            previous_ptr=previous,
            out_ptr=out,
            logit_scale_ptr=logit_scale,
            factor=factor,
            rows=rows,
            depth=len(operand),
            WIDTH=width,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            TRANSPOSED=transposed,
            PRECISION=self.config.precision,
            DESCRIPTORS=self.config.descriptors,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def scale(self, source: Tensor, scale: Tensor, factor: float, out: Tensor) -> Tensor:
        block = 1024
        size = source.numel()
        scale_kernel[(triton.cdiv(size, block),)](
            source_ptr=source, out_ptr=out, scale_ptr=scale, factor=factor, size=size, BLOCK=block
        )
        return out
