"""A contender's error against the definition in fp64, and the error that it may have.

This project's kernels may have twice the error of the definition in the same dtype, plus one rounding. Peers
legitimately round in other places and may have ten times that error. A contender beyond its limit is wrong and is not
timed.

The forward pass is judged on the last samples of the timed call itself, gradients on a call of few samples, because the
whole call in fp64 would need too much memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.operations import Contender, Inputs, Setting
from bench.peers import Peer

PROJECT_FACTOR, PEER_FACTOR = 2.0, 10.0
SAMPLES = 2

Found = dict[str, list[Tensor]]
"""Outputs and gradients by name."""


def as_list(value: Any) -> list[Tensor]:
    """One output, or several, as a list."""
    return list(value) if isinstance(value, (tuple, list)) else [value]


def forward(contender: Contender, inputs: Inputs) -> list[Tensor]:
    with contender.active(), torch.no_grad():
        return as_list(contender.call(**inputs.arguments()))


def differentiable(inputs: Inputs) -> Inputs:
    """The same values as leaves that require gradients."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    return replace(inputs, tensors=leaves)


def upstream(results: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The gradients that a backward receives: 1 for a loss, else normal values rounded to `dtype`, always the same."""
    generator = torch.Generator(results[0].device).manual_seed(1)

    def draw(result: Tensor) -> Tensor:
        if result.dim() == 0:
            return torch.ones_like(result)
        return torch.randn(result.shape, generator=generator, device=result.device).to(dtype).to(result.dtype)

    return [draw(result) for result in results]


def gradients(contender: Contender, inputs: Inputs, dtype: torch.dtype) -> Found:
    """Outputs, and gradients of inputs and weights."""
    inputs = differentiable(inputs)
    weights = [contender.parameters[name] for name in sorted(contender.parameters)]
    leaves = [*inputs.tensors.values(), *weights]
    with contender.active():
        results = as_list(contender.call(**inputs.arguments()))
        found = torch.autograd.grad(results, leaves, upstream(results, dtype), allow_unused=True)
    whole = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
    named = {"results": [result.detach() for result in results]}
    named |= {f"gradient of {name}": [grad] for name, grad in zip(inputs.tensors, whole, strict=False)}
    return named | ({"gradient of the weights": whole[len(inputs.tensors) :]} if weights else {})


def distance(found: list[Tensor], true: list[Tensor]) -> float:
    """‖found − true‖ / ‖true‖, over all tensors; NaN if any value is NaN."""
    pairs = list(zip(found, true, strict=True))
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    return (difference / size) ** 0.5 if size else difference**0.5


def least_cosine(found: list[Tensor], true: list[Tensor]) -> float:
    """The least cosine of a row of `found` to its row of `true`; NaN if any value is NaN."""
    pairs = zip(found, true, strict=True)
    return min(F.cosine_similarity(a.double(), b.double(), dim=-1).min().item() for a, b in pairs)


def allowed_distance(eager: list[Tensor], true: list[Tensor], dtype: torch.dtype, factor: float) -> float:
    """`factor` times the error of the same formula in the same dtype, plus one rounding.

    A single value, such as a loss, may be exact by chance, so it is allowed at least eight roundings of fp32.
    """
    rounding = torch.finfo(dtype).eps / 2
    if sum(tensor.numel() for tensor in true) == 1:
        rounding = max(rounding, 4 * torch.finfo(torch.float32).eps)
    return factor * distance(eager, true) + rounding


class NoTruth(Exception):
    """The definition itself cannot be computed, for example for lack of memory in fp64."""


@dataclass
class Verdict:
    """The worst relative error, and the problem if it is too large, else ""; of embeddings also the least cosine."""

    error: float
    problem: str = ""
    cosine: float | None = None


class Judge:
    """Judges the contenders of one setting, whose timed calls read `inputs`."""

    def __init__(self, setting: Setting, inputs: Inputs):
        self.setting, self.inputs = setting, inputs
        self.sample = replace(setting, shape=setting.shape.sample()).inputs(seed=1)
        self._known: dict[tuple[Any, ...], Found] = {}

    def judge(self, entry: Peer, contender: Contender) -> Verdict:
        how = self._how(entry)
        found = self._evaluate(how, contender, self.inputs if how == "timed call" else self.sample)
        true, eager = self._reference(how, entry, torch.float64), self._reference(how, entry, self.setting.dtype)
        worst = Verdict(0.0)
        for name in true:
            if [tensor.shape for tensor in found[name]] != [tensor.shape for tensor in true[name]]:
                shapes = [tuple(tensor.shape) for tensor in found[name]]
                return Verdict(float("nan"), f"wrong: {name} of shapes {shapes}")
            error = distance(found[name], true[name])
            factor = PROJECT_FACTOR if entry.uses_kernels else PEER_FACTOR
            allowed = entry.tolerance or allowed_distance(eager[name], true[name], self.setting.dtype, factor)
            if not error <= allowed:
                return Verdict(error, f"wrong: {name} is off by {error:.1e}, {allowed:.1e} is allowed")
            worst.error = max(worst.error, error)
        if self.setting.operation.embeds:
            worst.cosine = least_cosine(found["results"], true["results"])
        return worst

    def _how(self, entry: Peer) -> str:
        if self.setting.direction == "fwd" or entry.one_size:
            samples_apart = bool(self.inputs.samples) or entry.one_size
            return "timed call" if samples_apart else "sample, forward"
        return "sample, gradients"

    def _evaluate(self, how: str, contender: Contender, inputs: Inputs) -> Found:
        if how == "sample, gradients":
            return gradients(contender, inputs, self.setting.dtype)
        results = forward(contender, inputs)
        # Copies, because the next call of a CUDA graph overwrites its outputs.
        return {"results": [(result[-SAMPLES:] if inputs.samples else result).clone() for result in results]}

    def _reference(self, how: str, entry: Peer, dtype: torch.dtype) -> Found:
        key = how, entry.truth, dtype
        if key not in self._known:
            inputs = self.inputs if how == "timed call" else self.sample
            if how == "timed call" and inputs.samples:
                inputs = inputs.last(SAMPLES)
            if dtype == torch.float64:
                inputs = inputs.map(torch.Tensor.double)
            try:
                truth = (
                    Contender(entry.truth) if entry.truth else self.setting.operation.definition(self.setting, dtype)
                )
                self._known[key] = self._evaluate(how, truth, inputs)
            except Exception as error:
                raise NoTruth(f"the definition in {dtype}: {' '.join(str(error).split())[:150]}") from error
        return self._known[key]
