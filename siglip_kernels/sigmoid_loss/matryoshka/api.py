"""The sigmoid losses of nested embeddings, whose first columns are embeddings: operators and public function.

`siglip_kernels::matryoshka_sigmoid_loss` computes the losses of all prefixes and, in the same pass, the gradients of
their weighted sum. `siglip_kernels::matryoshka_sigmoid_loss_backward` multiplies them by the upstream gradient; where
that is not the same for all prefixes, it computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.arguments import autocast_dtype, cast, check_same_dtype, given, wants_gradients
from siglip_kernels.device import kernels_run_on, on_device
from siglip_kernels.errors import unsupported
from siglip_kernels.sigmoid_loss.api import (
    check_chunk_size,
    check_embeds,
    check_kernel_input,
    check_positives,
    chunked_sigmoid_loss,
    plain_sigmoid_loss,
    same_length,
    sigmoid_loss,
)
from siglip_kernels.sigmoid_loss.engines import make_engine, saved_dtype
from siglip_kernels.sigmoid_loss.matryoshka.arguments import OPERATION, Prefixes, Scalars, refuse_unknown
from siglip_kernels.sigmoid_loss.matryoshka.blocks import empty_gradient, losses_and_gradients
from siglip_kernels.sigmoid_loss.matryoshka.distributed import global_losses
from siglip_kernels.sigmoid_loss.matryoshka.engines import gradients_early, make_prefix_engine
from siglip_kernels.sigmoid_loss.module import CALL_OPTIONS, SigLipLoss
from siglip_kernels.sigmoid_loss.pairs import PairOptions, Pairs, check_reduction, make_pairs
from siglip_kernels.transforms import refuse_transforms, register_derivative, under_transform


@torch.library.custom_op("siglip_kernels::matryoshka_sigmoid_loss", mutates_args=())
def forward_op(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scales: Tensor,
    logit_biases: Tensor,
    widths: list[int],
    width_weights: Tensor,
    engine: str,
    chunk_size: int,
    image_gradient: bool,
    text_gradient: bool,
    scalar_gradients: bool,
    divisor: int,
    diagonal: int,
    image_groups: Tensor | None,
    text_groups: Tensor | None,
    positive_weight: Tensor | None,
    negative_weight: Tensor | None,
    text_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses times width_weights, and the required gradients of their sum: of the images, of the texts, and (2, K).

    Those of the embeddings are empty tensors where the backward pass computes them (`gradients_early`). The last six
    arguments make the pairs.
    """
    with on_device(image_embeds), torch.no_grad(), torch.autocast(image_embeds.device.type, enabled=False):
        prefix_engine = make_prefix_engine(engine, image_embeds, widths, chunk_size)
        early = gradients_early(engine, image_embeds.device)
        dtype = saved_dtype(engine, image_embeds.dtype)
        dx = empty_gradient(image_embeds, widths, dtype) if early and image_gradient else None
        dy = empty_gradient(text_embeds, widths, dtype) if early and text_gradient else None
        losses, scalars = losses_and_gradients(
            prefix_engine,
            image_embeds,
            text_embeds,
            widths,
            logit_scales,
            logit_biases,
            width_weights,
            Pairs(diagonal, image_groups, text_groups, positive_weight, negative_weight, text_weight),
            divisor,
            dx,
            dy,
            scalar_gradients,
        )
        nothing = image_embeds.new_empty(0, dtype=dtype)
        dx, dy = nothing if dx is None else dx, nothing.clone() if dy is None else dy
        return losses * width_weights, dx, dy, scalars * width_weights if scalar_gradients else scalars


@forward_op.register_fake
def _(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scales: Tensor,
    logit_biases: Tensor,
    widths: list[int],
    width_weights: Tensor,
    engine: str,
    chunk_size: int,
    image_gradient: bool,
    text_gradient: bool,
    scalar_gradients: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    early = gradients_early(engine, image_embeds.device)
    dtype = saved_dtype(engine, image_embeds.dtype)
    return (
        torch.empty_like(logit_scales),
        image_embeds.new_empty(image_embeds.shape if early and image_gradient else (0,), dtype=dtype),
        image_embeds.new_empty(text_embeds.shape if early and text_gradient else (0,), dtype=dtype),
        logit_scales.new_empty((2, len(widths)) if scalar_gradients else (0,)),
    )


@torch.library.custom_op("siglip_kernels::matryoshka_sigmoid_loss_backward", mutates_args=())
def backward_op(
    upstream: Tensor,
    image_gradient: Tensor,
    text_gradient: Tensor,
    scalar_gradients: Tensor,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scales: Tensor,
    logit_biases: Tensor,
    widths: list[int],
    width_weights: Tensor,
    engine: str,
    chunk_size: int,
    want_image: bool,
    want_text: bool,
    divisor: int,
    diagonal: int,
    image_groups: Tensor | None,
    text_groups: Tensor | None,
    positive_weight: Tensor | None,
    negative_weight: Tensor | None,
    text_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of Σ upstream · losses, in the embeddings' dtype; an empty tensor for one that is not wanted.

    The saved gradients times the upstream gradient, if that is the same for all prefixes. The kernels of a pass with
    the actual upstream gradient are launched in any case, since the host does not wait to learn its values, and return
    at once if there is nothing to correct.
    """
    with on_device(image_embeds), torch.no_grad(), torch.autocast(image_embeds.device.type, enabled=False):
        prefix_engine = make_prefix_engine(engine, image_embeds, widths, chunk_size)
        scaler, only_if = make_engine("chunked", image_embeds), None
        if gradients_early(engine, image_embeds.device):
            only_if = (upstream != upstream[0]).any().to(torch.int32)
            scaler = make_engine(engine, image_embeds)
        results: list[Tensor | None] = []
        for wanted, saved, embeds in (
            (want_image, image_gradient, image_embeds),
            (want_text, text_gradient, text_embeds),
        ):
            if wanted and saved.numel():
                result = torch.empty_like(saved, dtype=embeds.dtype)
                results.append(scaler.scale(saved, upstream[0].contiguous(), 1.0, result))
            else:
                results.append(empty_gradient(embeds, widths, embeds.dtype) if wanted else None)
        if want_image or want_text:
            losses_and_gradients(
                prefix_engine,
                image_embeds,
                text_embeds,
                widths,
                logit_scales,
                logit_biases,
                width_weights * upstream,
                Pairs(diagonal, image_groups, text_groups, positive_weight, negative_weight, text_weight),
                divisor,
                results[0],
                results[1],
                False,
                only_if,
            )
        dx, dy = (image_embeds.new_empty(0) if result is None else result for result in results)
        scalars = scalar_gradients * upstream if scalar_gradients.numel() else scalar_gradients.clone()
        return dx, dy, scalars


@backward_op.register_fake
def _(
    upstream: Tensor,
    image_gradient: Tensor,
    text_gradient: Tensor,
    scalar_gradients: Tensor,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scales: Tensor,
    logit_biases: Tensor,
    widths: list[int],
    width_weights: Tensor,
    engine: str,
    chunk_size: int,
    want_image: bool,
    want_text: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        image_embeds.new_empty(image_embeds.shape if want_image else (0,)),
        text_embeds.new_empty(text_embeds.shape if want_text else (0,)),
        torch.empty_like(scalar_gradients),
    )


def _save(ctx, inputs, output) -> None:
    embeds_and_scalars, (ctx.widths, width_weights, ctx.engine, ctx.chunk_size) = inputs[:4], inputs[4:8]
    ctx.divisor, ctx.diagonal, *options = inputs[11:]
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients, *embeds_and_scalars, width_weights, *options)
    ctx.made = inputs[8:11]
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *_):
    nothing = (None,) * 18
    if upstream is None:
        return nothing
    image, text, scale, bias = ctx.needs_input_grad[:4]
    for need, made in zip((image, text, scale or bias), ctx.made, strict=True):
        if need and not made:
            raise RuntimeError(
                "siglip_kernels::matryoshka_sigmoid_loss: a gradient is required that the forward pass was told not to "
                "compute"
            )
    saved = ctx.saved_tensors  # asked for once, as activation checkpointing requires
    dx, dy, scalars = backward_op(
        upstream.contiguous(),
        *saved[:7],
        ctx.widths,
        saved[7],
        ctx.engine,
        ctx.chunk_size,
        image,
        text,
        ctx.divisor,
        ctx.diagonal,
        *saved[8:],
    )
    gradients = dx if image else None, dy if text else None, scalars[0] if scale else None, scalars[1] if bias else None
    return gradients + nothing[4:]


register_derivative("matryoshka_sigmoid_loss", forward_op, backward_op, _backward, _save)


def matryoshka_sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scales: Scalars,
    logit_biases: Scalars,
    widths: Sequence[int],
    *,
    width_weights: Sequence[float] | None = None,
    loss: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """(len(widths),): the loss of the first columns of the embeddings, normalised, for each width.

    Their sum is the objective of matryoshka representation learning (Kusupati et al. 2022, arXiv 2205.13147,
    equation 1).

    image_embeds: (N, D), text_embeds: (M, D), not necessarily normalised: each prefix is, in at least fp32, and rounded
    to the embeddings' dtype. As in torch.nn.functional.normalize, a prefix whose sum of squares overflows becomes
    zeros, without a gradient. logit_scales (already exponentiated), logit_biases: one for all widths, or one for each,
    as a tensor (len(widths),) or a sequence. widths: ascending, from 1 to D.
    width_weights: constant factors of the losses, from 0 on; None: 1.
    loss: None, the default, is `sigmoid_loss` on GPUs that run the kernels, and `chunked_sigmoid_loss` elsewhere, as in
    `SigLipLoss`; within transforms of torch.func and forward-mode differentiation it is `plain_sigmoid_loss`. Any of
    the three may be given; a `SigLipLoss` or `SigLIPPlusLoss`, whose options and process group then apply: with several
    ranks the losses and gradients are a rank's of the global batch, as `siglip_kernels.sigmoid_loss.distributed`
    defines them; and any other function or module that takes the same.
    options: of that loss, such as groups and weights, except reduction="none".

    With `sigmoid_loss`, `chunked_sigmoid_loss` and the modules one pass computes all losses and gradients (blocks.py).
    Its matrix products are those of the widest loss, and only what follows the products is repeated for each width; in
    Triton the columns between two widths are padded to multiples of 64. Ranks exchange texts once for all widths. The
    gradients are those of the sum of the losses; if the losses are weighted afterwards, so that their upstream
    gradients differ, the backward pass computes them again, which `width_weights` avoids. (In PyTorch operations on a
    GPU, the backward pass always computes them, unless there are several ranks.) Memory is O((N + M)·D): beyond that of
    the loss, a normalised copy of the embeddings, and a block of logit gradients for each width, whose size does not
    grow with N and M.
    With any other loss, and with modules that have hooks or overridden methods, each width is a call of its own:
    together they cost the sum of the widths, 2.25 times the widest of 64, 128, 256, 512 and 768.

    Raises UnsupportedInputError and MissingBackendError as the loss does.
    """
    if isinstance(loss, SigLipLoss) and loss.fuses():
        return _of_module(loss, image_embeds, text_embeds, logit_scales, logit_biases, widths, width_weights, options)
    check_embeds(OPERATION, image_embeds, text_embeds, same_length=same_length(options))  # type: ignore[arg-type]
    if options.get("reduction") == "none":
        raise unsupported(OPERATION, "reduction", "is 'none'", "a reduction to one number")
    if not (loss is None or callable(loss)):
        raise unsupported(OPERATION, "loss", f"is {given(loss)}", "None, a function or a module")
    prefixes = Prefixes.of(image_embeds.shape[1], logit_scales, logit_biases, widths, width_weights)
    if loss is None:
        on_gpu = image_embeds.is_cuda and kernels_run_on(image_embeds.device)
        loss = plain_sigmoid_loss if under_transform() else sigmoid_loss if on_gpu else chunked_sigmoid_loss
    if loss is sigmoid_loss or loss is chunked_sigmoid_loss:
        engine = "triton" if loss is sigmoid_loss else "chunked"
        refuse_unknown(options, (*PairOptions.__annotations__, "reduction", "chunk_size"))
        return _fused(engine, image_embeds, text_embeds, prefixes, **options)
    losses = []
    for width, scale, bias, weight in zip(*prefixes, strict=True):
        embeds = (_normalised(values[:, :width]) for values in (image_embeds, text_embeds))
        value = loss(next(embeds), next(embeds), scale, bias, **options)
        if value.dim():
            raise unsupported(OPERATION, "loss", f"returns shape {tuple(value.shape)}", "losses of one number")
        losses.append(value * weight)
    return torch.stack(losses)


def _of_module(
    module: SigLipLoss,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scales: Scalars,
    logit_biases: Scalars,
    widths: Sequence[int],
    width_weights: Sequence[float] | None,
    options: dict[str, Any],
) -> Tensor:
    """The losses with the module's options, of the local or of the global batch."""
    if module.reduction == "none":
        raise unsupported(OPERATION, "loss", "has reduction='none'", "a reduction to one number")
    scalars = logit_scales, logit_biases, widths, width_weights
    if module.world_size == 1:
        refuse_unknown(options, CALL_OPTIONS)
        check_embeds(OPERATION, image_embeds, text_embeds, same_length=same_length(options))  # type: ignore[arg-type]
        prefixes = Prefixes.of(image_embeds.shape[1], *scalars)
        engine, pair_options = module.local_choices(image_embeds, text_embeds, **options)
        chosen: dict[str, Any] = dict(chunk_size=module.chunk_size, reduction=module.reduction, **pair_options)
        return _fused(engine, image_embeds, text_embeds, prefixes, **chosen)
    of_all_ranks = global_losses
    if torch.compiler.is_compiling():  # collectives cause a graph break
        of_all_ranks = torch.compiler.disable(of_all_ranks)
    return of_all_ranks(module, image_embeds, text_embeds, *scalars, options)


def _fused(
    engine: str,
    image_embeds: Tensor,
    text_embeds: Tensor,
    prefixes: Prefixes,
    *,
    chunk_size: int = 0,
    reduction: str = "images",
    **options: Any,
) -> Tensor:
    check_reduction(OPERATION, reduction)
    dtype = autocast_dtype(image_embeds)
    x, y = cast(image_embeds, dtype), cast(text_embeds, dtype)
    check_same_dtype(OPERATION, "text_embeds", y, "image_embeds", x.dtype)
    scale, bias, weight = prefixes.tensors(x)
    pairs = make_pairs(OPERATION, x, y, **options)
    if engine == "triton":
        check_kernel_input(OPERATION, x)
    check_chunk_size(OPERATION, chunk_size)
    refuse_transforms(OPERATION, image_embeds=x, text_embeds=y, logit_scales=scale, logit_biases=bias)
    images, texts = x.shape[0], y.shape[0]
    positives = check_positives(OPERATION, x, y, pairs) if reduction == "positives" else 1
    counted = isinstance(positives, Tensor)
    losses, *_gradients = forward_op(
        x,
        y,
        scale,
        bias,
        prefixes.widths,
        weight,
        engine,
        chunk_size,
        wants_gradients(x),
        wants_gradients(y),
        wants_gradients(scale, bias),
        {"images": images, "pairs": images * texts, "positives": 1 if counted else positives, "sum": 1}[reduction],
        pairs.diagonal,
        pairs.image_groups,
        pairs.text_groups,
        pairs.positive_weight,
        pairs.negative_weight,
        pairs.text_weight,
    )
    return losses / positives if counted else losses


def _normalised(prefix: Tensor) -> Tensor:
    exact = torch.promote_types(prefix.dtype, torch.float32)
    return F.normalize(prefix.to(exact), dim=-1).to(prefix.dtype)
