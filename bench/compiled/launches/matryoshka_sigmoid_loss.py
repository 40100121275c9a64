"""Launches of the losses of prefixes: training and inference, with and without options, several blocks of pairs."""

from collections.abc import Callable, Iterator

import torch

from bench.compiled.launch import Launch, with_tf32

PUBLISHED = "^bf16 D=768 train$"
WIDTHS = (64, 128, 256, 512, 768)


def launches() -> Iterator[Launch]:
    yield Launch("bf16 D=768 train", _losses(torch.bfloat16))
    yield Launch("bf16 D=768 train, one width", _losses(torch.bfloat16, widths=WIDTHS[-1:]))
    yield Launch("bf16 D=768 corrections", _losses(torch.bfloat16, corrections=True))
    yield Launch("bf16 D=768 inference", _losses(torch.bfloat16, gradients=False))
    for options in ("groups", "weights", "groups, weights"):
        yield Launch(f"bf16 D=768 {options}", _losses(torch.bfloat16, options))
    yield Launch("fp16 widths 24, 100, 1100", _losses(torch.float16, widths=(24, 100, 1100)))
    yield Launch("bf16 widths 1, 130, 1024, 4096", _losses(torch.bfloat16, widths=(1, 130, 1024, 4096)))
    for allow_tf32, name in ((False, "fp32"), (True, "tf32")):
        yield Launch(f"{name} D=768 train", with_tf32(allow_tf32, _losses(torch.float32)))


def _losses(
    dtype: torch.dtype,
    options: str = "",
    widths: tuple[int, ...] = WIDTHS,
    gradients: bool = True,
    corrections: bool = False,
) -> Callable[[], None]:
    """corrections: the pass of the backward, which ends at once if there is nothing to correct."""

    def launch() -> None:
        from siglip_kernels.sigmoid_loss.matryoshka.blocks import losses_and_gradients
        from siglip_kernels.sigmoid_loss.matryoshka.engines import make_prefix_engine
        from siglip_kernels.sigmoid_loss.pairs import Pairs

        one = torch.empty(1, widths[-1], dtype=dtype, device="meta")
        engine = make_prefix_engine("triton", one, widths)
        pairs = engine.rows + 256  # four blocks, which take every variant of the kernels
        x = one.expand(pairs, -1).contiguous()
        scalars = torch.empty(len(widths), device="meta")
        groups = torch.empty(pairs, dtype=torch.int64, device="meta") if "groups" in options else None
        weight = torch.empty(pairs, device="meta") if "weights" in options else None
        dx, dy = (torch.empty_like(x), torch.empty_like(x)) if gradients else (None, None)
        only_if = torch.empty((), dtype=torch.int32, device="meta") if corrections else None
        losses_and_gradients(
            engine,
            x,
            x,
            widths,
            scalars,
            scalars,
            scalars,
            Pairs(0, groups, groups, weight, weight, weight),
            pairs,
            dx,
            dy,
            gradients and not corrections,
            only_if,
        )

    return launch
