"""The engine in Triton: launches the kernels of `kernels.py`, one block at a time, without a synchronisation."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from siglip_kernels.arguments import unit_stride
from siglip_kernels.device import facts
from siglip_kernels.sigmoid_loss.blocks import round_up
from siglip_kernels.sigmoid_loss.matryoshka.blocks import Segments, Shares, Side
from siglip_kernels.sigmoid_loss.matryoshka.config import column_tiles, padding_of, prefix_config
from siglip_kernels.sigmoid_loss.matryoshka.kernels import (
    finish_kernel,
    normalise_kernel,
    prefix_logit_grad_kernel,
    prefix_product_kernel,
)
from siglip_kernels.sigmoid_loss.matryoshka.torch_engine import SMALLEST_NORM
from siglip_kernels.sigmoid_loss.pairs import Pairs
from siglip_kernels.sigmoid_loss.triton_engine import TritonEngine, config_for, pair_arguments


class TritonPrefixEngine(TritonEngine):
    """See `blocks.PrefixEngine`. Its kernels run on every supported GPU, also with SIGLIP_KERNELS_HOPPER=1."""

    def __init__(self, embeds: Tensor, widths: Sequence[int], chunk_size: int = 0) -> None:
        base = config_for(embeds[:, : widths[-1]])
        self.padding = padding_of(base.weighted)
        ends = Segments(tuple(widths), self.padding).ends
        gpu = facts(embeds.device)
        super().__init__(embeds.dtype, prefix_config(base, ends, gpu), chunk_size)

    def skips(self, only_if: Tensor | None) -> bool:
        return False

    def normalise(self, embeds: Tensor, segments: Segments) -> Side:
        embeds, ends = unit_stride(embeds), segments.ends
        normalised = embeds.new_empty((len(embeds), ends[-1]))
        # Zeros up to whole tiles, whose ratios the logits' kernel reads.
        shape = (2, len(ends), round_up(len(embeds)))
        inverse_norms, ratios = embeds.new_zeros(shape, dtype=torch.float32)[:, :, : len(embeds)]
        block, rows = _row_tile(ends)
        normalise_kernel[(triton.cdiv(len(embeds), rows),)](
            source_ptr=embeds,
            stride=embeds.stride(0),
            normalised_ptr=normalised,
            inverse_norms_ptr=inverse_norms,
            ratios_ptr=ratios,
            inverse_norms_stride=ratios.stride(0),
            rows=len(embeds),
            WIDTHS=segments.widths,
            ENDS=ends,
            ROWS=rows,
            BLOCK=block,
            SMALLEST_NORM=SMALLEST_NORM,
        )
        return Side(normalised, inverse_norms, ratios)

    def totals(self, count: int, device: torch.device, pairs: Pairs) -> Tensor:  # type: ignore[override]
        return torch.zeros(
            (count, *super().totals(torch.device("meta"), pairs).shape), dtype=torch.float64, device=device
        )

    def dots(self, count: int, size: int, of_images: bool, device: torch.device, pairs: Pairs) -> Tensor:
        tile = self._tile(pairs)
        tiles = triton.cdiv(self.columns, tile.columns) if of_images else triton.cdiv(self.rows, tile.rows)
        return torch.zeros((count, tiles, round_up(size)), dtype=torch.float32, device=device)

    def prefix_logit_grad(
        self,
        image: Side,
        text: Side,
        segments: Segments,
        scales: Tensor,
        biases: Tensor,
        shares: Shares,
        pairs: Pairs,
        totals: Tensor,
        gradients: bool,
        out: Tensor | None,
        image_dots: Tensor | None,
        text_dots: Tensor | None,
        only_if: Tensor | None,
    ) -> None:
        tile, x, y = self._tile(pairs), image.normalised, text.normalised
        prefix_logit_grad_kernel[triton.cdiv(len(x), tile.rows), triton.cdiv(len(y), tile.columns)](
            image_source=self._source(x, tile.rows, tile.depth),
            text_source=self._source(y, tile.columns, tile.depth),
            logit_grad_ptr=out,
            logit_grad_rows=0 if out is None else out.shape[1],
            logit_grad_stride=0 if out is None else out.stride(1),
            image_ratios_ptr=image.ratios,
            image_ratio_stride=image.ratios.stride(0),
            text_ratios_ptr=text.ratios,
            text_ratio_stride=text.ratios.stride(0),
            logit_scales_ptr=scales,
            logit_biases_ptr=biases,
            own_shares_ptr=shares.own,
            wider_shares_ptr=shares.wider,
            totals_ptr=totals,
            slots=totals.shape[2],
            images=len(x),
            texts=len(y),
            **pair_arguments(pairs),
            image_dots_ptr=image_dots,
            image_dots_prefix_stride=0 if image_dots is None else image_dots.stride(0),
            image_dots_stride=0 if image_dots is None else image_dots.stride(1),
            text_dots_ptr=text_dots,
            text_dots_prefix_stride=0 if text_dots is None else text_dots.stride(0),
            text_dots_stride=0 if text_dots is None else text_dots.stride(1),
            only_if_ptr=only_if,
            ENDS=tuple(end // tile.depth for end in segments.ends),
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

    def prefix_product(
        self,
        logit_grad: Tensor,
        operand: Tensor,
        segments: Segments,
        transposed: bool,
        add: bool,
        out: Tensor,
        only_if: Tensor | None,
    ) -> None:
        tile, flat = self.config.product, logit_grad.flatten(0, 1)
        block = (tile.depth, tile.rows) if transposed else (tile.rows, tile.depth)
        tiles = column_tiles(segments.ends, tile.columns)
        prefix_product_kernel[triton.cdiv(len(out), tile.rows), len(tiles.starts)](
            logit_grad_source=self._source(flat, *block),
            logit_grad_rows=logit_grad.shape[1],
            logit_grad_stride=flat.stride(0),
            operand_source=self._source(operand, tile.depth, tile.columns),
            narrow_operand_source=self._source(operand, tile.depth, tile.columns // 2),
            out_ptr=out,
            rows=len(out),
            depth=len(operand),
            only_if_ptr=only_if,
            WIDTH=segments.ends[-1],
            TILE_PREFIXES=tiles.segments,
            TILE_STARTS=tuple(start // 16 for start in tiles.starts),
            TILE_ENDS=tiles.ends,
            WIDE_TILES=tiles.wide,
            ADD=add,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            TRANSPOSED=transposed,
            PRECISION=self.config.precision,
            DESCRIPTORS=self.config.descriptors,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def finish(
        self,
        sums: Tensor,
        side: Side,
        segments: Segments,
        dots: Tensor,
        shares: Shares,
        factor: Tensor,
        out: Tensor,
        only_if: Tensor | None,
    ) -> None:
        block, rows = _row_tile(segments.ends)
        finish_kernel[(triton.cdiv(len(sums), rows),)](
            sums_ptr=sums,
            normalised_ptr=side.normalised,
            rows=len(sums),
            inverse_norms_ptr=side.inverse_norms,
            ratios_ptr=side.ratios,
            inverse_norms_stride=side.ratios.stride(0),
            dots_ptr=dots,
            dots_stride=dots.stride(0),
            own_shares_ptr=shares.own,
            wider_shares_ptr=shares.wider,
            units_ptr=shares.unit,
            factor_ptr=factor,
            out_ptr=out,
            out_stride=out.stride(0),
            only_if_ptr=only_if,
            WIDTHS=segments.widths,
            ENDS=segments.ends,
            LOGIT_GRAD_SCALE=self.logit_grad_scale,
            ROWS=rows,
            BLOCK=block,
        )


def _row_tile(ends: tuple[int, ...]) -> tuple[int, int]:
    """The columns, all of them, and the rows that one program of the kernels without products computes."""
    columns = triton.next_power_of_2(ends[-1])
    return columns, max(1, 4096 // columns)
