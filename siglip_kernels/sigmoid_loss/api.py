"""The sigmoid loss op: registration with PyTorch, autograd, the public functions, and the checks of their arguments.

Two operators are registered. `siglip_kernels::sigmoid_loss` computes the loss and, in the same pass, the gradients that
are required (blocks.py); `siglip_kernels::sigmoid_loss_backward` multiplies them by the upstream gradient. Where the
loss of each image is asked for, upstream gradients weight images: `siglip_kernels::sigmoid_losses` computes the losses
and `siglip_kernels::sigmoid_losses_backward` the gradients of their weighted sum, as the first operator does. All take
the name of an engine (engines.py): "triton" or "chunked".
"""

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels import reference
from siglip_kernels.arguments import (
    autocast_dtype,
    cast,
    check_dtype,
    check_same_device,
    check_same_dtype,
    check_tensor,
    wants_gradients,
)
from siglip_kernels.device import on_device
from siglip_kernels.errors import unsupported
from siglip_kernels.sigmoid_loss.blocks import loss_and_gradients, losses_of_images
from siglip_kernels.sigmoid_loss.engines import make_engine, saved_dtype
from siglip_kernels.sigmoid_loss.pairs import PairOptions, Pairs, check_reduction, make_pairs, matches
from siglip_kernels.transforms import refuse_transforms, register_derivative, under_transform

# `plain_sigmoid_loss` is chunked from this many pairs on. With fewer, the logits take less memory than the embeddings
# of common models, and the definition, which can be differentiated twice, is as fast.
CHUNKED_FROM = 1024

LARGEST_WIDTH = 4096


@torch.library.custom_op("siglip_kernels::sigmoid_loss", mutates_args=())
def forward_op(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
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
    """The loss, and the gradients that are required: see `blocks.loss_and_gradients`. The last six make its pairs."""
    with on_device(image_embeds), torch.no_grad(), torch.autocast(image_embeds.device.type, enabled=False):
        return loss_and_gradients(
            make_engine(engine, image_embeds, chunk_size),
            aligned(image_embeds),
            aligned(text_embeds),
            logit_scale,
            logit_bias,
            Pairs(diagonal, image_groups, text_groups, positive_weight, negative_weight, text_weight),
            divisor,
            image_gradient,
            text_gradient,
            scalar_gradients,
        )


def aligned(embeds: Tensor) -> Tensor:
    """Contiguous and starting at a multiple of 16 bytes, as TMA requires: the tensor itself or a copy."""
    embeds = embeds.contiguous()
    return embeds if embeds.data_ptr() % 16 == 0 else embeds.clone()


@forward_op.register_fake
def _(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    engine: str,
    chunk_size: int,
    image_gradient: bool,
    text_gradient: bool,
    scalar_gradients: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    required = image_gradient, text_gradient, scalar_gradients
    dtype = saved_dtype(engine, image_embeds.dtype)
    loss = image_embeds.new_empty((), dtype=logit_scale.dtype)
    return loss, *_empty_gradients(image_embeds, text_embeds, logit_scale, required, dtype)


def _empty_gradients(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    required: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the images and of the texts in this dtype, and of both scalars; without elements if it is not required."""
    images, texts, scalars = required
    return (
        image_embeds.new_empty(image_embeds.shape if images else (0,), dtype=dtype),
        image_embeds.new_empty(text_embeds.shape if texts else (0,), dtype=dtype),
        image_embeds.new_empty((2,) if scalars else (0,), dtype=logit_scale.dtype),
    )


@torch.library.custom_op("siglip_kernels::sigmoid_loss_backward", mutates_args=())
def backward_op(
    upstream: Tensor,
    image_gradient: Tensor,
    text_gradient: Tensor,
    scalar_gradients: Tensor,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The saved gradients times the upstream gradient, in the embeddings' dtype.

    The embeddings and scalars are inputs only so that a double backward reaches the error below.
    """
    with on_device(image_embeds), torch.no_grad():
        scaler = make_engine(engine, image_embeds)
        results = [
            # An engine multiplies in fp32 even where the saved gradient and the result are bf16.
            scaler.scale(saved, upstream, 1.0, torch.empty_like(saved, dtype=image_embeds.dtype))
            if saved.numel()
            else torch.empty_like(saved, dtype=image_embeds.dtype)
            for saved in (image_gradient, text_gradient)
        ]
        return results[0], results[1], scalar_gradients * upstream


@backward_op.register_fake
def _(
    upstream: Tensor,
    image_gradient: Tensor,
    text_gradient: Tensor,
    scalar_gradients: Tensor,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(image_gradient, dtype=image_embeds.dtype),
        torch.empty_like(text_gradient, dtype=image_embeds.dtype),
        torch.empty_like(scalar_gradients),
    )


def _save(ctx, inputs, output) -> None:
    image_embeds, text_embeds, logit_scale, logit_bias, engine, _, *wanted = inputs[:9]
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients, image_embeds, text_embeds, logit_scale, logit_bias)
    ctx.engine, ctx.wanted = engine, wanted
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *_):
    nothing = (None,) * 16
    if upstream is None:
        return nothing
    needed = ctx.needs_input_grad[:4]
    for need, made in zip(needed, (*ctx.wanted[:2], ctx.wanted[2], ctx.wanted[2]), strict=True):
        if need and not made:
            raise RuntimeError(
                "siglip_kernels::sigmoid_loss: a gradient is required that the forward pass was told not to compute"
            )
    dx, dy, scalars = backward_op(upstream, *ctx.saved_tensors, ctx.engine)
    gradients = (dx, dy, scalars[0] if needed[2] else None, scalars[1] if needed[3] else None)
    return tuple(g if need else None for g, need in zip(gradients, needed, strict=True)) + nothing[4:]


register_derivative("sigmoid_loss", forward_op, backward_op, _backward, _save)


@torch.library.custom_op("siglip_kernels::sigmoid_losses", mutates_args=())
def losses_op(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    engine: str,
    chunk_size: int,
    diagonal: int,
    image_groups: Tensor | None,
    text_groups: Tensor | None,
    positive_weight: Tensor | None,
    negative_weight: Tensor | None,
    text_weight: Tensor | None,
) -> Tensor:
    """(N,): the loss of each image, see `blocks.losses_of_images`. The last six make its pairs."""
    with on_device(image_embeds), torch.no_grad(), torch.autocast(image_embeds.device.type, enabled=False):
        return losses_of_images(
            make_engine(engine, image_embeds, chunk_size),
            aligned(image_embeds),
            aligned(text_embeds),
            logit_scale,
            logit_bias,
            Pairs(diagonal, image_groups, text_groups, positive_weight, negative_weight, text_weight),
        )


@losses_op.register_fake
def _(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, *_: Any) -> Tensor:
    return logit_scale.new_empty(image_embeds.shape[0])


@torch.library.custom_op("siglip_kernels::sigmoid_losses_backward", mutates_args=())
def losses_backward_op(
    upstream: Tensor,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    engine: str,
    chunk_size: int,
    image_gradient: bool,
    text_gradient: bool,
    scalar_gradients: bool,
    diagonal: int,
    image_groups: Tensor | None,
    text_groups: Tensor | None,
    positive_weight: Tensor | None,
    negative_weight: Tensor | None,
    text_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The required gradients of Σ upstream · losses, the loss whose images have these weights."""
    pairs = Pairs(diagonal, image_groups, text_groups, positive_weight, negative_weight, text_weight)
    with on_device(image_embeds), torch.no_grad(), torch.autocast(image_embeds.device.type, enabled=False):
        _, dx, dy, scalars = loss_and_gradients(
            make_engine(engine, image_embeds, chunk_size),
            aligned(image_embeds),
            aligned(text_embeds),
            logit_scale,
            logit_bias,
            pairs.weighted(upstream, upstream, len(text_embeds)),
            1,
            image_gradient,
            text_gradient,
            scalar_gradients,
        )
        return dx.to(image_embeds.dtype), dy.to(image_embeds.dtype), scalars


@losses_backward_op.register_fake
def _(
    upstream: Tensor,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    engine: str,
    chunk_size: int,
    image_gradient: bool,
    text_gradient: bool,
    scalar_gradients: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    required = image_gradient, text_gradient, scalar_gradients
    return _empty_gradients(image_embeds, text_embeds, logit_scale, required, image_embeds.dtype)


def _save_losses(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *inputs[7:])
    ctx.engine, ctx.chunk_size, ctx.diagonal = inputs[4:7]


def _backward_losses(ctx, upstream):
    image, text, scale, bias = ctx.needs_input_grad[:4]
    saved = ctx.saved_tensors  # asked for once, as activation checkpointing requires
    dx, dy, scalars = losses_backward_op(
        upstream.contiguous(),
        *saved[:4],
        ctx.engine,
        ctx.chunk_size,
        image,
        text,
        scale or bias,
        ctx.diagonal,
        *saved[4:],
    )
    gradients = dx if image else None, dy if text else None, scalars[0] if scale else None, scalars[1] if bias else None
    return *gradients, *(None,) * 8


register_derivative("sigmoid_loss", losses_op, losses_backward_op, _backward_losses, _save_losses)


# Counting waits for the device: torch.compile leaves it out of its CUDA graphs.
@torch.library.custom_op("siglip_kernels::count_positives", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def count_positives(image_groups: Tensor, text_groups: Tensor, operation: str) -> Tensor:
    """int64, 0-dimensional: how many pairs have equal groups. Raises UnsupportedInputError if none has."""
    count = matches(image_groups, text_groups).sum()
    if not count.is_meta and not bool(count):
        raise unsupported(operation, "reduction", "is 'positives', but there is no positive pair", "one or more")
    return count


@count_positives.register_fake
def _(image_groups: Tensor, text_groups: Tensor, operation: str) -> Tensor:
    return image_groups.new_empty(())


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    image_groups: Tensor | None = None,
    text_groups: Tensor | None = None,
    offset: int | None = None,
    positive_weight: float | Tensor = 1.0,
    negative_weight: float = 1.0,
    image_weight: Tensor | None = None,
    text_weight: Tensor | None = None,
    ignore: int | None = None,
    reduction: str = "images",
    chunk_size: int = 0,
) -> Tensor:
    """The pairwise sigmoid loss in Triton (Zhai et al. 2023, arXiv 2303.15343, equation 1), and those derived from it.

    L = -(1/N) Σᵢⱼ wᵢⱼ log σ(zᵢⱼ (t xᵢ·yⱼ + b)), zᵢⱼ = 1 where pair (i, j) is positive, else -1. Without options the
    pairs i = j are positive, N = M and w = 1.

    image_embeds: (N, D), text_embeds: (M, D), on one CUDA device, fp32, fp16 or bf16 (under autocast they are cast to
    its dtype), N, M >= 1, D from 1 to 4096; normalised by the caller. Tensors that are not contiguous, or whose D is no
    multiple of 8, are copied.
    logit_scale: t, already exponentiated; logit_bias: b; each a number or a floating-point tensor () or (1,).
    image_groups, text_groups: int64 (N,), (M,); pairs of equal groups are positive. A negative group has no positive.
    offset: instead, the pairs i + offset = j are positive; from M on there are none.
    positive_weight, negative_weight: factors w of all such pairs, from 0 on; the former also (N,), one for each image.
    image_weight, text_weight: floating-point (N,), (M,), further factors. Weights are constants, without gradients.
    ignore: images and texts of this group are left out: their pairs weigh 0.
    reduction: what the sum over the pairs is divided by: the number of "images" N, of "pairs" N·M, of "positives"
    (reading it waits for the GPU; with weights also the number); "sum": nothing. "none": (N,), each image's sum.
    chunk_size: the most images per block of logits, rounded up to a multiple of 256; 0 chooses automatically.

    Returns an fp32 scalar, or (N,). Logits and all sums are in at least fp32; fp32 products are IEEE unless
    torch.backends.cuda.matmul allows TF32. Deterministic. Memory is O((N + M)·D) including the gradients, which are
    computed in the forward pass where required; with "none" in the backward pass, which computes logits again. They
    can be used repeatedly but not differentiated again.

    With SIGLIP_KERNELS_HOPPER=1, groups, weights and "none" still compute logits in the portable kernel.

    Raises UnsupportedInputError (a ValueError) for other types, shapes, dtypes, second and forward-mode derivatives and
    differentiation by torch.func, and where "positives" finds none; MissingBackendError for tensors that are not on an
    NVIDIA GPU of compute capability 8.0 or later, unless they are on the CPU and Triton was imported with
    TRITON_INTERPRET=1.
    """
    options: PairOptions = dict(
        image_groups=image_groups,
        text_groups=text_groups,
        offset=offset,
        positive_weight=positive_weight,
        negative_weight=negative_weight,
        image_weight=image_weight,
        text_weight=text_weight,
        ignore=ignore,
    )
    x, y, scale, bias, pairs = _validated("sigmoid_loss", image_embeds, text_embeds, logit_scale, logit_bias, options)
    check_kernel_input("sigmoid_loss", x)
    check_chunk_size("sigmoid_loss", chunk_size)
    return _apply("sigmoid_loss", padded(x), padded(y), scale, bias, pairs, "triton", chunk_size, reduction)


def chunked_sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    chunk_size: int = 0,
    *,
    reduction: str = "images",
    **options: Unpack[PairOptions],
) -> Tensor:
    """`sigmoid_loss` in PyTorch operations, for any device, any floating-point dtype and any D >= 1.

    chunk_size: images per block of logits; 0 chooses automatically. Beyond inputs and gradients, one block of logits is
    in memory, independent of N and M. Returns a result of at least fp32. Raises UnsupportedInputError as `sigmoid_loss`
    does, and where chunk_size is negative or not an integer.
    """
    operation = "chunked_sigmoid_loss"
    arguments = _validated(operation, image_embeds, text_embeds, logit_scale, logit_bias, options)
    check_chunk_size(operation, chunk_size)
    return _apply(operation, *arguments, "chunked", chunk_size, reduction)


def plain_sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    reduction: str = "images",
    **options: Unpack[PairOptions],
) -> Tensor:
    """The loss of backends without kernels: `reference.sigmoid_loss` for fewer than CHUNKED_FROM images and texts,
    which can be differentiated twice, and `chunked_sigmoid_loss` from there on. Takes and raises what the latter does,
    except that transforms of torch.func, forward-mode derivatives and exported graphs, whose number of pairs may vary,
    take the former, in O(N·M) memory.
    """
    operation = "plain_sigmoid_loss"
    _, _, _, _, pairs = _validated(operation, image_embeds, text_embeds, logit_scale, logit_bias, options)
    any_size = torch.compiler.is_exporting() or under_transform()  # asked first: an exporter keeps comparisons of sizes
    if any_size or (image_embeds.shape[0] < CHUNKED_FROM and text_embeds.shape[0] < CHUNKED_FROM):
        check_reduction(operation, reduction)
        if reduction == "positives":
            check_positives(operation, image_embeds, text_embeds, pairs)
        embeds = image_embeds, text_embeds
        return reference.sigmoid_loss(*embeds, logit_scale, logit_bias, reduction=reduction, **options)
    return chunked_sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias, reduction=reduction, **options)


def check_chunk_size(operation: str, chunk_size: int) -> None:
    """Raises unless chunk_size is an integer that is not negative."""
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 0:
        raise unsupported(
            operation, "chunk_size", f"is {chunk_size!r}", "0 (chosen automatically) or a positive integer"
        )


def check_kernel_input(operation: str, embeds: Tensor) -> None:
    """What the kernels ask beyond `chunked_sigmoid_loss`."""
    check_dtype(operation, "image_embeds", embeds)
    width = embeds.shape[1]
    if width > LARGEST_WIDTH:
        raise unsupported(operation, "image_embeds", f"has width {width}", f"1 to {LARGEST_WIDTH}")


def padded(embeds: Tensor) -> Tensor:
    """With zeros up to the next multiple of 8 columns, as TMA requires of bf16: the tensor itself or a copy."""
    missing = -embeds.shape[1] % 8
    return F.pad(embeds, (0, missing)) if missing else embeds


def check_embeds(operation: str, image_embeds: Tensor, text_embeds: Tensor, *, same_length: bool = True) -> None:
    """Raises unless both are (N, D) tensors of one floating-point dtype on one device, with N, D >= 1."""
    for argument, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        check_tensor(operation, argument, embeds)
        if embeds.dim() != 2:
            raise unsupported(operation, argument, f"has shape {tuple(embeds.shape)}", "(N, D)")
        if not embeds.is_floating_point():
            raise unsupported(operation, argument, f"has dtype {embeds.dtype}", "floating-point dtypes")
        if embeds.shape[0] == 0 or embeds.shape[1] == 0:
            raise unsupported(
                operation, argument, f"has shape {tuple(embeds.shape)}", "at least one pair, D at least 1"
            )
    got = f"has shape {tuple(text_embeds.shape)} beside image_embeds' {tuple(image_embeds.shape)}"
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise unsupported(operation, "text_embeds", got, "equal widths")
    if same_length and image_embeds.shape[0] != text_embeds.shape[0]:
        raise unsupported(operation, "text_embeds", got, "as many texts as images; others with groups or an offset")
    check_same_device(operation, "text_embeds", text_embeds, "image_embeds", image_embeds.device)


def as_scalar(operation: str, argument: str, value: Tensor | float, embeds: Tensor) -> Tensor:
    """A 0-dimensional tensor of at least fp32 on the embeddings' device; gradients flow through it to `value`."""
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    if isinstance(value, Tensor):
        check_tensor(operation, argument, value)
        if value.dim() > 1 or value.numel() != 1:
            raise unsupported(operation, argument, f"has shape {tuple(value.shape)}", "a number, () or (1,)")
        if not value.is_floating_point():
            raise unsupported(operation, argument, f"has dtype {value.dtype}", "a number or a floating-point tensor")
        if value.device.type == "meta" != embeds.device.type:
            raise unsupported(operation, argument, "is on meta, and has no value", "a number or a tensor with one")
        return value.reshape(()).to(embeds.device, dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise unsupported(operation, argument, f"is {type(value).__name__}", "a number or a tensor () or (1,)")
    return torch.full((), value, dtype=dtype, device=embeds.device)


def _validated(
    operation: str,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    options: PairOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Pairs]:
    unknown = [name for name in options if name not in PairOptions.__annotations__]
    if unknown:
        raise TypeError(f"{operation}() got an unexpected keyword argument {unknown[0]!r}")
    check_embeds(operation, image_embeds, text_embeds, same_length=same_length(options))
    dtype = autocast_dtype(image_embeds)
    image_embeds, text_embeds = cast(image_embeds, dtype), cast(text_embeds, dtype)
    check_same_dtype(operation, "text_embeds", text_embeds, "image_embeds", image_embeds.dtype)
    scale = as_scalar(operation, "logit_scale", logit_scale, image_embeds)
    bias = as_scalar(operation, "logit_bias", logit_bias, image_embeds)
    return image_embeds, text_embeds, scale, bias, make_pairs(operation, image_embeds, text_embeds, **options)


def same_length(options: PairOptions) -> bool:
    """Whether image i and text i are a pair, so that there must be as many of both."""
    return options.get("image_groups") is None and options.get("text_groups") is None and options.get("offset") is None


def check_positives(operation: str, image_embeds: Tensor, text_embeds: Tensor, pairs: Pairs) -> Tensor | int:
    """The number of positive pairs. Raises UnsupportedInputError if there is none."""
    if pairs.image_groups is not None and pairs.text_groups is not None:
        return count_positives(pairs.image_groups, pairs.text_groups, operation)
    return positives_on_diagonal(operation, image_embeds.shape[0], text_embeds.shape[0], pairs.diagonal)


def positives_on_diagonal(operation: str, images: int, texts: int, diagonal: int) -> int:
    """The number of positive pairs without groups. Raises UnsupportedInputError if there is none."""
    count = min(images, texts - diagonal) - max(0, -diagonal)
    if count < 1:
        raise unsupported(operation, "reduction", "is 'positives', but there is no positive pair", "one or more")
    return count


def _apply(
    operation: str,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    engine: str,
    chunk_size: int,
    reduction: str,
) -> Tensor:
    check_reduction(operation, reduction)
    scalars = dict(logit_scale=logit_scale, logit_bias=logit_bias)
    refuse_transforms(operation, image_embeds=image_embeds, text_embeds=text_embeds, **scalars)
    options = (
        pairs.diagonal,
        pairs.image_groups,
        pairs.text_groups,
        pairs.positive_weight,
        pairs.negative_weight,
        pairs.text_weight,
    )
    if reduction == "none":
        return losses_op(image_embeds, text_embeds, logit_scale, logit_bias, engine, chunk_size, *options)
    images, texts = image_embeds.shape[0], text_embeds.shape[0]
    positives = check_positives(operation, image_embeds, text_embeds, pairs) if reduction == "positives" else 1
    counted = isinstance(positives, Tensor)
    loss, *_gradients = forward_op(
        image_embeds,
        text_embeds,
        logit_scale,
        logit_bias,
        engine,
        chunk_size,
        wants_gradients(image_embeds),
        wants_gradients(text_embeds),
        wants_gradients(logit_scale, logit_bias),
        {"images": images, "pairs": images * texts, "positives": 1 if counted else positives, "sum": 1}[reduction],
        *options,
    )
    return loss / positives if counted else loss
