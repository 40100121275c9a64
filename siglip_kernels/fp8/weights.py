"""Quantised weights: each projection is quantised once, at its first use, and again when its parameters have changed.

The originals stay where they are: checkpoints, optimizers and other backends see nothing of this. A quantised
projection takes a byte per weight beside them, and lives as long as the (first) weight that it was made of.

Changes are noticed by the tensors' addresses and version counters. What is written through `weight.data` changes
neither, and tensors that were created in inference mode have no counter: call `forget` after such changes.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from siglip_kernels.fp8.reference import Projection, quantise_projection

_State = tuple[tuple[object, ...], ...]


class _Kept(NamedTuple):
    state: _State  # of the parameters that it was made of
    projection: Projection


_kept = WeakTensorKeyDictionary()


def quantised(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Projection:
    """Projections of one input, concatenated: weights (out, in), biases (out,) or None.

    A change of the parameters is copied into the tensors of before, whose addresses CUDA graphs may have recorded.
    """
    state = tuple([_state(parameter) for parameter in (*weights, *biases)])
    kept = _kept.get(weights[0])
    if kept is not None and kept.state == state:
        return kept.projection
    projection = _quantise(weights, biases)
    if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return projection  # its memory belongs to the graph
    if kept is not None and _fits(kept.projection, projection):
        for old, new in zip(kept.projection, projection, strict=True):
            if old is not None:
                old.copy_(new)
        projection = kept.projection
    _kept[weights[0]] = _Kept(state, projection)
    return projection


def forget(parameters: Iterable[Tensor]) -> None:
    """Quantise these weights again at their next use, though they may look unchanged."""
    for parameter in parameters:
        if parameter in _kept:
            _kept[parameter] = _kept[parameter]._replace(state=())


def quantised_bytes(parameters: Iterable[Tensor]) -> int:
    """Of memory that the quantised forms of these weights take."""
    found = [_kept[parameter].projection for parameter in parameters if parameter in _kept]
    return sum(tensor.nbytes for projection in found for tensor in projection if tensor is not None)


def _state(parameter: Tensor | None) -> tuple[object, ...]:
    if parameter is None:
        return ()
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.shape, parameter.stride(), parameter.dtype, parameter.device


@torch.no_grad()
def _quantise(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Projection:
    weight = torch.cat([weight.detach() for weight in weights])
    if all(bias is None for bias in biases):
        return quantise_projection(weight, None)
    filled = [
        weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return quantise_projection(weight, torch.cat(filled))


def _fits(old: Projection, new: Projection) -> bool:
    """Whether the new can be copied into the old."""
    return all(
        (a is None) == (b is None)
        and (a is None or b is None or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device))
        for a, b in zip(old, new, strict=True)
    )
