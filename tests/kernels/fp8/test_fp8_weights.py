"""Weights are quantised once: again when they change, at the same addresses, and forgotten with the model."""

import gc
import pickle

import pytest
import torch
from torch import nn

from siglip_kernels.fp8 import weights
from siglip_kernels.fp8.reference import quantise_projection


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 24).requires_grad_(False)


def quantised(layer: nn.Linear):
    return weights.quantised([layer.weight], [layer.bias])


def check(layer: nn.Linear) -> None:
    wanted = quantise_projection(layer.weight, layer.bias)
    for found, expected in zip(quantised(layer), wanted, strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0)


def test_once(layer):
    check(layer)
    assert quantised(layer) is quantised(layer)


def test_a_change_in_place_is_noticed_and_written_to_the_same_addresses(layer):
    before = quantised(layer)
    layer.weight.mul_(3)
    layer.bias.add_(1)
    check(layer)
    assert [tensor.data_ptr() for tensor in quantised(layer)] == [tensor.data_ptr() for tensor in before]


def test_other_weights_at_the_same_module_are_noticed(layer):
    quantised(layer)
    layer.load_state_dict(nn.Linear(16, 24).state_dict())
    check(layer)
    layer.to(torch.bfloat16)
    check(layer)


def test_a_change_through_data_is_noticed_after_forget(layer):
    quantised(layer)
    layer.weight.data.mul_(3)
    weights.forget(layer.parameters())
    check(layer)


def test_several_projections_of_one_input(layer):
    other = nn.Linear(16, 8, bias=False).requires_grad_(False)
    found = weights.quantised([layer.weight, other.weight], [layer.bias, None])
    both = torch.cat([layer.weight, other.weight])
    wanted = quantise_projection(both, torch.cat([layer.bias, torch.zeros(8)]))
    for one, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), expected.float(), rtol=0, atol=0)
    other.weight.mul_(2)
    assert weights.quantised([layer.weight, other.weight], [layer.bias, None]).scales[24:].equal(2 * wanted.scales[24:])


def test_memory_is_counted_and_freed_with_the_weights(layer):
    gc.collect()  # models of other tests
    parameters, kept = list(layer.parameters()), len(weights._kept)
    assert weights.quantised_bytes(parameters) == 0
    quantised(layer)
    assert weights.quantised_bytes(parameters) == 24 * 16 + 4 * 24 + 4 * 24 + 8
    assert len(weights._kept) == kept + 1
    del parameters, layer.weight
    gc.collect()
    assert len(weights._kept) == kept


def test_modules_are_unchanged(layer):
    before = pickle.dumps(layer.state_dict())
    quantised(layer)
    assert pickle.dumps(layer.state_dict()) == before and list(layer._buffers) == []


def test_weights_of_inference_mode():
    with torch.inference_mode():
        layer = nn.Linear(16, 24)
        check(layer)
