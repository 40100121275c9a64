"""The sigmoid loss op: registration with PyTorch, autograd, the public functions, and the checks of their arguments.

Two operators are registered. `siglip_kernels::sigmoid_loss` computes the loss and, in the same pass, the gradients that
are required (blocks.py); `siglip_kernels::sigmoid_loss_backward` multiplies them by the upstream gradient. Both take
the name of an engine (engines.py): "triton" or "chunked".
"""

import torch
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
from siglip_kernels.sigmoid_loss.blocks import loss_and_gradients
from siglip_kernels.sigmoid_loss.engines import make_engine, saved_dtype
from siglip_kernels.transforms import refuse_transforms, register_derivative, under_transform

# `plain_sigmoid_loss` is chunked from this many pairs on. With fewer, the logits take less memory than the embeddings
# of common models, and the definition, which can be differentiated twice, is as fast.
CHUNKED_FROM = 1024

LARGEST_WIDTH = 2048


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the gradients that are required: see `blocks.loss_and_gradients`."""
    with on_device(image_embeds), torch.no_grad(), torch.autocast(image_embeds.device.type, enabled=False):
        return loss_and_gradients(
            make_engine(engine, image_embeds, chunk_size),
            aligned(image_embeds),
            aligned(text_embeds),
            logit_scale,
            logit_bias,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = saved_dtype(engine, image_embeds.dtype)
    return (
        image_embeds.new_empty((), dtype=logit_scale.dtype),
        image_embeds.new_empty(image_embeds.shape if image_gradient else (0,), dtype=dtype),
        image_embeds.new_empty(text_embeds.shape if text_gradient else (0,), dtype=dtype),
        image_embeds.new_empty((2,) if scalar_gradients else (0,), dtype=logit_scale.dtype),
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
    image_embeds, text_embeds, logit_scale, logit_bias, engine, _, *wanted = inputs
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients, image_embeds, text_embeds, logit_scale, logit_bias)
    ctx.engine, ctx.wanted = engine, wanted
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *_):
    nothing = (None,) * 9
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


def sigmoid_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float
) -> Tensor:
    """The pairwise sigmoid loss in Triton (Zhai et al. 2023, arXiv 2303.15343, equation 1).

    L = -(1/N) Σᵢⱼ log σ(zᵢⱼ (t xᵢ·yⱼ + b)), zᵢⱼ = 1 where i = j, else -1.

    image_embeds, text_embeds: (N, D) on one CUDA device, fp32, fp16 or bf16 (under autocast they are cast to its
    dtype), N >= 1, D a multiple of 8 up to 2048; normalised by the caller. Non-contiguous tensors are copied.
    logit_scale: t, already exponentiated; logit_bias: b; each a number or a 0-dimensional floating-point tensor.
    Returns an fp32 scalar. Logits and all sums are in at least fp32; fp32 products are IEEE unless
    torch.backends.cuda.matmul allows TF32. Deterministic. Memory is O(N·D) including the gradients, which are computed
    in the forward pass where required. They can be used repeatedly but not differentiated again.

    Raises UnsupportedInputError (a ValueError) for other types, shapes, dtypes, second and forward-mode derivatives and
    differentiation by torch.func, and MissingBackendError for tensors that are not on an NVIDIA GPU of compute
    capability 8.0 or later, unless they are on the CPU and Triton was imported with TRITON_INTERPRET=1.
    """
    embeds = _validated("sigmoid_loss", image_embeds, text_embeds, logit_scale, logit_bias)
    check_kernel_input("sigmoid_loss", embeds[0])
    return _apply("sigmoid_loss", *embeds, "triton", 0)


def chunked_sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    chunk_size: int = 0,
) -> Tensor:
    """`sigmoid_loss` in PyTorch operations, for any device, any floating-point dtype and any D >= 1.

    chunk_size: images per block of logits; 0 chooses automatically. Beyond inputs and gradients, one block of logits is
    in memory, independent of N. Returns a scalar of at least fp32. Raises UnsupportedInputError as `sigmoid_loss`
    does, and where chunk_size is negative or not an integer.
    """
    embeds = _validated("chunked_sigmoid_loss", image_embeds, text_embeds, logit_scale, logit_bias)
    check_chunk_size("chunked_sigmoid_loss", chunk_size)
    return _apply("chunked_sigmoid_loss", *embeds, "chunked", chunk_size)


def plain_sigmoid_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float
) -> Tensor:
    """The loss of backends without kernels: `reference.sigmoid_loss` for fewer than CHUNKED_FROM pairs, which can be
    differentiated twice, and `chunked_sigmoid_loss` from there on. Takes and raises what the latter does, except that
    transforms of torch.func, forward-mode derivatives and exported graphs, whose number of pairs may vary, take the
    former, in O(N²) memory.
    """
    _validated("plain_sigmoid_loss", image_embeds, text_embeds, logit_scale, logit_bias)
    if torch.compiler.is_exporting() or image_embeds.shape[0] < CHUNKED_FROM or under_transform():
        return reference.sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias)
    return chunked_sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias)


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
    if width % 8 or not 8 <= width <= LARGEST_WIDTH:
        raise unsupported(operation, "image_embeds", f"has width {width}", f"multiples of 8 up to {LARGEST_WIDTH}")


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
    if image_embeds.shape[1] != text_embeds.shape[1] or (same_length and image_embeds.shape[0] != text_embeds.shape[0]):
        got = f"has shape {tuple(text_embeds.shape)} beside image_embeds' {tuple(image_embeds.shape)}"
        raise unsupported(operation, "text_embeds", got, "equal shapes")
    check_same_device(operation, "text_embeds", text_embeds, "image_embeds", image_embeds.device)


def as_scalar(operation: str, argument: str, value: Tensor | float, embeds: Tensor) -> Tensor:
    """A 0-dimensional tensor of at least fp32 on the embeddings' device; gradients flow through it to `value`."""
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    if isinstance(value, Tensor):
        check_tensor(operation, argument, value)
        if value.dim() != 0:
            raise unsupported(
                operation, argument, f"has shape {tuple(value.shape)}", "a number or a 0-dimensional tensor"
            )
        if not value.is_floating_point():
            raise unsupported(operation, argument, f"has dtype {value.dtype}", "a number or a floating-point tensor")
        if value.device.type == "meta" != embeds.device.type:
            raise unsupported(operation, argument, "is on meta, and has no value", "a number or a tensor with one")
        return value.to(embeds.device, dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise unsupported(operation, argument, f"is {type(value).__name__}", "a number or a 0-dimensional tensor")
    return torch.full((), value, dtype=dtype, device=embeds.device)


def _validated(
    operation: str,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_embeds(operation, image_embeds, text_embeds)
    dtype = autocast_dtype(image_embeds)
    image_embeds, text_embeds = cast(image_embeds, dtype), cast(text_embeds, dtype)
    check_same_dtype(operation, "text_embeds", text_embeds, "image_embeds", image_embeds.dtype)
    scale = as_scalar(operation, "logit_scale", logit_scale, image_embeds)
    bias = as_scalar(operation, "logit_bias", logit_bias, image_embeds)
    return image_embeds, text_embeds, scale, bias


def _apply(
    operation: str,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    engine: str,
    chunk_size: int,
) -> Tensor:
    scalars = dict(logit_scale=logit_scale, logit_bias=logit_bias)
    refuse_transforms(operation, image_embeds=image_embeds, text_embeds=text_embeds, **scalars)
    loss, *_gradients = forward_op(
        image_embeds,
        text_embeds,
        logit_scale,
        logit_bias,
        engine,
        chunk_size,
        image_gradient=wants_gradients(image_embeds),
        text_gradient=wants_gradients(text_embeds),
        scalar_gradients=wants_gradients(logit_scale, logit_bias),
    )
    return loss
