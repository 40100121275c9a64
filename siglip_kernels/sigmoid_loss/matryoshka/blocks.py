"""The losses of K prefixes of the embeddings and all their gradients, in the three matrix products of the widest loss.

Width wₖ of the K ascending widths cuts off segment k, the columns from wₖ₋₁ to wₖ. With aᵢₖ = 1/‖xᵢ[:wₖ]‖ and
cⱼₖ = 1/‖yⱼ[:wₖ]‖, both sides are normalised segment by segment, x̂ᵢ[k] = aᵢₖ xᵢ[k], no element of which exceeds 1. Then
the cosine of a prefix is that of the one before, rescaled by the ratios of norms, plus one segment's product,

    cosᵢⱼₖ = (aᵢₖ/aᵢₖ₋₁) (cⱼₖ/cⱼₖ₋₁) cosᵢⱼₖ₋₁ + x̂ᵢ[k]·ŷⱼ[k],

so that one pass over the columns has all cosines one after another in its accumulator. For each, the loss and
Gₖ = σ(tₖ cosₖ + bₖ) - [positive], weighted, follow as in `siglip_kernels.sigmoid_loss.blocks`.

The gradient with respect to segment s is that of all prefixes k ≥ s. For a sum of losses with the factors uₖ,

    dx[s] = τₛ aᵢₛ (Hₛ ŷ[s] - rᵢₛ x̂[s]),
    Hᵢⱼₛ = Σₖ≥ₛ (tₖ uₖ/τₛ) (aᵢₖ/aᵢₛ) (cⱼₖ/cⱼₛ) Gᵢⱼₖ,    rᵢₛ = Σₖ≥ₛ (tₖ uₖ/τₛ) (aᵢₖ/aᵢₛ)² Σⱼ Gᵢⱼₖ cosᵢⱼₖ

and likewise dy[s] = τₛ cⱼₛ (Hₛᵀ x̂[s] - qⱼₛ ŷ[s]): each segment takes part in two products, whatever K. τₛ is a power
of two above Σₖ≥ₛ |tₖ uₖ|, which keeps H, of which one block is stored, within [-1, 1]. H and r are recurrences from the
widest prefix to the narrowest, whose factors are at most 1 as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from siglip_kernels.sigmoid_loss.blocks import round_up
from siglip_kernels.sigmoid_loss.pairs import Pairs, power_of_two_above


@dataclass(frozen=True)
class Segments:
    """Where the segments are, in embeddings and in their normalised copies, which pad each of them with zeros."""

    widths: tuple[int, ...]  # ascending
    padding: int  # a copy's segments begin at multiples of it

    @property
    def ends(self) -> tuple[int, ...]:
        """Where the segments end in the copies, padding included."""
        ends, end, before = [], 0, 0
        for width in self.widths:
            end, before = end + round_up(width - before, self.padding), width
            ends.append(end)
        return tuple(ends)

    def slices(self) -> list[tuple[slice, slice]]:
        """For each segment its columns in the embeddings, and as many in the copies."""
        starts, firsts = (0, *self.widths[:-1]), (0, *self.ends[:-1])
        return [
            (slice(start, end), slice(first, first + end - start))
            for start, end, first in zip(starts, self.widths, firsts, strict=True)
        ]


class Side(NamedTuple):
    """Images or texts, normalised."""

    normalised: Tensor  # (n, Segments.ends[-1]): x̂, in the embeddings' dtype
    inverse_norms: Tensor  # (K, n), at least fp32: a
    ratios: Tensor  # (K, n): aₖ/aₖ₋₁, and 0 if aₖ = 0, since the squares overflow; of the first any finite number

    @staticmethod
    def of(normalised: Tensor, inverse_norms: Tensor) -> Side:
        ratios = torch.ones_like(inverse_norms)
        wider, narrower = inverse_norms[1:], inverse_norms[:-1]
        torch.div(wider, narrower.masked_fill(wider == 0, 1), out=ratios[1:])
        return Side(normalised, inverse_norms, ratios)

    def part(self, rows: slice) -> Side:
        return Side(self.normalised[rows], self.inverse_norms[:, rows], self.ratios[:, rows])


class Shares(NamedTuple):
    """The parts of the prefixes in the gradient of each segment, (K,) each, at least fp32."""

    own: Tensor  # tₛ uₛ/τₛ
    wider: Tensor  # τₛ₊₁/τₛ, and 0 for the last
    unit: Tensor  # τ

    @staticmethod
    def of(scales: Tensor, factors: Tensor) -> Shares:
        """scales, factors: (K,), t and u."""
        count = len(scales)
        unit = power_of_two_above((scales * factors).abs().expand(count, count).triu().sum(1))
        wider = torch.zeros_like(unit)
        torch.div(unit[1:], unit[:-1], out=wider[:-1])
        return Shares(scales * factors / unit, wider, unit)


class PrefixEngine(Protocol):
    """What differs between implementations; `rows` to `sum_dtype` as in `siglip_kernels.sigmoid_loss.blocks.Engine`.

    only_if: None, or an integer tensor (); where it is 0, nothing is done, so that a pass may be taken back without
    waiting for the device.
    """

    rows: int
    columns: int
    logit_grad_dtype: torch.dtype
    logit_grad_scale: float
    sum_dtype: torch.dtype
    padding: int  # of Segments

    def skips(self, only_if: Tensor | None) -> bool:
        """Whether the engine can tell that only_if is 0."""

    def normalise(self, embeds: Tensor, segments: Segments) -> Side: ...

    def totals(self, count: int, device: torch.device, pairs: Pairs) -> Tensor:
        """Zeros (count, 3, any) that accumulate each prefix's loss, G ⊙ cos and G, a block at a time."""

    def dots(self, count: int, size: int, of_images: bool, device: torch.device, pairs: Pairs) -> Tensor:
        """Zeros (count, any, size) that accumulate Σ G ⊙ cos of each image, or of each text."""

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
        """Adds a block's sums to `totals` and to the dots, unless those are None, and writes its H, times
        logit_grad_scale, to `out`, the workspace (K, rows, columns), unless that is None.

        gradients: whether anything beyond the losses is required.
        """

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
        """out[s] = Hₛ operand[s], or Hₛᵀ operand[s] if transposed, for each segment s; added to out[s] if `add`.

        logit_grad: the workspace (K, rows, columns), whose first rows and columns are a block's. operand, out:
        (n, Segments.ends[-1]).
        """

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
        """out[s] = factor · τₛ aₛ (sums[s] / logit_grad_scale - rₛ x̂[s]). dots: (K, n), Σ G ⊙ cos. factor: ()."""


@dataclass
class PrefixSum:
    """The gradient of one side while blocks are added to it. Both are of at least fp32, and not yet `finish`ed."""

    total: Tensor  # (n, Segments.ends[-1])
    dots: Tensor  # `PrefixEngine.dots`
    started: bool = False  # whether a block has been written to `total`

    @staticmethod
    def empty(
        engine: PrefixEngine, segments: Segments, rows: int, of_images: bool, device: torch.device, pairs: Pairs
    ) -> PrefixSum:
        total = torch.empty((rows, segments.ends[-1]), dtype=engine.sum_dtype, device=device)
        return PrefixSum(total, engine.dots(len(segments.widths), rows, of_images, device, pairs))

    def part(self, rows: slice) -> PrefixSum:
        return PrefixSum(self.total[rows], self.dots[:, :, rows], self.started)

    def each(self) -> Tensor:
        """(K, n): Σ G ⊙ cos."""
        return self.dots.sum(1)[:, : len(self.total)]


@dataclass(frozen=True)
class Walk:
    """One pass over blocks of pairs."""

    engine: PrefixEngine
    segments: Segments
    scales: Tensor
    biases: Tensor
    shares: Shares
    totals: Tensor
    gradients: bool  # whether anything beyond the losses is required
    logit_grad: Tensor | None  # `workspace`, where embeddings require gradients
    only_if: Tensor | None = None

    @staticmethod
    def workspace(engine: PrefixEngine, segments: Segments, images: int, texts: int, device: torch.device) -> Tensor:
        """Memory for H of one block."""
        shape = len(segments.widths), min(engine.rows, round_up(images)), min(engine.columns, round_up(texts))
        return torch.empty(shape, dtype=engine.logit_grad_dtype, device=device)

    def add(self, image: Side, text: Side, pairs: Pairs, images: PrefixSum | None, texts: PrefixSum | None) -> None:
        """Adds all pairs of at most engine.rows images and any number of texts to the totals and to the sums."""
        engine = self.engine
        for start in range(0, len(text.normalised), engine.columns):
            columns = slice(start, min(start + engine.columns, len(text.normalised)))
            of_block = text.part(columns)
            text_sum = None if texts is None else texts.part(columns)
            engine.prefix_logit_grad(
                image=image,
                text=of_block,
                segments=self.segments,
                scales=self.scales,
                biases=self.biases,
                shares=self.shares,
                pairs=pairs.part(slice(None), columns),
                totals=self.totals,
                gradients=self.gradients,
                out=self.logit_grad,
                image_dots=None if images is None else images.dots,
                text_dots=None if text_sum is None else text_sum.dots,
                only_if=self.only_if,
            )
            if self.logit_grad is not None and images is not None:
                self._multiply(self.logit_grad, of_block, images, transposed=False)
                images.started = True
            if self.logit_grad is not None and text_sum is not None:
                self._multiply(self.logit_grad, image, text_sum, transposed=True)
        if texts is not None:
            texts.started = True

    def _multiply(self, logit_grad: Tensor, operand: Side, out: PrefixSum, *, transposed: bool) -> None:
        self.engine.prefix_product(
            logit_grad=logit_grad,
            operand=operand.normalised,
            segments=self.segments,
            transposed=transposed,
            add=out.started,
            out=out.total,
            only_if=self.only_if,
        )


def empty_gradient(embeds: Tensor, widths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a gradient of the embeddings, contiguous, whose columns past the widest prefix are zeros."""
    gradient = embeds.new_empty(embeds.shape, dtype=dtype)
    gradient[:, widths[-1] :] = 0
    return gradient


def losses_and_gradients(
    engine: PrefixEngine,
    x: Tensor,
    y: Tensor,
    widths: Sequence[int],
    scales: Tensor,
    biases: Tensor,
    factors: Tensor,
    pairs: Pairs,
    divisor: int,
    dx: Tensor | None,
    dy: Tensor | None,
    scalar_gradients: bool,
    only_if: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(K,): the losses, and (2, K): their gradients with respect to their own scale and bias, or an empty tensor.

    x: (n, D); y: (m, D); scales, biases: (K,). The sum over the pairs is divided by `divisor`. Writes the first
    widths[-1] columns of the gradients of Σₖ factorsₖ lossₖ to dx and dy, unless those are None. only_if: as in
    `PrefixEngine`, of the whole pass.

    Temporary memory: normalised copies of x and y, one block of H for each width, and in fp32 dL/dx of one block's
    images and dL/dy.
    """
    segments, count, (n, m) = Segments(tuple(widths), engine.padding), len(widths), (len(x), len(y))
    if engine.skips(only_if):
        return scales.new_empty(count), scales.new_empty(0)
    image, text = engine.normalise(x, segments), engine.normalise(y, segments)
    pairs, weight_unit = pairs.in_units()
    shares = Shares.of(scales, factors)
    factor = scales.new_full((), 1 / divisor)
    factor = factor if weight_unit is None else factor * weight_unit
    embeds_require = dx is not None or dy is not None
    walk = Walk(
        engine=engine,
        segments=segments,
        scales=scales,
        biases=biases,
        shares=shares,
        totals=engine.totals(count, x.device, pairs),
        gradients=scalar_gradients or embeds_require,
        logit_grad=Walk.workspace(engine, segments, n, m, x.device) if embeds_require else None,
        only_if=only_if,
    )
    # Memory for the images of a block, which later blocks overwrite.
    images = None if dx is None else PrefixSum.empty(engine, segments, min(engine.rows, n), True, x.device, pairs)
    texts = None if dy is None else PrefixSum.empty(engine, segments, m, False, x.device, pairs)

    for first in range(0, n, engine.rows):
        rows = slice(first, min(first + engine.rows, n))
        of_block = None
        if images is not None:
            of_block = images.part(slice(rows.stop - first))
            of_block.dots.zero_()
        side = image.part(rows)
        walk.add(side, text, pairs.part(rows, slice(None)), of_block, texts)
        if dx is not None and of_block is not None:
            engine.finish(of_block.total, side, segments, of_block.each(), shares, factor, dx[rows], only_if)
    if dy is not None and texts is not None:
        engine.finish(texts.total, text, segments, texts.each(), shares, factor, dy, only_if)
    sums = (walk.totals.sum(2) * factor).to(scales.dtype)
    return sums[:, 0].clone(), sums[:, 1:].T.contiguous() if scalar_gradients else sums.new_empty(0)
