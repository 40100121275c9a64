"""Attention's Hopper kernels on a Hopper GPU, within the portable kernels' error budget. tests/gluon emulates them."""

import pytest
import torch
from test_attention import check_budget, random_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "1")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 88, 96, 128])
@pytest.mark.parametrize("tokens", [65, 196, 256, 577, 729, 1024])
def test_lengths_and_head_dims_of_models(tokens, head_dim, dtype):
    check_budget(random_inputs(3, tokens, tokens, 5, head_dim, dtype, "cuda"))


@pytest.mark.parametrize(("query_tokens", "key_tokens"), [(1, 130), (130, 1), (65, 129), (7, 256), (129, 17)])
def test_ragged_tails(query_tokens, key_tokens):
    check_budget(random_inputs(2, query_tokens, key_tokens, 2, 72, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_lengths(head_dim):
    lengths = torch.tensor([0, 1, 63, 128, 129, 300], dtype=torch.int32, device="cuda")
    check_budget(random_inputs(6, 70, 300, 2, head_dim, torch.bfloat16, "cuda"), lengths=lengths)


def test_many_tiles_for_each_program_and_repeatable():
    inputs = random_inputs(16, 729, 729, 16, 72, torch.bfloat16, "cuda")
    first, again = check_budget(inputs), check_budget(inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
