"""Launches of patch embedding: the patches of published models, a batch and one image."""

from collections.abc import Iterator

import torch

from bench.compiled.launch import NAMES, Launch, precision_name, with_tf32

PUBLISHED = r"^bf16 64 x \S+ patch \d+ width \d+$"


def launches() -> Iterator[Launch]:
    """base (patches of 16 pixels), so400m (14), both for one image, mixed with fp32 positions, and fp32."""
    yield _launch(64, 224, 16, 768, torch.bfloat16)
    yield _launch(64, 384, 14, 1152, torch.bfloat16)
    yield _launch(1, 224, 16, 768, torch.float16)
    yield _launch(1, 384, 14, 1152, torch.bfloat16)
    yield _launch(64, 224, 16, 768, torch.bfloat16, torch.float32)
    yield _launch(64, 224, 16, 768, torch.float32)
    yield _launch(64, 224, 16, 768, torch.float32, allow_tf32=True)


def _launch(
    batch: int,
    side: int,
    patch: int,
    width: int,
    dtype: torch.dtype,
    position_dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
) -> Launch:
    def run() -> None:
        from siglip_kernels.patch_embed.forward import patch_embed_forward

        pixels = torch.empty(batch, 3, side, side, dtype=dtype, device="meta")
        weight = torch.empty(width, 3, patch, patch, dtype=dtype, device="meta")
        tokens = (side // patch) ** 2
        position = torch.empty(1, tokens, width, dtype=position_dtype or dtype, device="meta")
        out_dtype = torch.promote_types(dtype, position.dtype)
        patch_embed_forward(pixels, weight, weight[:, 0, 0, 0], position.expand(batch, -1, -1), out_dtype)

    name = f"{precision_name(dtype, allow_tf32)} {batch} x {side} patch {patch} width {width}"
    name += f" position {NAMES[position_dtype]}" if position_dtype else ""
    return Launch(name, with_tf32(allow_tf32, run))
