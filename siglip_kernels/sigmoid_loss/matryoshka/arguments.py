"""The arguments of the losses of prefixes that one loss does not have: widths, and a scale and a bias for each."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels.arguments import given
from siglip_kernels.errors import unsupported
from siglip_kernels.sigmoid_loss.api import as_scalar

OPERATION = "matryoshka_sigmoid_loss"

Scalars = Tensor | float | Sequence[Tensor | float]


class Prefixes(NamedTuple):
    """Checked widths, and of each its scale, its bias and the factor of its loss."""

    widths: list[int]
    scales: list[Tensor | float]
    biases: list[Tensor | float]
    weights: list[Tensor | float]

    @staticmethod
    def of(
        columns: int,
        logit_scales: Scalars,
        logit_biases: Scalars,
        widths: Sequence[int],
        width_weights: Sequence[float] | None,
    ) -> "Prefixes":
        """Raises UnsupportedInputError. columns: of the embeddings."""
        if not isinstance(widths, Iterable):
            raise unsupported(OPERATION, "widths", f"is {given(widths)}", "a sequence of numbers")
        widths = list(widths)
        ascending = all(isinstance(width, int) and not isinstance(width, bool) for width in widths)
        if not widths or not ascending or widths != sorted(set(widths)) or not 1 <= widths[0] <= widths[-1] <= columns:
            raise unsupported(OPERATION, "widths", f"is {widths}", f"ascending numbers from 1 to {columns}")
        scales = _each("logit_scales", logit_scales, len(widths))
        biases = _each("logit_biases", logit_biases, len(widths))
        weights = _each("width_weights", 1.0 if width_weights is None else width_weights, len(widths))
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                got = f"contains an element of type {type(weight).__name__}"
                raise unsupported(OPERATION, "width_weights", got, "Python numbers, which are constants")
            if not 0 <= weight < float("inf"):
                raise unsupported(OPERATION, "width_weights", f"contains {weight}", "finite numbers from 0 on")
        return Prefixes(widths, scales, biases, weights)

    def tensors(self, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scales, biases and weights as (K,), of at least fp32, on the embeddings' device."""
        scales, biases, weights = (
            torch.stack([as_scalar(OPERATION, name, value, embeds) for value in values])
            for name, values in (
                ("logit_scales", self.scales), ("logit_biases", self.biases), ("width_weights", self.weights)
            )
        )  # fmt: skip
        return scales, biases, weights


def _each(argument: str, values: Scalars, count: int) -> list[Tensor | float]:
    """One value for each width."""
    if isinstance(values, (int, float)) or (isinstance(values, Tensor) and values.numel() == 1):
        return [values] * count
    if isinstance(values, Tensor) and values.dim() == 1 and len(values) == count:
        return list(values.unbind())
    if isinstance(values, Sequence) and not isinstance(values, str) and len(values) == count:
        return list(values)
    got = f"is {given(values)}"
    if isinstance(values, Tensor):
        got = f"has shape {tuple(values.shape)}"
    elif isinstance(values, Sequence) and not isinstance(values, str):
        got = f"has length {len(values)}"
    raise unsupported(OPERATION, argument, got, f"one number for all widths, or one for each of {count}")


def refuse_unknown(options: dict[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            raise TypeError(f"{OPERATION}() got an unexpected keyword argument {name!r}")
