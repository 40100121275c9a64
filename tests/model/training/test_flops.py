"""The operations of a step that MFU counts: those that are computed, and no more."""

import pytest
from coloured_squares import tiny_model

from siglip_model.training.flops import flops_per_pair
from siglip_model.training.lora import add_adapters
from siglip_model.training.objective import freeze

PATCH_EMBEDDING = 2 * 4 * 48 * 32  # four patches of 4 x 4 x 3 values


def forward(model):
    model.requires_grad_(False)
    return flops_per_pair(model)


def test_every_product_has_two_gradients_but_that_of_the_pixels():
    assert flops_per_pair(tiny_model()) == 3 * forward(tiny_model()) - PATCH_EMBEDDING


def test_a_frozen_tower_has_none():
    found = {}
    for tower in ("vision", "text"):
        model = tiny_model()
        freeze(model, tower)
        found[tower] = flops_per_pair(model) - forward(model)
    assert min(found.values()) > 0
    assert sum(found.values()) == 2 * forward(tiny_model()) - PATCH_EMBEDDING


def test_beside_adapters_the_weights_have_none():
    """Counted by hand, of the text tower: one layer of 4 tokens, width 32, two heads, hidden width 64."""
    pytest.importorskip("peft")
    rank, tokens, width, hidden = 4, 4, 32, 64
    model = tiny_model()
    add_adapters(model, rank)
    freeze(model, "vision")
    adapters = 4 * 2 * tokens * rank * (width + width) + 2 * 2 * tokens * rank * (width + hidden)
    by_layers_input = 3 * 2 * tokens * rank * width  # before q, k and v nothing is trained
    layer = 2 * tokens * (width * width + 2 * width * hidden)  # out_proj, fc1 and fc2
    attention = 2 * 2 * (2 * tokens * tokens * width)
    head = 2 * width * width
    gradients = head + layer + attention + 2 * adapters - by_layers_input
    assert flops_per_pair(model) - forward(model) == gradients
