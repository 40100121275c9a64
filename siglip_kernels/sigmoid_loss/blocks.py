"""The sigmoid loss block by block: every implementation of it is this walk over an engine's three operations.

L = (1/n) Σᵢⱼ softplus(-zᵢⱼ sᵢⱼ), s = t·x yᵀ + b, z = +1 on positives and -1 elsewhere (arXiv 2303.15343, eq. 1).
With G = σ(s) - [positive]: dL/dx = (t/n) G y, dL/dy = (t/n) Gᵀ x, dL/dt = ΣG ⊙ x yᵀ / n, dL/db = ΣG / n.

Loss and gradients together are three matrix products when done in one pass; so gradients that were asked for are made
in the forward pass, from one block of G (rows × columns) at a time, and N × N values never exist. G is kept as it is,
in [-1, 1]: multiplied by t/n first, it would vanish in fp16.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# A diagonal that no block has: where images and texts come from different ranks, no pair is positive.
NO_POSITIVES = 1 << 30


class Engine(Protocol):
    """What differs between implementations. A block is at most `rows` images by `columns` texts."""

    name: str
    rows: int
    columns: int
    logit_grad_dtype: torch.dtype  # of G
    logit_grad_scale: float  # G is stored multiplied by this power of two
    sum_dtype: torch.dtype  # of sums that are not finished, at least fp32
    saved_dtype: torch.dtype  # of finished gradients that wait for the backward pass

    def totals(self, device: torch.device) -> Tensor:
        """Zeros for the sums of the loss, of G ⊙ x yᵀ and of G: shape (3, any)."""

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
        """Adds a block's sums to `totals` and writes its G to `out`. Image i and text i + diagonal are positives."""

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
        """out = (previous + G operand) · logit_scale · factor, unscaled where logit_scale is None. Gᵀ if transposed."""

    def scale(self, source: Tensor, scale: Tensor, factor: float, out: Tensor) -> Tensor:
        """out = source · scale · factor, computed in at least fp32."""


@dataclass
class GradientSum:
    """One side's gradient while it is being summed: in `total`, unscaled, or, where one product is all there is, in
    `result`, scaled.

    total: (n, D) of the engine's sum dtype. started: whether it already holds something.
    """

    total: Tensor | None = None
    started: bool = False
    result: Tensor | None = None

    def add(
        self,
        engine: Engine,
        block: Tensor,
        operand: Tensor,
        transposed: bool,
        rows: slice,
        logit_scale: Tensor,
        factor: float,
    ) -> None:
        """Adds block · operand to these rows."""
        if self.result is not None:
            engine.product(block, operand, transposed, None, self.result[rows], logit_scale, factor)
        elif self.total is not None:
            total = self.total[rows]
            engine.product(block, operand, transposed, total if self.started else None, total, None, 1.0)


def accumulate(
    engine: Engine,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    diagonal: int,
    totals: Tensor,
    scalar_gradients: bool,
    logit_grad: Tensor | None,
    image: GradientSum | None,
    text: GradientSum | None,
    factor: float,
) -> None:
    """Adds all pairs of x (at most engine.rows images) and y (any number) to the totals and to the gradient sums."""
    gradients = scalar_gradients or logit_grad is not None
    for start in range(0, len(y), engine.columns):
        columns = slice(start, min(start + engine.columns, len(y)))
        block = None if logit_grad is None else logit_grad[: len(x), : columns.stop - start]
        engine.logit_grad(x, y[columns], logit_scale, logit_bias, diagonal - start, totals, gradients, block)
        if block is not None and image is not None:
            image.add(engine, block, y[columns], False, slice(None), logit_scale, factor)
            image.started = True
        if block is not None and text is not None:
            text.add(engine, block, x, True, columns, logit_scale, factor)
    if text is not None:
        text.started = True


def workspace(engine: Engine, images: int, texts: int, device: torch.device) -> Tensor:
    """Room for one block of G."""
    shape = (min(engine.rows, round_up(images)), min(engine.columns, round_up(texts)))
    return torch.empty(shape, dtype=engine.logit_grad_dtype, device=device)


def round_up(size: int, multiple: int = 256) -> int:
    """The next multiple; of 256 because that is a multiple of every tile's rows and columns."""
    return -(-size // multiple) * multiple


def loss_and_gradients(
    engine: Engine,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_gradient: bool,
    text_gradient: bool,
    scalar_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, dL/dx, dL/dy and [dL/dt, dL/db] of n pairs; what was not asked for is an empty tensor.

    Beyond the results: one block of G, a row of blocks of dL/dx and, where n is more than a block, dL/dy, in fp32.
    """
    n, width = x.shape
    factor = 1 / (n * engine.logit_grad_scale)
    totals = engine.totals(x.device)
    logit_grad = workspace(engine, n, n, x.device) if image_gradient or text_gradient else None
    # Sums are made in the result itself where its dtype allows.
    in_place = engine.saved_dtype == engine.sum_dtype
    several_columns, several_rows = n > engine.columns, n > engine.rows

    dx = x.new_empty(x.shape if image_gradient else (0,), dtype=engine.saved_dtype)
    row_sum = dx[:0]
    if image_gradient and several_columns and not in_place:
        row_sum = x.new_empty((min(engine.rows, n), width), dtype=engine.sum_dtype)
    dy = x.new_empty(y.shape if text_gradient and (in_place or not several_rows) else (0,), dtype=engine.saved_dtype)
    text = None
    if text_gradient and several_rows:
        text = GradientSum(total=dy if in_place else x.new_empty(y.shape, dtype=engine.sum_dtype))
    elif text_gradient:
        text = GradientSum(result=dy)

    for start in range(0, n, engine.rows):
        rows = slice(start, min(start + engine.rows, n))
        image = None
        if image_gradient and several_columns:
            image = GradientSum(total=dx[rows] if in_place else row_sum[: rows.stop - start])
        elif image_gradient:
            image = GradientSum(result=dx[rows])
        accumulate(
            engine,
            x[rows],
            y,
            logit_scale,
            logit_bias,
            start,
            totals,
            scalar_gradients,
            logit_grad,
            image,
            text,
            factor,
        )
        if image is not None and image.total is not None:
            engine.scale(image.total, logit_scale, factor, dx[rows])

    del logit_grad, row_sum, image  # before the last conversion allocates: it is the peak of the whole
    if text is not None and text.total is not None:
        dy = dy if in_place else x.new_empty(y.shape, dtype=engine.saved_dtype)
        engine.scale(text.total, logit_scale, factor, dy)
    loss, scalars = finish_totals(totals, 1 / n, logit_scale.dtype, scalar_gradients)
    return loss, dx, dy, scalars


def finish_totals(totals: Tensor, factor: float, dtype: torch.dtype, scalar_gradients: bool) -> tuple[Tensor, Tensor]:
    """The loss, and [dL/dt, dL/db] or an empty tensor."""
    sums = (totals.sum(1) * factor).to(dtype)
    return sums[0].clone(), sums[1:].clone() if scalar_gradients else sums.new_empty(0)
