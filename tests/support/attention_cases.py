"""Inputs and expectations for the tests of attention's forward kernels in Gluon."""

import torch
from error_budget import check_error
from torch import Tensor

from siglip_kernels import reference


def random_inputs(batch, query_tokens, key_tokens, heads, head_dim, dtype=torch.bfloat16, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, query_tokens, heads, head_dim, generator=generator).to(dtype)
    k, v = torch.randn(batch, key_tokens, 2, heads, head_dim, generator=generator).to(dtype).unbind(2)
    return [q, k, v]


def scores_of(q, k, scale) -> Tensor:
    return torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale


def check_attention(out, log_sum_exp, q, k, v, scale=None, lengths=None) -> None:
    """The error budget; the natural logarithm of the sum of exponentials as fp32 makes it."""
    truth = reference.attention(q.double(), k.double(), v.double(), scale=scale, lengths=lengths)
    eager = reference.attention(q, k, v, scale=scale, lengths=lengths)
    assert out.dtype == q.dtype
    check_error(out, eager, truth)
    scores = scores_of(q, k, scale or q.shape[3] ** -0.5)
    if lengths is not None:
        hidden = torch.arange(k.shape[1]) >= lengths[:, None]
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    expected = scores.logsumexp(-1)
    expected = torch.where(expected == float("-inf"), float("inf"), expected)
    torch.testing.assert_close(log_sum_exp.double(), expected, atol=1e-5, rtol=1e-5)
