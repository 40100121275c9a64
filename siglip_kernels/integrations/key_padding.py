"""Converts attention masks that mark valid keys to what the kernels support: the number of valid keys.

Softmax attention does not depend on the order of its keys, so a mask whose valid keys are not all at the front is also
supported: keys and values are reordered. Any other mask (causal, windows, biases) is not; it is recognised by reading
the mask once per forward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import siglip_kernels
from siglip_kernels.transforms import can_read_values


class KeyPadding(NamedTuple):
    """What a mask says about keys.

    mask: the mask itself. lengths: valid keys per sample, int32 (B,), or (1,) if all samples have the same.
    order: int64 (B or 1, K), valid keys first, or None if they already are. hides_all: whether a sample is known to
    have no valid key; siglip_kernels.attention then returns zeros, PyTorch's an average of the padding.
    """

    mask: Tensor
    lengths: Tensor
    order: Tensor | None
    hides_all: bool = False

    def valid_first(self, tokens: Tensor) -> Tensor:
        """tokens: (B, K, ...)."""
        if self.order is None:
            return tokens
        return tokens[torch.arange(tokens.shape[0], device=tokens.device)[:, None], self.order]


def attend(projected: tuple[Tensor, Tensor, Tensor], scale: float | None, padding: KeyPadding | None) -> Tensor:
    """siglip_kernels.attention over the valid keys. projected: q, k and v, each (B, S, H, D)."""
    q, k, v = projected
    if padding is None:
        return siglip_kernels.attention(q, k, v, scale=scale)
    k, v = padding.valid_first(k), padding.valid_first(v)
    return siglip_kernels.attention(q, k, v, scale=scale, lengths=padding.lengths.expand(q.shape[0]))


def read_key_padding(mask: Any, batch: int, keys: int) -> Any:
    """A KeyPadding if `mask` is a tensor that only marks which keys of a sample are valid, else `mask` itself.

    mask: (B or 1, K), non-zero where valid; or (B or 1, 1, Q or 1, K), bool (True is valid) or added to the scores (0,
    or at most the dtype's smallest number). Values cannot be read while torch.compile traces or a CUDA graph is
    captured; then only (B or 1, K) and bool (B or 1, 1, 1, K) are recognised, which need no reading.
    """
    if not isinstance(mask, Tensor) or mask.dim() == 0 or mask.shape[0] not in (1, batch) or mask.shape[-1] != keys:
        return mask
    if mask.dim() == 2:
        return from_valid_keys(mask != 0, mask)
    if mask.dim() != 4 or mask.shape[1] != 1 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return mask
    row = mask[:, 0, 0]
    if mask.dtype == torch.bool and mask.shape[2] == 1:
        return from_valid_keys(row, mask)
    if not can_read_values(mask):
        return mask
    valid = row if mask.dtype == torch.bool else row == 0
    same_for_all_queries = (mask == mask[:, :, :1]).all()
    only_masks = (
        same_for_all_queries if mask.dtype == torch.bool else (valid | (row <= torch.finfo(mask.dtype).min)).all()
    )
    return from_valid_keys(valid, mask) if bool(same_for_all_queries & only_masks) else mask


def from_valid_keys(valid: Tensor, mask: Tensor) -> KeyPadding:
    """valid: bool (B, K)."""
    lengths = valid.sum(-1, dtype=torch.int32)
    at_front, hides_all = False, False
    if can_read_values(valid):  # both in one read, which synchronises
        facts = torch.stack([(valid[:, 1:] <= valid[:, :-1]).all(), (lengths == 0).any()])
        at_front, hides_all = facts.tolist()
    order = None if at_front else torch.argsort((~valid).to(torch.uint8), dim=-1, stable=True)
    return KeyPadding(mask, lengths, order, hides_all)


def is_served(padding: Any) -> bool:
    """Whether `attend` with what `read_key_padding` returned gives the library's result."""
    return padding is None or (isinstance(padding, KeyPadding) and not padding.hides_all)


def as_given(mask: Any) -> Any:
    """The mask that was passed to `read_key_padding`."""
    return mask.mask if isinstance(mask, KeyPadding) else mask
