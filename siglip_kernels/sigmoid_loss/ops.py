"""Registration with torch.library: one operation for both engines, with its shapes and its gradient."""

import importlib.util

import torch
from torch import Tensor

from siglip_kernels.arguments import refuse_second_derivatives
from siglip_kernels.device import hopper_kernels_enabled, interpreting
from siglip_kernels.errors import MissingBackendError
from siglip_kernels.sigmoid_loss.blocks import Engine, loss_and_gradients
from siglip_kernels.sigmoid_loss.torch_engine import PlainEngine


def kernels_available(device: torch.device) -> bool:
    """Whether Triton can run on tensors of this device."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return interpreting()


def make_engine(name: str, embeds: Tensor, chunk_size: int = 0) -> Engine:
    """The engine of this name for embeddings of this dtype, width and device."""
    if name == "triton":
        # Asked here, not with the rest of the validation, because torch.compile cannot trace the question.
        if embeds.device.type != "meta" and not kernels_available(embeds.device):
            raise MissingBackendError(
                f"sigmoid_loss: its kernels need Triton and CUDA tensors, these are on {embeds.device}; "
                "use siglip_kernels.chunked_sigmoid_loss, or a model's backend 'sdpa' or 'eager'"
            )
        # Imported here alone: importing needs no Triton.
        if hopper_kernels_enabled():
            from siglip_kernels.sigmoid_loss.hopper_engine import HopperEngine

            return HopperEngine(embeds, chunk_size)
        from siglip_kernels.sigmoid_loss.triton_engine import TritonEngine, config_for

        return TritonEngine(embeds.dtype, config_for(embeds), chunk_size)
    return PlainEngine(embeds.dtype, embeds.device, chunk_size)


def saved_dtype(engine: str, dtype: torch.dtype) -> torch.dtype:
    """In which dtype the forward pass hands gradients to the backward pass."""
    return dtype if engine == "triton" and dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


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
    """Loss, and the gradients that were asked for (see `blocks.loss_and_gradients`)."""
    with torch.no_grad(), torch.autocast(image_embeds.device.type, enabled=False):
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
    """Rows one after the other from a 16-byte boundary, as the GPU's copy engine reads them; a copy if they are not."""
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
    """The saved gradients times dL, in the embeddings' dtype. The inputs lead a double backward to its error."""
    with torch.no_grad():
        scaler = make_engine(engine, image_embeds)
        results = [
            # The multiplication is in fp32 even where both sides of it are bf16.
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
                "siglip_kernels::sigmoid_loss: a gradient is needed that its forward pass was not asked for"
            )
    dx, dy, scalars = backward_op(upstream, *ctx.saved_tensors, ctx.engine)
    gradients = (dx, dy, scalars[0] if needed[2] else None, scalars[1] if needed[3] else None)
    return tuple(g if need else None for g, need in zip(gradients, needed, strict=True)) + nothing[4:]


forward_op.register_autograd(_backward, setup_context=_save)
backward_op.register_autograd(refuse_second_derivatives("sigmoid_loss"))
