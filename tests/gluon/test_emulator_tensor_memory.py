"""The emulator of tensor memory and tcgen05: right numbers without a fault, and each planted fault under every seed."""

import pytest
import tensor_pipelines
import torch
from hopper_emulator.faults import (
    ILLEGAL,
    IN_FLIGHT,
    IN_USE,
    NOT_AWAITED,
    NOT_FENCED,
    OVER_ARRIVAL,
    UNWRITTEN,
    WRONG_PHASE,
    Fault,
)
from hopper_emulator.launch import emulating

SEEDS = range(4)


def tiles() -> torch.Tensor:
    return torch.randn(3 * 128, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_fault_the_result_is_right(seed):
    x = tiles()
    with emulating(seed):
        out = tensor_pipelines.weighted(x)
    weighted = [(t.double() @ t.double().T).bfloat16().double() @ t.double() for t in x.split(128)]
    assert (out - torch.cat(weighted)).norm() < 2e-3 * out.norm()  # a score may be rounded the other way


MULTIPLY, WEIGH = "multiply", "weigh"
# What a fault may be found as, depending on who runs first, and in whom.
PLANTED = {
    "products start before the tile has landed": ({NOT_AWAITED, WRONG_PHASE}, {MULTIPLY}),
    "the tile is loaded under its products": ({IN_USE}, {MULTIPLY}),
    "scores start from nothing": ({UNWRITTEN}, {MULTIPLY}),
    "scores are announced by an arrival": ({NOT_AWAITED}, {WEIGH}),
    "scores are read before they are computed": ({UNWRITTEN, NOT_AWAITED, IN_USE}, {MULTIPLY, WEIGH}),
    "scores are read over their weights": ({ILLEGAL}, {WEIGH}),
    "weights lie elsewhere": ({ILLEGAL}, {MULTIPLY}),
    "weights are used before they are stored": ({ILLEGAL, IN_USE, NOT_AWAITED}, {MULTIPLY, WEIGH}),
    "weights are announced before they are stored": ({ILLEGAL, IN_USE, NOT_AWAITED}, {MULTIPLY, WEIGH}),
    "weights change under their product": ({IN_USE, NOT_AWAITED}, {MULTIPLY, WEIGH}),
    "a product of weights and themselves": ({ILLEGAL}, {MULTIPLY}),
    "the result is written while it is read": ({IN_USE, OVER_ARRIVAL}, {MULTIPLY, WEIGH}),
    "the result is announced before its product": ({UNWRITTEN, NOT_AWAITED, IN_USE}, {MULTIPLY, WEIGH}),
    "the result is read before its product": ({UNWRITTEN, NOT_AWAITED}, {WEIGH}),
    "the result's phase is wrong": ({UNWRITTEN, NOT_AWAITED}, {WEIGH}),
    "a product without a wait": ({IN_FLIGHT}, {MULTIPLY}),
    "no fence before a commit": ({NOT_FENCED}, {MULTIPLY}),
    "more columns than there are": ({ILLEGAL}, {"main"}),
    "two warps read": ({ILLEGAL}, {WEIGH}),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_fault_is_found(planted):
    kinds, partitions = PLANTED[planted]
    for seed in SEEDS:
        with pytest.raises(Fault) as caught, emulating(seed):
            tensor_pipelines.weighted(tiles(), planted)
        assert caught.value.kind in kinds, caught.value
        assert caught.value.partition in partitions, caught.value
