"""Exact search: the rows of the largest cosines, from one pass over all rows in blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SHORTEST = 1e-12  # a row that is shorter counts as zero, as in torch.nn.functional.normalize


def nearest(queries: Tensor, blocks: Iterable[Tensor], top: int) -> tuple[Tensor, Tensor]:
    """cosines (queries, k), best first, and their row numbers, int64 of the same shape; k is `top`, or all rows.

    queries: float32 (queries, width) of unit length, whose device computes. blocks: (rows, width) each, of any floating
    dtype and length, numbered through. Equal cosines keep the order of the rows. Products are in float32.
    Raises ValueError, which names the row, where a cosine is not finite.
    """
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    first = 0
    for block in blocks:
        values = block.to(queries)
        lengths = values.norm(dim=-1).clamp_min(SHORTEST)
        cosines = queries @ values.T / lengths  # [Q, N]
        if not cosines.isfinite().all():
            row = first + int(cosines.isfinite().all(dim=0).logical_not().nonzero()[0])
            raise ValueError(f"row {row} is not finite")
        places = _largest(cosines, top)
        rows = torch.cat([rows, places + first], dim=1)
        best = torch.cat([best, cosines.gather(1, places)], dim=1)
        kept = _largest(best, top)
        best, rows = best.gather(1, kept), rows.gather(1, kept)
        first += len(block)
    return best, rows


def _largest(scores: Tensor, top: int) -> Tensor:
    """The places (rows, k) of the largest scores per row, best first; equal scores by place."""
    top = min(top, scores.shape[1])
    if top == 0:
        return torch.empty(len(scores), 0, dtype=torch.int64, device=scores.device)
    values, places = scores.topk(top)
    least = values[:, -1:]
    for row in ((scores >= least).sum(dim=1) > top).nonzero().flatten().tolist():
        # `topk` may take any of those that equal the least; the first are wanted
        above, equal = scores[row] > least[row], scores[row] == least[row]
        places[row] = torch.cat([above.nonzero(), equal.nonzero()]).flatten()[:top]
    places = places.sort(dim=1).values
    return places.gather(1, scores.gather(1, places).sort(dim=1, descending=True, stable=True).indices)
