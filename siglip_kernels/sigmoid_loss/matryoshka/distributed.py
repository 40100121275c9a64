"""The losses of the prefixes of a global batch: one exchange of texts, in the matrix products of the widest prefix.

Ranks exchange normalised texts and their ratios of norms as they do the texts of one loss
(`siglip_kernels.sigmoid_loss.distributed`, which defines each rank's loss). As partial sums of a text's gradient travel
Hᵀ x̂ and, for each prefix, Σᵢ Gᵢⱼ cosᵢⱼ (blocks.py), both multiplied by what is a rank's own: its scales, upstream
gradients and units of H. The owner of a text subtracts its part in its own direction.
"""

from __future__ import annotations  # torch may be built without torch.distributed

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from siglip_kernels.device import on_device
from siglip_kernels.sigmoid_loss.api import check_kernel_input
from siglip_kernels.sigmoid_loss.blocks import round_up
from siglip_kernels.sigmoid_loss.distributed import GlobalBatch, Peers, Texts, Wanted
from siglip_kernels.sigmoid_loss.engines import make_engine, saved_dtype
from siglip_kernels.sigmoid_loss.matryoshka.arguments import OPERATION, Prefixes, Scalars, refuse_unknown
from siglip_kernels.sigmoid_loss.matryoshka.blocks import (
    PrefixEngine,
    PrefixSum,
    Segments,
    Shares,
    Side,
    Walk,
    empty_gradient,
)
from siglip_kernels.sigmoid_loss.matryoshka.engines import make_prefix_engine
from siglip_kernels.sigmoid_loss.module import CALL_OPTIONS, Arguments, SigLipLoss
from siglip_kernels.sigmoid_loss.pairs import Pairs


class PrefixPass:
    """The `siglip_kernels.sigmoid_loss.distributed.Work` of the losses of prefixes.

    factors: (K,), of this rank's losses, in the gradients.
    """

    def __init__(
        self,
        engine: PrefixEngine,
        peers: Peers,
        x: Tensor,
        y: Tensor,
        widths: Sequence[int],
        scales: Tensor,
        biases: Tensor,
        factors: Tensor,
        pairs: Pairs,
        divisor: float,
        wanted: Wanted,
    ) -> None:
        self.engine, self.peers, self.wanted = engine, peers, wanted
        self.segments = Segments(tuple(widths), engine.padding)
        self.pairs, unit = pairs.in_units(peers.largest)
        self.factor = scales.new_full((), 1 / divisor)
        self.factor = self.factor if unit is None else self.factor * unit
        self.image, self.text = engine.normalise(x, self.segments), engine.normalise(y, self.segments)
        ratios = self.text.ratios.T.contiguous()
        self.texts = Texts(self.text.normalised, self.pairs.text_groups, self.pairs.text_weight, ratios)
        embeds_require, (count, device) = wanted.image or wanted.text, (len(widths), x.device)
        self.walk = Walk(
            engine=engine,
            segments=self.segments,
            scales=scales,
            biases=biases,
            shares=Shares.of(scales, factors),
            totals=engine.totals(count, device, pairs),
            gradients=wanted.scalars or embeds_require,
            logit_grad=(
                Walk.workspace(engine, self.segments, len(x), max(peers.texts), device) if embeds_require else None
            ),
        )
        self.images = PrefixSum.empty(engine, self.segments, len(x), True, device, pairs) if wanted.image else None

    @property
    def weights(self) -> list[Tensor]:
        """Of this rank's contribution to each of `sums`."""
        if not self.wanted.text:
            return []
        of_segments, ends = self.walk.shares.unit * self.factor, self.segments.ends
        lengths = [end - start for start, end in zip((0, *ends[:-1]), ends, strict=True)]
        columns = [value.expand(length) for value, length in zip(of_segments, lengths, strict=True)]
        return [torch.cat(columns), self.walk.shares.own * of_segments]

    def sums(self, rows: int) -> list[Tensor]:
        """Hᵀ x̂, and for each prefix Σ G ⊙ cos over the images."""
        if not self.wanted.text:
            return []
        ends, dtype = self.segments.ends, self.engine.sum_dtype
        return [self.image.normalised.new_empty((rows, size), dtype=dtype) for size in (ends[-1], len(ends))]

    def add(self, source: int, texts: Texts, out: Sequence[Tensor]) -> None:
        engine, count, device = self.engine, len(texts.embeds), texts.embeds.device
        diagonal = self.peers.diagonal(source, self.pairs.diagonal)
        pairs = replace(self.pairs, diagonal=diagonal, text_groups=texts.groups, text_weight=texts.weight)
        assert texts.ratios is not None
        # As `PrefixEngine.normalise` returns them. The inverse norms matter to the owner alone.
        ratios = texts.ratios.new_zeros((texts.ratios.shape[1], round_up(count)))[:, :count]
        side = Side(texts.embeds, ratios, ratios.copy_(texts.ratios.T))
        sums = None
        if out:
            sums = PrefixSum(out[0], engine.dots(len(ratios), count, False, device, pairs))
        for start in range(0, len(self.image.normalised), engine.rows):
            rows = slice(start, min(start + engine.rows, len(self.image.normalised)))
            images = None if self.images is None else self.images.part(rows)
            self.walk.add(self.image.part(rows), side, pairs.part(rows, slice(None)), images, sums)
        if self.images is not None:
            self.images.started = True
        if sums is not None:
            out[1].copy_(sums.each().T)

    def image_gradient(self, out: Tensor) -> None:
        """Writes the first widths[-1] columns of dL/dx to `out`, after all texts have been added."""
        assert self.images is not None
        total, dots = self.images.total, self.images.each()
        self.engine.finish(total, self.image, self.segments, dots, self.walk.shares, self.factor, out, None)

    def text_gradient(self, sums: Sequence[Tensor], out: Tensor) -> None:
        """Likewise dL/dy, from what a `Route` returns, which `weights` have already been multiplied to."""
        one = torch.ones_like(self.walk.shares.unit)
        total, dots = sums[0], sums[1].T.contiguous()
        self.engine.finish(total, self.text, self.segments, dots, Shares(one, one, one), one[0], out, None)

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(K,): this rank's losses, and (2, K): their gradients with respect to scales and biases, if required."""
        sums = (self.walk.totals.sum(2) * self.factor).to(dtype)
        return sums[:, 0].clone(), sums[:, 1:].T.contiguous() if self.wanted.scalars else sums.new_empty(0)


class GlobalPrefixLosses(torch.autograd.Function):
    """This rank's losses. Required gradients of their sum are computed in the forward pass."""

    @staticmethod
    def forward(ctx, image_embeds, text_embeds, scales, biases, widths, width_weights, batch):
        inputs = image_embeds, text_embeds, scales, biases
        dtype = saved_dtype(batch.engine, image_embeds.dtype)
        losses, dx, dy, scalars = _pass(*inputs, widths, width_weights, batch, batch.wanted, dtype)
        ctx.save_for_backward(dx, dy, scalars * width_weights if scalars.numel() else scalars, *inputs, width_weights)
        ctx.widths, ctx.batch = widths, batch
        return batch.averaged(losses * width_weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        dx, dy, scalars, image_embeds, text_embeds, scales, biases, width_weights = ctx.saved_tensors
        batch, inputs = ctx.batch, (image_embeds, text_embeds, scales, biases)
        image, text, scale, bias = ctx.needs_input_grad[:4]
        # All ranks see the same values and take the same branch.
        if bool((batch.of_all_ranks(upstream) == upstream[0]).all()):
            scaler, one = make_engine(batch.engine, image_embeds), upstream[0].contiguous()
            with on_device(image_embeds):
                dx, dy = (
                    scaler.scale(saved, one, 1.0, torch.empty_like(saved, dtype=image_embeds.dtype))
                    if saved.numel()
                    else saved
                    for saved in (dx, dy)
                )
        elif bool(batch.of_all_ranks(upstream.new_tensor([batch.wanted.image or batch.wanted.text])).any()):
            # A rank that wants neither passes the other ranks' texts on.
            wanted, factors = replace(batch.wanted, scalars=False), width_weights * upstream
            _, dx, dy, _ = _pass(*inputs, ctx.widths, factors, batch, wanted, image_embeds.dtype)
        if scale or bias:
            scalars = scalars * upstream
        return (
            dx if image else None,
            dy if text else None,
            scalars[0] if scale else None,
            scalars[1] if bias else None,
            None,
            None,
            None,
        )


@torch.no_grad()
def _pass(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scales: Tensor,
    biases: Tensor,
    widths: Sequence[int],
    factors: Tensor,
    batch: GlobalBatch,
    wanted: Wanted,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, dL/dx and dL/dy of their sum with these factors, and the gradients of scales and biases.

    dtype: of dL/dx and dL/dy, which are empty tensors where they are not wanted.
    """
    with on_device(image_embeds), torch.autocast(image_embeds.device.type, enabled=False):
        engine = make_prefix_engine(batch.engine, image_embeds, widths, batch.chunk_size)
        work = PrefixPass(
            engine=engine,
            peers=batch.peers,
            x=image_embeds,
            y=text_embeds,
            widths=widths,
            scales=scales,
            biases=biases,
            factors=factors,
            pairs=batch.pairs,
            divisor=batch.divisor,
            wanted=wanted,
        )
        sums = batch.route(work, work.weights)
        dx, dy = (image_embeds.new_empty(0, dtype=dtype) for _ in range(2))
        if wanted.image:
            dx = empty_gradient(image_embeds, widths, dtype)
            work.image_gradient(dx)
        if wanted.text:
            dy = empty_gradient(text_embeds, widths, dtype)
            work.text_gradient(sums, dy)
        losses, scalars = work.results(scales.dtype)
        return losses, dx, dy, scalars


def global_losses(
    module: SigLipLoss,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scales: Scalars,
    logit_biases: Scalars,
    widths: Sequence[int],
    width_weights: Sequence[float] | None,
    options: dict[str, Any],
) -> Tensor:
    """(K,): this rank's losses of the module's global batch, with its options and those of a call."""

    def check(x: Tensor, y: Tensor, engine: str) -> Arguments:
        refuse_unknown(options, CALL_OPTIONS)
        prefixes = Prefixes.of(x.shape[1], logit_scales, logit_biases, widths, width_weights)
        if engine == "triton":
            check_kernel_input(OPERATION, x)
            make_prefix_engine(engine, x, prefixes.widths)  # raises where the kernels cannot run
        scales, biases, weights = prefixes.tensors(x)
        return Arguments(x, y, scales, biases, tuple(prefixes.widths), weights)

    known = {name: value for name, value in options.items() if name in CALL_OPTIONS}
    arguments, batch, positives = module.global_batch(image_embeds, text_embeds, check, **known)
    x, y, scales, biases, checked_widths, weights = arguments
    losses: Tensor = GlobalPrefixLosses.apply(x, y, scales, biases, checked_widths, weights, batch)
    return losses if positives is None else losses / positives
