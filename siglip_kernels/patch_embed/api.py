"""The patch_embed op: contract, registration, autograd. The mathematics and the kernel are in forward.py.

The forward is registered as `siglip_kernels::patch_embed`. Its derivatives are two GEMMs without a fused epilogue and
sums, which PyTorch computes, from a copy of the patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.arguments import (
    autocast_dtype,
    cast,
    cast_affine,
    check_dtype,
    check_input,
    check_parameter,
    check_same_device,
    check_tensor,
    unit_stride,
)
from siglip_kernels.device import on_device, require_kernels
from siglip_kernels.errors import unsupported
from siglip_kernels.transforms import refuse_transforms, register_derivative


def _validate(pixel_values: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor) -> tuple[int, int, int]:
    """Raises for every unsupported argument. Traceable: it reads no values.

    Returns the shape of the tokens, (B, S, width).
    """
    check_input("patch_embed", "pixel_values", pixel_values, "(B, C, H, W)")
    _, channels, height, image_width = pixel_values.shape
    shape = (None, channels, None, None)
    check_parameter("patch_embed", "weight", weight, shape, pixel_values, x_name="pixel_values")
    width, _, patch_height, patch_width = weight.shape
    if 0 in weight.shape:
        raise unsupported("patch_embed", "weight", f"has shape {tuple(weight.shape)}", "extents from 1 on")
    check_parameter("patch_embed", "bias", bias, (width,), pixel_values, x_name="pixel_values", optional=True)
    check_tensor("patch_embed", "position", position)
    check_dtype("patch_embed", "position", position)
    check_same_device("patch_embed", "position", position, "pixel_values", pixel_values.device)
    if height < patch_height or image_width < patch_width:
        got = f"has shape {tuple(pixel_values.shape)} while a patch has {patch_height} × {patch_width} pixels"
        raise unsupported("patch_embed", "pixel_values", got, "at least one patch")
    tokens = _tokens(pixel_values, weight)
    fits = position.dim() <= 3 and all(
        given == 1 or wanted in (1, given)
        for given, wanted in zip(reversed(position.shape), reversed(tokens), strict=False)
    )
    if not fits or (position.dim() > 0 and position.shape[-1] not in (1, width)):
        got = f"has shape {tuple(position.shape)} while the tokens have {tokens}"
        raise unsupported("patch_embed", "position", got, "(S, width), or what broadcasts with the tokens")
    return tokens


def _spread(position: Tensor, tokens: tuple[int, int, int]) -> Tensor:
    """position as (B, S, width) with unit last stride, expanded along the axes that it lacks."""
    row = position.expand(*position.shape[:-1], tokens[2]) if position.dim() else position.expand(tokens[2])
    return unit_stride(row).expand(tokens)


@torch.library.custom_op("siglip_kernels::patch_embed", mutates_args=())
def _patch_embed(
    pixel_values: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    require_kernels("patch_embed", "pixel_values", pixel_values)
    from siglip_kernels.patch_embed.forward import patch_embed_forward

    tokens = _tokens(pixel_values, weight)
    with on_device(pixel_values):
        return patch_embed_forward(
            unit_stride(pixel_values),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            None if position is None else _spread(position, tokens),
            out_dtype,
        )


def _tokens(pixel_values: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """The shape of the tokens, (B, S, width)."""
    (batch, _, height, image_width), (width, _, patch_height, patch_width) = pixel_values.shape, weight.shape
    return batch, (height // patch_height) * (image_width // patch_width), width


@_patch_embed.register_fake
def _(pixel_values, weight, bias, position, out_dtype):
    return pixel_values.new_empty(_tokens(pixel_values, weight), dtype=out_dtype)


def _keep(ctx, inputs, output) -> None:
    pixel_values, weight, _, position, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pixel_values, weight)
    ctx.position = None if position is None else (position.shape, position.dtype)


def _differentiate(ctx, out_grad):
    if out_grad is None:
        return (None,) * 5
    pixel_values, weight = ctx.saved_tensors
    needs_pixels, needs_weight, needs_bias, needs_position, _ = ctx.needs_input_grad
    with torch.autocast(out_grad.device.type, enabled=False):  # the forward has chosen the dtypes
        rows = out_grad.reshape(-1, out_grad.shape[-1]).to(weight.dtype)  # [B · S, width]
        return (
            _image(rows @ weight.flatten(1), pixel_values.shape, weight.shape) if needs_pixels else None,
            (rows.T @ _patches(pixel_values, weight.shape)).view(weight.shape) if needs_weight else None,
            out_grad.sum((0, 1), dtype=torch.float32).to(weight.dtype) if needs_bias else None,
            out_grad.sum_to_size(ctx.position[0]).to(ctx.position[1]) if needs_position else None,
            None,
        )


def _patches(pixel_values: Tensor, weight_shape: torch.Size) -> Tensor:
    """A copy of the patches, (B · S, C · p · q)."""
    batch, channels, height, image_width = pixel_values.shape
    _, _, p, q = weight_shape
    down, across = height // p, image_width // q
    cut = pixel_values[:, :, : down * p, : across * q].unflatten(3, (across, q)).unflatten(2, (down, p))
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch * down * across, channels * p * q)


def _image(patches: Tensor, shape: torch.Size, weight_shape: torch.Size) -> Tensor:
    """The reverse of `_patches`: the image of these patches, with zeros beyond the last whole one."""
    batch, channels, height, image_width = shape
    _, _, p, q = weight_shape
    down, across = height // p, image_width // q
    image = patches.view(batch, down, across, channels, p, q).permute(0, 3, 1, 4, 2, 5)
    image = image.reshape(batch, channels, down * p, across * q)
    return F.pad(image, (0, image_width - across * q, 0, height - down * p))


register_derivative("patch_embed", _patch_embed, None, _differentiate, _keep)


def patch_embed(pixel_values: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor) -> Tensor:
    """Non-overlapping patches, each projected to one token, plus its position embedding.

    pixel_values: (B, C, H, W), fp32, fp16 or bf16; weight: (width, C, p, q), a convolution's; bias: (width,) or None,
    all of one dtype. position: (S, width) or a shape that broadcasts with the tokens, of any of these dtypes;
    S = (H // p) · (W // q), and pixels beyond the last whole patch are ignored. Returns (B, S, width) in the dtype to
    which the tokens and position promote, rounded once.

    Images are read in place if their last stride is 1, whatever the others are; otherwise, as with channels_last, they
    are copied. Sums are in fp32; fp32 products honour torch.backends.cuda.matmul.allow_tf32. Under autocast all tensors
    but position are cast as torch.nn.functional.conv2d casts them. Gradients are deterministic; forward-mode
    derivatives and differentiation by torch.func raise an error.

    Raises UnsupportedInputError (a ValueError) for other shapes and dtypes, and MissingBackendError for tensors that
    are not on an NVIDIA GPU of compute capability 8.0 or later, unless they are on the CPU and Triton was imported with
    TRITON_INTERPRET=1.
    """
    dtype = autocast_dtype(pixel_values)
    pixel_values, (weight, bias) = cast(pixel_values, dtype), cast_affine(weight, bias, dtype)
    tokens = _validate(pixel_values, weight, bias, position)
    refuse_transforms("patch_embed", pixel_values=pixel_values, weight=weight, bias=bias, position=position)
    out_dtype = torch.promote_types(pixel_values.dtype, position.dtype)
    if torch.broadcast_shapes(tokens, position.shape) != tokens:  # one token, several positions
        return _patch_embed(pixel_values, weight, bias, None, pixel_values.dtype) + position
    return _patch_embed(pixel_values, weight, bias, position, out_dtype)
