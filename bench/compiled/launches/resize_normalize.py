"""Launches of the resize: photographs and enlarged pictures, to the sizes of published models."""

from collections.abc import Iterator

import torch

from bench.compiled.launch import NAMES, Launch

PUBLISHED = r"^bf16 .* bicubic$"


def launches() -> Iterator[Launch]:
    """Photographs, one whose lines take many taps; pictures that are enlarged; each filter and dtype."""
    for dtype in NAMES:
        for mode in ("bicubic", "bilinear"):
            yield _launch((4000, 3000), 224, mode, dtype)
            yield _launch((100, 150), 384, mode, dtype)


def _launch(shape: tuple[int, int], side: int, mode: str, dtype: torch.dtype) -> Launch:
    def run() -> None:
        from siglip_kernels.resize_normalize.forward import resize_normalize_forward

        image = torch.empty(3, *shape, dtype=torch.uint8, device="meta")
        mean = torch.empty(3, device="meta")
        resize_normalize_forward([image], mean, mean, (side, side), mode, dtype)

    return Launch(f"{NAMES[dtype]} {shape[0]} x {shape[1]} to {side} {mode}", run)
