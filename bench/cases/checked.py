"""The shapes on which `bench.measure.check` compares the kernels with fp64."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from bench.cases import shapes
from bench.cases.shapes import Shape


def _attention(
    tokens: Iterable[int], head_dims: Iterable[int], batch: int = 2, heads: int = 4, peaked: int = 0
) -> tuple[Shape, ...]:
    return tuple(
        shapes.AttentionShape(f"s{length}-d{width}{'-peaked' * (peaked > 0)}", batch, length, heads, width, peaked)
        for width, length in itertools.product(head_dims, tokens)
    )


def _sequences(*sizes: tuple[int, int, int, int]) -> tuple[Shape, ...]:
    """Sequences, the longest, heads and head dim."""
    return tuple(shapes.SequencesShape(f"b{b}-s{s}-h{heads}-d{d}", b, s, heads, d) for b, s, heads, d in sizes)


def _linear(*sizes: tuple[int, int, int]) -> tuple[Shape, ...]:
    return tuple(
        shapes.LinearShape(f"m{m}-k{k}-n{n}{'-residual' * residual}", m, k, n, residual)
        for m, k, n in sizes
        for residual in (False, True)
    )


def _qkv(*sizes: tuple[int, int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.QKVShape(f"m{m}-w{width}", m, width, heads) for m, width, heads in sizes)


def _pre_norm_attention(*sizes: tuple[int, int, int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.PreNormAttentionShape(f"b{b}-s{s}-h{heads}-d{d}", b, s, heads, d) for b, s, heads, d in sizes)


def _mlp(*sizes: tuple[int, int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.MLPShape(f"m{m}-w{width}-h{hidden}", m, width, hidden) for m, width, hidden in sizes)


def _norm(*sizes: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.NormShape(f"m{m}-w{width}", m, width) for m, width in sizes)


def _pool(*sizes: tuple[int, int, int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.PoolShape(f"b{b}-s{s}-w{width}", b, s, width, heads) for b, s, width, heads in sizes)


def _patch(*sizes: tuple[int, int, int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.PatchShape(f"b{b}-i{i}-p{p}-w{width}", b, i, p, width) for b, i, p, width in sizes)


def _resize(*sizes: tuple[int, int, int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.ResizeShape(f"b{b}-{h}x{w}-to-{side}", b, h, w, side) for b, h, w, side in sizes)


def _loss(*sizes: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.LossShape(f"n{n}-d{width}", n, width) for n, width in sizes)


def _grouped_loss(pairs: int, width: int) -> tuple[Shape, ...]:
    return (shapes.LossShape(f"n{pairs}x2-d{width}-weighted", pairs, width, captions=2, weighted=True),)


def _plus_loss(pairs: int, width: int) -> tuple[Shape, ...]:
    return (shapes.LossShape(f"n{pairs}x2-d{width}", pairs, width, captions=2),)


def _rectangular_loss(pairs: int, width: int) -> tuple[Shape, ...]:
    return (shapes.LossShape(f"n{pairs}+{pairs}-d{width}", pairs, width, negatives=pairs),)


# On a GPU: sizes of published models, then sizes that tiles do not divide.
QUICK: dict[str, tuple[Shape, ...]] = {
    "attention": _attention((64, 729), (64, 72), heads=16) + _attention((729,), (64, 72), heads=16, peaked=10),
    "packed_attention": _sequences((4, 729, 16, 72), (4, 256, 12, 64)),
    "padded_attention": _sequences((4, 729, 16, 72), (4, 64, 12, 64)),
    "linear": _linear((729, 1152, 4304)),
    "pre_norm_qkv": _qkv((729, 1152, 16)),
    "pre_norm_attention": _pre_norm_attention((2, 729, 16, 72)),
    "mlp": _mlp((729, 1152, 4304)),
    "pre_norm_mlp": _mlp((729, 1152, 4304)),
    "layer_norm": _norm((729, 1152)),
    "attention_pool": _pool((3, 729, 1152, 16)),
    "patch_embed": _patch((2, 384, 14, 1152)),
    "sigmoid_loss": _loss((2048, 768), (1000, 1152)) + _grouped_loss(1000, 768),
    "siglip_plus_loss": _plus_loss(1000, 768),
    "image_losses": _plus_loss(1000, 768),
    "matryoshka_sigmoid_loss": _loss((1000, 768)),
    "fp8_mlp": _mlp((729, 1152, 4304)),
    "fp8_pre_norm_mlp": _mlp((729, 1152, 4304)),
    "fp8_pre_norm_qkv": _qkv((729, 1152, 16)),
    "fp8_pre_norm_attention": _pre_norm_attention((2, 729, 16, 72)),
    "resize_normalize": _resize((2, 512, 768, 384), (1, 100, 150, 224)),
}
THOROUGH: dict[str, tuple[Shape, ...]] = {
    "attention": _attention((1, 17, 63, 65, 196, 256, 577, 1024, 1025), (64, 72, 80, 88, 128))
    + _attention((65, 577, 1025), (64, 72, 128), peaked=25),
    "packed_attention": _sequences((9, 1025, 12, 64), (40, 17, 4, 128), (5, 196, 16, 88)),
    "padded_attention": _sequences((9, 1025, 12, 64), (40, 17, 4, 128), (5, 196, 16, 88)),
    "linear": _linear((1, 1152, 1152), (46_656, 1152, 1152), (257, 4304, 1152), (65, 768, 3072), (127, 72, 24)),
    "pre_norm_qkv": _qkv((1, 1152, 16), (513, 768, 12), (46_656, 1152, 16)),
    "pre_norm_attention": _pre_norm_attention((3, 64, 16, 72), (2, 196, 12, 64), (1, 1025, 16, 64)),
    "mlp": _mlp((1, 1152, 4304), (513, 768, 3072), (65, 1024, 4096), (46_656, 1152, 4304)),
    "pre_norm_mlp": _mlp((1, 1152, 4304), (513, 768, 3072), (46_656, 1152, 4304)),
    "layer_norm": _norm((1, 768), (46_656, 1152), (1025, 1024), (333, 72)),
    "attention_pool": _pool((1, 1, 768, 12), (5, 196, 768, 12), (2, 1025, 1024, 16)),
    "patch_embed": _patch((3, 224, 16, 768), (1, 512, 16, 768)),
    "sigmoid_loss": _loss((1, 768), (511, 72), (4097, 768), (8192, 1152)) + _rectangular_loss(511, 768),
    "image_losses": _grouped_loss(511, 72),
    "matryoshka_sigmoid_loss": _loss((511, 72), (4097, 1152)),
    "fp8_mlp": _mlp((1, 1152, 4304), (513, 768, 3072), (46_656, 1152, 4304)),
    "fp8_pre_norm_mlp": _mlp((1, 1152, 4304), (513, 768, 3072), (46_656, 1152, 4304)),
    "fp8_pre_norm_qkv": _qkv((1, 1152, 16), (513, 768, 12)),
    "fp8_pre_norm_attention": _pre_norm_attention((3, 64, 16, 72), (2, 196, 12, 64)),
    "resize_normalize": _resize((1, 3000, 4000, 224), (3, 17, 500, 64)),
}
# More than 2^31 elements, where a 32-bit offset would turn negative.
HUGE: dict[str, Shape] = {
    "attention": shapes.AttentionShape("beyond 2^31", 864, 729, 16, 72),
    "linear": shapes.LinearShape("beyond 2^31", 1_900_000, 1152, 1152),
    "layer_norm": shapes.NormShape("beyond 2^31", 1_900_000, 1152),
}
# The interpreter's time grows with the number of tiles: one or two tiles of each kernel.
TINY: dict[str, tuple[Shape, ...]] = {
    "attention": _attention((65, 17), (72,), heads=2) + _attention((65,), (72,), heads=2, peaked=25),
    "packed_attention": _sequences((3, 33, 2, 72)),
    "padded_attention": _sequences((3, 33, 2, 72)),
    "linear": _linear((33, 72, 40)),
    "pre_norm_qkv": _qkv((33, 48, 2)),
    "pre_norm_attention": _pre_norm_attention((2, 17, 2, 24)),
    "mlp": _mlp((33, 48, 72)),
    "pre_norm_mlp": _mlp((33, 48, 72)),
    "layer_norm": _norm((33, 72)),
    "attention_pool": _pool((2, 17, 48, 2)),
    "patch_embed": _patch((2, 28, 14, 48)),
    "sigmoid_loss": _loss((65, 72)) + _grouped_loss(40, 72) + _rectangular_loss(40, 72),
    "siglip_plus_loss": _plus_loss(40, 72),
    "image_losses": _plus_loss(40, 72) + _grouped_loss(40, 72),
    "matryoshka_sigmoid_loss": _loss((40, 72)),
    "fp8_mlp": _mlp((33, 48, 72)),
    "fp8_pre_norm_mlp": _mlp((33, 48, 72)),
    "fp8_pre_norm_qkv": _qkv((33, 48, 2)),
    "fp8_pre_norm_attention": _pre_norm_attention((2, 17, 2, 24)),
    "resize_normalize": _resize((2, 40, 56, 24), (1, 12, 9, 24)),
}
