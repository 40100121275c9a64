"""The sigmoid loss block by block: one algorithm on top of an engine's three operations.

L = (1/n) Σᵢⱼ wᵢⱼ softplus(-zᵢⱼ sᵢⱼ), s = t·x yᵀ + b, z = +1 on positives and -1 elsewhere, where w = 1 and n is the
number of images in the paper (arXiv 2303.15343, eq. 1). pairs.py defines z and w.
With G = w (σ(s) - [positive]), the gradient of n L with respect to s (`logit_grad`):

    dL/dx = (t/n) G y,    dL/dy = (t/n) Gᵀ x,    dL/dt = (1/n) Σ G ⊙ x yᵀ,    dL/db = (1/n) Σ G.

In one pass, the loss and all gradients take three matrix products. Required gradients are therefore computed in the
forward pass, from one block of G (rows × columns) at a time, and no N × N matrix is ever stored. G itself is stored, in
[-1, 1], for which weights are divided by a power of two: multiplied by t/n before its products, G would underflow in
fp16.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from siglip_kernels.sigmoid_loss.pairs import Pairs


class Engine(Protocol):
    """What differs between implementations. A block has at most `rows` images and `columns` texts."""

    name: str
    rows: int
    columns: int
    logit_grad_dtype: torch.dtype  # of G
    logit_grad_scale: float  # G is stored multiplied by this power of two
    sum_dtype: torch.dtype  # of partial sums of gradients, at least fp32
    saved_dtype: torch.dtype  # of the gradients that the forward pass saves for the backward pass

    def totals(self, device: torch.device, pairs: Pairs) -> Tensor:
        """Zeros (3, any) that accumulate the loss, G ⊙ x yᵀ and G of these pairs, a block at a time."""

    def image_losses(self, images: int, device: torch.device, pairs: Pairs) -> Tensor:
        """Zeros (any, images) that accumulate each image's share of the loss."""

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
        """Adds a block's sums to `totals` and writes its G, times logit_grad_scale, to `out` unless that is None.

        pairs: of the images and texts of the block. gradients: whether anything beyond the loss is required.
        image_losses: (any, len(x)), the block's part of `Engine.image_losses`, added to unless it is None.
        """

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
        """out = (previous + G operand) · logit_scale · factor, or Gᵀ operand if transposed.

        previous None: nothing is added. logit_scale None: the sum is not multiplied.
        """

    def scale(self, source: Tensor, scale: Tensor, factor: float, out: Tensor) -> Tensor:
        """out = source · scale · factor, computed in at least fp32."""


@dataclass
class GradientSum:
    """The gradient of one side while blocks are added to it.

    total: (n, D) in the engine's sum dtype, not yet multiplied by t/n. started: whether a block has been written to it.
    result: (n, D), final; in place of `total` where a single product gives the gradient.
    """

    total: Tensor | None = None
    started: bool = False
    result: Tensor | None = None

    def add(
        self,
        engine: Engine,
        block: Tensor,
        operand: Tensor,
        rows: slice,
        logit_scale: Tensor,
        factor: float,
        *,
        transposed: bool,
    ) -> None:
        """Adds block · operand, or blockᵀ · operand if transposed, to these rows."""
        if self.result is not None:
            engine.product(
                logit_grad=block,
                operand=operand,
                transposed=transposed,
                previous=None,
                out=self.result[rows],
                logit_scale=logit_scale,
                factor=factor,
            )
        elif self.total is not None:
            total = self.total[rows]
            engine.product(
                logit_grad=block,
                operand=operand,
                transposed=transposed,
                previous=total if self.started else None,
                out=total,
                logit_scale=None,
                factor=1.0,
            )


def accumulate(
    engine: Engine,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    totals: Tensor,
    scalar_gradients: bool,
    logit_grad: Tensor | None,
    image: GradientSum | None,
    text: GradientSum | None,
    gradient_scale: Tensor,
    factor: float,
    image_losses: Tensor | None = None,
) -> None:
    """Adds all pairs of x (at most engine.rows images) and y (any number of texts) to totals and gradients.

    logit_grad: the workspace for a block of G; None where neither image nor text requires a gradient.
    gradient_scale: t, times the unit of the weights (`Pairs.in_units`).
    """
    gradients = scalar_gradients or logit_grad is not None
    for start in range(0, len(y), engine.columns):
        columns = slice(start, min(start + engine.columns, len(y)))
        block = None if logit_grad is None else logit_grad[: len(x), : columns.stop - start]
        engine.logit_grad(
            x=x,
            y=y[columns],
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            pairs=pairs.part(slice(None), columns),
            totals=totals,
            gradients=gradients,
            out=block,
            image_losses=image_losses,
        )
        if block is not None and image is not None:
            image.add(engine, block, y[columns], slice(None), gradient_scale, factor, transposed=False)
            image.started = True
        if block is not None and text is not None:
            text.add(engine, block, x, columns, gradient_scale, factor, transposed=True)
    if text is not None:
        text.started = True


def workspace(engine: Engine, images: int, texts: int, device: torch.device) -> Tensor:
    """Memory for one block of G."""
    shape = (min(engine.rows, round_up(images)), min(engine.columns, round_up(texts)))
    return torch.empty(shape, dtype=engine.logit_grad_dtype, device=device)


def round_up(size: int, multiple: int = 256) -> int:
    """The next multiple, by default of 256, which every tile's rows and columns divide."""
    return -(-size // multiple) * multiple


def loss_and_gradients(
    engine: Engine,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    divisor: int,
    image_gradient: bool,
    text_gradient: bool,
    scalar_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, dL/dx, dL/dy and [dL/dt, dL/db]; a gradient that is not required is an empty tensor.

    x: (n, D); y: (m, D); pairs: all of theirs. The sum over the pairs is divided by `divisor`. Temporary memory: one
    block of G, and in fp32 dL/dx of one block's images and, where n exceeds a block, dL/dy.
    """
    (n, width), m = x.shape, len(y)
    factor = 1 / (divisor * engine.logit_grad_scale)
    pairs, unit = pairs.in_units()
    gradient_scale = logit_scale if unit is None else logit_scale * unit
    totals = engine.totals(x.device, pairs)
    logit_grad = workspace(engine, n, m, x.device) if image_gradient or text_gradient else None
    # Partial sums accumulate in the result itself where its dtype allows.
    in_place = engine.saved_dtype == engine.sum_dtype
    several_columns, several_rows = m > engine.columns, n > engine.rows

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
            engine=engine,
            x=x[rows],
            y=y,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            pairs=pairs.part(rows, slice(None)),
            totals=totals,
            scalar_gradients=scalar_gradients,
            logit_grad=logit_grad,
            image=image,
            text=text,
            gradient_scale=gradient_scale,
            factor=factor,
        )
        if image is not None and image.total is not None:
            engine.scale(image.total, gradient_scale, factor, dx[rows])

    del logit_grad, row_sum, image  # before the last conversion allocates, which is where memory peaks
    if text is not None and text.total is not None:
        dy = dy if in_place else x.new_empty(y.shape, dtype=engine.saved_dtype)
        engine.scale(text.total, gradient_scale, factor, dy)
    loss, scalars = finish_totals(totals, 1 / divisor, unit, logit_scale.dtype, scalar_gradients)
    return loss, dx, dy, scalars


def losses_of_images(
    engine: Engine, x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs
) -> Tensor:
    """(n,): for each image of x (n, D), the sum over the texts y (m, D)."""
    pairs, unit = pairs.in_units()
    totals, losses = engine.totals(x.device, pairs), engine.image_losses(len(x), x.device, pairs)
    for start in range(0, len(x), engine.rows):
        rows = slice(start, min(start + engine.rows, len(x)))
        accumulate(
            engine=engine,
            x=x[rows],
            y=y,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            pairs=pairs.part(rows, slice(None)),
            totals=totals,
            scalar_gradients=False,
            logit_grad=None,
            image=None,
            text=None,
            gradient_scale=logit_scale,
            factor=1.0,
            image_losses=losses[:, rows],
        )
    sums = losses.sum(0)
    return (sums if unit is None else sums * unit).to(logit_scale.dtype)


def finish_totals(
    totals: Tensor, factor: float, unit: Tensor | None, dtype: torch.dtype, scalar_gradients: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and [dL/dt, dL/db] if required, else an empty tensor.

    totals: `Engine.totals`, complete. unit: of the weights (`Pairs.in_units`).
    """
    sums = totals.sum(1) * factor
    sums = (sums if unit is None else sums * unit).to(dtype)
    return sums[0].clone(), sums[1:].clone() if scalar_gradients else sums.new_empty(0)
