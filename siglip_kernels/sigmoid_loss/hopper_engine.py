"""The engine in Gluon for Hopper: launches the kernels of `hopper_kernels.py`, one block at a time."""

import torch
import triton
from torch import Tensor

from siglip_kernels.device import facts
from siglip_kernels.errors import unsupported
from siglip_kernels.gemm.gluon_launch import GROUP, descriptor
from siglip_kernels.gemm.hopper import TALL, WIDE, Tile
from siglip_kernels.gemm.hopper_pipeline import CONSUMERS, THREADS
from siglip_kernels.gemm.ring import BLOCK_K
from siglip_kernels.sigmoid_loss.hopper_kernels import BUFFERS, PIECE, logit_grad_kernel, product_kernel
from siglip_kernels.sigmoid_loss.pairs import Pairs
from siglip_kernels.sigmoid_loss.triton_engine import TritonEngine, config_for


class HopperEngine(TritonEngine):
    """See `blocks.Engine`. Blocks and dtypes are those of `TritonEngine`.

    Rectangles of pairs and any diagonal are computed here. With groups, weights or losses per image the portable kernel
    computes G, and the kernels here its products.

    Not measured on a GPU. Counted by `python -m bench.compiled.tile_cost sigmoid_loss_hopper sigmoid_loss` with triton
    3.7.1, in clocks of one warp on its quarter of a multiprocessor: the epilogue that computes G and the sums takes
    2064 clocks of the special-function units and 2421 of issue, in the portable kernel 3072 and 4432. A tile at D = 768
    is 12 blocks, 12,288 clocks of the tensor pipe, its busiest pipe (bench.compiled.sass). In the portable kernel the
    epilogues of two warps come on top: 58 % of the peak at best. Here one consumer's epilogue runs beneath the other's
    products, of which four stages hold 2048 clocks; at most 2 × 373 clocks remain exposed, 94 % of the peak. The two
    products have at least 88 blocks per epilogue of 679 clocks.
    """

    def __init__(self, embeds: Tensor, chunk_size: int = 0) -> None:
        gpu = facts(embeds.device)
        if gpu.capability != (9, 0):
            raise unsupported(
                "sigmoid_loss", "image_embeds", f"is on {gpu.name}", "Hopper (sm_90) with SIGLIP_KERNELS_HOPPER=1"
            )
        if embeds.dtype not in (torch.float16, torch.bfloat16):
            supported = "float16, bfloat16 with SIGLIP_KERNELS_HOPPER=1"
            raise unsupported("sigmoid_loss", "image_embeds", f"has dtype {embeds.dtype}", supported)
        super().__init__(embeds.dtype, config_for(embeds), chunk_size)
        self.programs, self.shared_memory = gpu.multiprocessors, gpu.shared_memory

    def totals(self, device: torch.device, pairs: Pairs) -> Tensor:
        if not self._supports(pairs):
            return super().totals(device, pairs)
        slots = self.programs * CONSUMERS.value * THREADS.value
        return torch.zeros((3, slots), dtype=torch.float64, device=device)

    @staticmethod
    def _supports(pairs: Pairs) -> bool:
        return pairs.image_groups is None and pairs.positive_weight is None

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
        if not self._supports(pairs) or image_losses is not None:
            super().logit_grad(x, y, logit_scale, logit_bias, pairs, totals, gradients, out, image_losses)
            return
        tile = WIDE
        logit_grad_kernel[(self._grid(len(x), len(y), tile),)](
            image_source=descriptor(x, [tile.consumer_rows, BLOCK_K.value]),
            text_source=descriptor(y, [tile.columns, BLOCK_K.value]),
            logit_grad_target=None if out is None else descriptor(out, [tile.consumer_rows, PIECE.value]),
            logit_scale_ptr=logit_scale,
            logit_bias_ptr=logit_bias,
            totals_ptr=totals,
            slots=totals.shape[1],
            images=len(x),
            texts=len(y),
            diagonal=pairs.diagonal,
            WIDTH=x.shape[1],
            CONSUMER_ROWS=tile.consumer_rows,
            BLOCK_N=tile.columns,
            GRADIENTS=gradients,
            LOGIT_GRAD_SCALE=self.logit_grad_scale,
            STAGES=tile.stages(BUFFERS.value, self.logit_grad_dtype, self.shared_memory),
            GROUP=GROUP,
            num_warps=4,
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
        rows, width = out.shape
        # 256 columns where they divide the width: so400m's 1152 are 9 × 128, but 4.5 × 256.
        tile = WIDE if width % WIDE.columns == 0 else TALL
        product_kernel[(self._grid(rows, width, tile),)](
            logit_grad_source=descriptor(
                logit_grad, [BLOCK_K.value, tile.consumer_rows] if transposed else [tile.consumer_rows, BLOCK_K.value]
            ),
            operand_source=descriptor(operand, [BLOCK_K.value, tile.columns]),
            previous_ptr=previous,
            out_ptr=out,
            logit_scale_ptr=logit_scale,
            factor=factor,
            rows=rows,
            depth=len(operand),
            WIDTH=width,
            CONSUMER_ROWS=tile.consumer_rows,
            BLOCK_N=tile.columns,
            TRANSPOSED=transposed,
            STAGES=tile.stages(0, self.logit_grad_dtype, self.shared_memory),
            GROUP=GROUP,
            num_warps=4,
        )

    def _grid(self, rows: int, columns: int, tile: Tile) -> int:
        return min(self.programs, triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns))
