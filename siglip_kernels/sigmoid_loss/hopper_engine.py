"""The engine of Hopper's own kernels: launches `hopper_kernels.py` for one block at a time."""

import torch
import triton
from torch import Tensor

from siglip_kernels.device import facts
from siglip_kernels.errors import unsupported
from siglip_kernels.gemm.hopper import GROUP, TALL, WIDE, Tile, descriptor
from siglip_kernels.gemm.hopper_pipeline import BLOCK_K, CONSUMERS, THREADS
from siglip_kernels.sigmoid_loss.hopper_kernels import BUFFERS, PIECE, logit_grad_kernel, product_kernel
from siglip_kernels.sigmoid_loss.triton_engine import TritonEngine, config_for


class HopperEngine(TritonEngine):
    """See `blocks.Engine`. Blocks and dtypes are those of the portable kernels.

    Counted by `python -m bench.compiled.tile_cost sigmoid_loss_hopper sigmoid_loss`, triton 3.7.1, clocks of one warp
    on its quarter of a multiprocessor: the epilogue that makes G and the sums takes 2064 of the special-function units
    and 2421 of issue, the portable kernel's 3072 and 4432. A tile at D = 768 is 12 blocks or 12,288 clocks of the
    tensor pipe (bench.compiled.sass: no other is as busy there). The portable kernel's two warps have their epilogues
    on top: 58 % of the peak at best. Here one consumer's epilogue is under the other's products, of which four stages
    hold 2048 clocks; at most 2 × 373 are left, 94 %. The two products have 88 blocks or more to one epilogue of 679.
    Nothing of this has been measured on a GPU.
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

    def totals(self, device: torch.device) -> Tensor:
        slots = self.programs * CONSUMERS.value * THREADS.value
        return torch.zeros((3, slots), dtype=torch.float64, device=device)

    def logit_grad(
        self,
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        diagonal: int,
        totals: Tensor,
        gradients: bool,
        out: Tensor | None,
    ) -> None:
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
            diagonal=diagonal,
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
        # 256 columns where that leaves nothing over: so400m's 1152 are nine times 128, but four and a half times 256.
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
