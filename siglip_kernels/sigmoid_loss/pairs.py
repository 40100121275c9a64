"""Which image-text pairs are positive and how much each of them counts: the options that all sigmoid losses share.

They change the sign z and the weight w of a pair's loss, w softplus(-z s), and nothing else, so that every loss is one
algorithm (blocks.py): the paper's, whose positives are the diagonal; several positives per image, by group ids; weights
of images, of texts and of positives; and SigLIP+, which weights the positives (`plus_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from siglip_kernels.arguments import check_same_device, check_shape, check_tensor, given
from siglip_kernels.errors import unsupported

# A diagonal outside of every block: no pair is positive, as between images and texts of different ranks.
NO_POSITIVES = 1 << 30

REDUCTIONS = ("images", "pairs", "positives", "sum", "none")


class PairOptions(TypedDict, total=False):
    """Options of `sigmoid_loss`, which documents them."""

    image_groups: Tensor | None
    text_groups: Tensor | None
    offset: int | None
    positive_weight: float | Tensor
    negative_weight: float
    image_weight: Tensor | None
    text_weight: Tensor | None
    ignore: int | None


@dataclass(frozen=True)
class Pairs:
    """Signs and weights of the pairs of n images and m texts.

    diagonal: image i and text i + diagonal are positive, unless there are groups.
    image_groups (n,), text_groups (m,): int64; equal ids are positive. -1 of an image and -2 of a text equal none.
    positive_weight, negative_weight (n,), text_weight (m,): all of at least fp32, or all None, which is 1. The weight
    of a pair is that of its image in positive or in negative pairs times that of its text.
    """

    diagonal: int = 0
    image_groups: Tensor | None = None
    text_groups: Tensor | None = None
    positive_weight: Tensor | None = None
    negative_weight: Tensor | None = None
    text_weight: Tensor | None = None

    def part(self, images: slice, texts: slice) -> Pairs:
        """The pairs of these images and these texts."""

        def of(values: Tensor | None, rows: slice) -> Tensor | None:
            return None if values is None else values[rows]

        return Pairs(
            self.diagonal + (images.start or 0) - (texts.start or 0),
            of(self.image_groups, images),
            of(self.text_groups, texts),
            of(self.positive_weight, images),
            of(self.negative_weight, images),
            of(self.text_weight, texts),
        )

    def weighted(self, positive: Tensor, negative: Tensor, texts: int) -> Pairs:
        """The weights of each image in positive and in negative pairs multiplied by (n,) each. texts: m."""
        if self.positive_weight is None or self.negative_weight is None:
            ones = positive.new_ones(texts)
            return replace(self, positive_weight=positive, negative_weight=negative, text_weight=ones)
        positive, negative = self.positive_weight * positive, self.negative_weight * negative
        return replace(self, positive_weight=positive, negative_weight=negative)

    def in_units(self, agree: Callable[[Tensor], Tensor] | None = None) -> tuple[Pairs, Tensor | None]:
        """These pairs with weights below 1, so that G times its weight fits fp16, and the power of two they lack.

        agree: returns the largest among ranks of a 0-dimensional tensor, for the texts, which all of them share.
        """
        if self.positive_weight is None or self.negative_weight is None or self.text_weight is None:
            return self, None
        image_unit = power_of_two_above(torch.maximum(self.positive_weight.abs(), self.negative_weight.abs()).max())
        text_unit = power_of_two_above(self.text_weight.abs().max())
        if agree is not None:
            text_unit = agree(text_unit)
        pairs = replace(
            self,
            positive_weight=self.positive_weight / image_unit,
            negative_weight=self.negative_weight / image_unit,
            text_weight=self.text_weight / text_unit,
        )
        return pairs, image_unit * text_unit


def power_of_two_above(values: Tensor) -> Tensor:
    """The least power of two above each value, from 0 on; 1 for 0."""
    return torch.ldexp(torch.ones_like(values), torch.frexp(values)[1])


def make_pairs(
    operation: str,
    image_embeds: Tensor,
    text_embeds: Tensor,
    *,
    image_groups: Tensor | None = None,
    text_groups: Tensor | None = None,
    offset: int | None = None,
    positive_weight: float | Tensor = 1.0,
    negative_weight: float = 1.0,
    image_weight: Tensor | None = None,
    text_weight: Tensor | None = None,
    ignore: int | None = None,
) -> Pairs:
    """The checked options. Raises UnsupportedInputError; images and texts must not be equally many, if not stated."""
    images, texts = image_embeds.shape[0], text_embeds.shape[0]
    for argument, value in (("offset", offset), ("ignore", ignore)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise unsupported(operation, argument, f"is {given(value)}", "None or an integer")
        if value is not None and not -(2**63) <= value < 2**63:
            raise unsupported(operation, argument, f"is {value}", "integers of 64 bits")
    check_groups(operation, image_embeds, text_embeds, image_groups, text_groups)
    if image_groups is not None and offset is not None:
        raise unsupported(operation, "offset", f"is {offset} beside groups", "one of them")
    if image_groups is None and ignore is not None:
        raise unsupported(operation, "ignore", f"is {ignore} without groups", "the id of a group")

    diagonal = offset or 0
    if not -images < diagonal < texts:
        diagonal = NO_POSITIVES
    weights = _weights(operation, image_embeds, texts, positive_weight, negative_weight, image_weight, text_weight)
    if image_groups is None or text_groups is None:
        return Pairs(diagonal, None, None, *weights)
    if ignore is not None:
        of_image, of_text = image_groups == ignore, text_groups == ignore
        positive, negative, text = weights if weights[0] is not None else _ones(image_embeds, texts)
        assert positive is not None and negative is not None and text is not None
        weights = positive.masked_fill(of_image, 0), negative.masked_fill(of_image, 0), text.masked_fill(of_text, 0)
        image_groups, text_groups = image_groups.masked_fill(of_image, -1), text_groups.masked_fill(of_text, -1)
    image_groups = image_groups.masked_fill(image_groups < 0, -1)
    text_groups = text_groups.masked_fill(text_groups < 0, -2)
    return Pairs(diagonal, image_groups, text_groups, *weights)


def check_groups(
    operation: str, image_embeds: Tensor, text_embeds: Tensor, image_groups: object, text_groups: object
) -> None:
    """Raises unless both are None, or int64 (N,) and (M,) on the embeddings' device."""
    if (image_groups is None) != (text_groups is None):
        missing, present = ("text", "image") if text_groups is None else ("image", "text")
        got = f"is None while {present}_groups is given"
        raise unsupported(operation, f"{missing}_groups", got, "both or neither")
    for argument, groups, embeds in (
        ("image_groups", image_groups, image_embeds),
        ("text_groups", text_groups, text_embeds),
    ):
        if groups is None:
            continue
        check_tensor(operation, argument, groups)
        assert isinstance(groups, Tensor)
        if groups.dtype != torch.int64:
            raise unsupported(operation, argument, f"has dtype {groups.dtype}", "int64")
        check_shape(operation, argument, groups, (embeds.shape[0],))
        check_same_device(operation, argument, groups, "image_embeds", image_embeds.device)


_Weights = tuple[Tensor | None, Tensor | None, Tensor | None]


def _weights(
    operation: str,
    image_embeds: Tensor,
    texts: int,
    positive_weight: float | Tensor,
    negative_weight: float,
    image_weight: Tensor | None,
    text_weight: Tensor | None,
) -> _Weights:
    """Positive and negative weights of images, and weights of texts; None where all options are their defaults."""
    images = image_embeds.shape[0]
    for argument, weight, count in (
        ("positive_weight", positive_weight, images),
        ("negative_weight", negative_weight, None),
        ("image_weight", image_weight, images),
        ("text_weight", text_weight, texts),
    ):
        if count is not None and isinstance(weight, Tensor):
            check_tensor(operation, argument, weight)
            check_shape(operation, argument, weight, (count,))
            check_same_device(operation, argument, weight, "image_embeds", image_embeds.device)
            if not weight.is_floating_point():
                raise unsupported(operation, argument, f"has dtype {weight.dtype}", "floating-point dtypes")
            if weight.requires_grad:
                raise unsupported(operation, argument, "requires a gradient", "constants: detach it")
        elif argument.startswith(("image", "text")) and weight is not None:
            raise unsupported(operation, argument, f"is {given(weight)}", "a tensor or None")
        elif weight is not None and not _is_weight(weight):
            supported = "finite numbers from 0 on" + (", or one for each image" if count is not None else "")
            raise unsupported(operation, argument, f"is {given(weight)}", supported)
    ordinary = not isinstance(positive_weight, Tensor) and positive_weight == negative_weight == 1
    if ordinary and image_weight is None and text_weight is None:
        return None, None, None
    image, _, text = _ones(image_embeds, texts)
    image = image if image_weight is None else image_weight.to(image.dtype)
    text = text if text_weight is None else text_weight.to(text.dtype)
    return image * positive_weight, image * negative_weight, text


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _ones(image_embeds: Tensor, texts: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    image, text = (image_embeds.new_ones(count, dtype=dtype) for count in (image_embeds.shape[0], texts))
    return image, image, text


def check_reduction(operation: str, reduction: str, supported: tuple[str, ...] = REDUCTIONS) -> None:
    if reduction not in supported:
        raise unsupported(operation, "reduction", f"is {given(reduction)}", ", ".join(supported))


def matches(groups: Tensor, others: Tensor) -> Tensor:
    """How many of `others` equal each of `groups`: int64, in O(n log n) time and O(n) memory."""
    others = others.sort().values
    return torch.searchsorted(others, groups, right=True) - torch.searchsorted(others, groups)


def plus_weights(
    texts_of_image: Tensor, images_of_image: Tensor, symmetric: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    """SigLIP+'s weights of the positives of each image: 1/k, or with `symmetric` the mean of 1/k and 1/k'.

    texts_of_image, images_of_image: k and k' (n,), the number of texts and of images in the image's group; a positive's
    text is in the same group, so that k' is the number of positives of the text. dtype: of the result.
    """
    weight = 1 / texts_of_image.clamp_min(1).to(dtype)
    return (weight + 1 / images_of_image.clamp_min(1).to(dtype)) / 2 if symmetric else weight
