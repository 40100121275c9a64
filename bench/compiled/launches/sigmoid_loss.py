"""Launches of the sigmoid loss: training and inference, one block of pairs and several."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.compiled.launch import Launch, with_kernels_for, with_tf32

PUBLISHED = "^bf16 D=768 train"
HOPPER_PUBLISHED = "^bf16 D=768 train"


def launches() -> Iterator[Launch]:
    """Several blocks of pairs exercise every variant of the kernels; one block writes its outputs directly."""
    yield Launch("bf16 D=768 train, blocks", lambda: _train(torch.bfloat16, 12_000, 768))
    yield Launch("bf16 D=1152 train, blocks", lambda: _train(torch.bfloat16, 12_000, 1152))
    yield Launch("bf16 D=768 inference", lambda: _loss(torch.bfloat16, 1000, 768, gradients=False, scalars=False))
    yield Launch("fp16 D=72 train, one block", lambda: _train(torch.float16, 1000, 72))
    for options in ("no options", "groups", "weights", "groups, weights"):
        yield Launch(f"bf16 D=768 {options}", with_options(options))
    for allow_tf32, name in ((False, "fp32"), (True, "tf32")):
        train = with_tf32(allow_tf32, lambda: _train(torch.float32, 1000, 768))
        yield Launch(f"{name} D=768 train, one block", train)


def hopper_launches() -> Iterator[Launch]:
    """Training with several blocks and with one, and the gradients of the scalars alone."""
    yield Launch("bf16 D=768 train, blocks", with_kernels_for("hopper", lambda: _loss(torch.bfloat16, 6000, 768)))
    yield Launch("fp16 D=1152 train, one block", with_kernels_for("hopper", lambda: _loss(torch.float16, 1000, 1152)))
    yield Launch(
        "bf16 D=768 scalars", with_kernels_for("hopper", lambda: _loss(torch.bfloat16, 1000, 768, gradients=False))
    )


def with_options(options: str) -> Callable[[], None]:
    """Training with some options, and the losses of images; one block, since the products know no options."""

    def launch() -> None:
        from siglip_kernels.sigmoid_loss.blocks import loss_and_gradients, losses_of_images
        from siglip_kernels.sigmoid_loss.engines import make_engine
        from siglip_kernels.sigmoid_loss.pairs import Pairs

        x, scalar = torch.empty(1000, 768, dtype=torch.bfloat16, device="meta"), torch.empty((), device="meta")
        groups = torch.empty(1000, dtype=torch.int64, device="meta") if "groups" in options else None
        weight = torch.empty(1000, device="meta") if "weights" in options else None
        engine, pairs = make_engine("triton", x), Pairs(0, groups, groups, weight, weight, weight)
        loss_and_gradients(engine, x, x, scalar, scalar, pairs, 1000, True, True, True)
        losses_of_images(engine, x, x, scalar, scalar, pairs)

    return launch


def _loss(dtype: torch.dtype, pairs: int, width: int, gradients: bool = True, scalars: bool = True) -> Any:
    """The loss, with gradients of the embeddings and of the scalars; returns the engine."""
    from siglip_kernels.sigmoid_loss.blocks import loss_and_gradients
    from siglip_kernels.sigmoid_loss.engines import make_engine
    from siglip_kernels.sigmoid_loss.pairs import Pairs

    x, scalar = torch.empty(pairs, width, dtype=dtype, device="meta"), torch.empty((), device="meta")
    engine = make_engine("triton", x)
    loss_and_gradients(engine, x, x, scalar, scalar, Pairs(), pairs, gradients, gradients, scalars)
    return engine


def _train(dtype: torch.dtype, pairs: int, width: int) -> None:
    """The loss, and the scaling of its gradients in the backward pass."""
    engine = _loss(dtype, pairs, width)
    x, scalar = torch.empty(pairs, width, dtype=dtype, device="meta"), torch.empty((), device="meta")
    engine.scale(torch.empty(pairs, width, dtype=engine.saved_dtype, device="meta"), scalar, 1.0, x)
