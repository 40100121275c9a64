"""The kernel that makes delta exact: which rows it writes, and how exactly."""

import pytest
import torch
from torch import Tensor

from siglip_kernels.attention.backward import attention_backward
from siglip_kernels.attention.exact_delta import exact_delta
from siglip_kernels.attention.forward import attention_forward

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HALF = (torch.float16, torch.bfloat16)


def peaked_inputs(tokens: int, peaks: list[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and dO (2, S, 2, 72). The queries of `peaks` give most of their weight to one key each."""
    q, k, v, out_grad = (torch.randn(2, tokens, 2, 72, device=device) for _ in range(4))
    q[:, peaks] = 2 * k[:, [(7 * peak + 3) % tokens for peak in peaks]]
    return [tensor.to(dtype) for tensor in (q, k, v, out_grad)]


def weights_and_their_gradient(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """P and dP (B, H, Sq, Sk) in fp64."""
    q, k, v, out_grad = (tensor.double() for tensor in inputs)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 72**-0.5
    return scores.softmax(-1), torch.einsum("bqhd,bkhd->bhqk", out_grad, v)


def deltas(inputs: list[Tensor], lengths: Tensor | None = None) -> Tensor:
    """(B, H, S), with NaN where the kernel wrote nothing."""
    q, k, v, out_grad = inputs
    out, log_sum_exp = attention_forward(q, k, v, lengths, 72**-0.5, True)
    delta = torch.full((*log_sum_exp.shape[:2], 1, q.shape[1]), float("nan"), device=q.device)
    exact_delta(out_grad, q, k, v, out, log_sum_exp, delta, lengths, 72**-0.5)
    return delta[:, :, 0]


# None; a few of a tile, its first and last query among them; one in each span of queries; more than a tile holds.
PEAKS = {
    "none": (70, []),
    "few": (70, [0, 3, 63, 64, 69]),
    "far": (530, [511, 512, 529]),
    "all": (150, list(range(150))),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", PEAKS)
def test_rows_with_a_key_of_more_than_an_eighth_of_the_weight_and_no_others(case, dtype, device):
    tokens, peaks = PEAKS[case]
    inputs = peaked_inputs(tokens, peaks, dtype, device)
    weights, weights_grad = weights_and_their_gradient(inputs)
    found = deltas(inputs)
    largest = weights.amax(-1)
    assert (largest > 0.51).any() == bool(peaks)
    assert found[largest > 0.126].isfinite().all()
    assert found[largest < 0.124].isnan().all()
    exact = (weights * weights_grad).sum(-1)
    error = (found - exact)[found.isfinite()].abs()
    _, terms = weights_and_their_gradient([tensor.abs() for tensor in inputs])
    size = (weights * terms).sum(-1)[found.isfinite()]
    assert (error <= 2**-18 * size).all()  # the rounding of O would leave 2^-12 in fp16, 2^-9 in bf16


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rows_do_not_depend_on_which_others_are_exact(dtype, device):
    """A row's delta has the same bits wherever it lies among the collected rows."""
    few = peaked_inputs(150, [5, 100, 149], dtype, device)
    many = [tensor.clone() for tensor in few]
    others = [row for row in range(150) if row not in (5, 100, 149)]
    many[0][:, others] = 2 * many[1][:, others]
    found, among_others = deltas(few), deltas(many)
    assert found.isfinite().sum() < among_others.isfinite().sum()
    for row in (5, 100, 149):
        assert torch.equal(found[..., row], among_others[..., row])


def test_keys_beyond_a_length_have_no_part(device):
    inputs = peaked_inputs(130, list(range(130)), torch.bfloat16, device)
    lengths = torch.tensor([0, 75], dtype=torch.int32, device=device)
    for tensor in inputs[1:3]:
        tensor[1, 75:] = float("nan")
    found = deltas(inputs, lengths)
    assert found[0].isnan().all()
    q, k, v, out_grad = (tensor[1:] for tensor in inputs)
    alone = deltas([q, k[:, :75], v[:, :75], out_grad])
    assert alone.isfinite().any()
    assert torch.equal(found[1:].nan_to_num(), alone.nan_to_num())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_gradient_of_keys_alone_has_the_exact_delta_as_well(dtype, device):
    q, k, v, out_grad = peaked_inputs(130, list(range(0, 130, 3)), dtype, device)
    out, log_sum_exp = attention_forward(q, k, v, None, 72**-0.5, True)
    arguments = (out_grad, q, k, v, out, log_sum_exp, None, 72**-0.5)
    everything, keys_alone = attention_backward(*arguments, True, True), attention_backward(*arguments, False, True)
    assert all(torch.equal(one, other) for one, other in zip(everything[1:], keys_alone[1:], strict=True))
