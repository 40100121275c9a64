"""The counted share of the roofline: parts against numbers by hand, and the whole against its parts."""

import pytest

from bench.cases import shapes
from bench.compiled import predicted
from bench.compiled.predicted import MULTIPLY_ADDS, floor, gemm
from bench.compiled.sass import PIPES
from siglip_kernels.gemm.clocks import LATENCY


def test_the_floor_is_arithmetic_or_traffic():
    product = shapes.LinearShape("", 46_656, 1152, 4304)
    assert floor(product, "fwd") == pytest.approx(46_656 * 1152 * 4304 / MULTIPLY_ADDS / 132)
    norm = shapes.NormShape("", 46_656, 1152)
    assert floor(norm, "fwd") == pytest.approx(2 * 2 * 46_656 * 1152 / (4.8e12 / 1.83e9))


def test_a_gemm_of_hopper_is_bound_by_the_l2_then_shared_memory():
    """fc1 has 365 x 17 tiles of 128 x 256, whose step of depth reads 768 bytes at 5120 / 132 per clock."""
    assert gemm(46_656, 4304, 1152, True, gelu="forward") == pytest.approx(48 * 1152 * 768 / (5120 / 132) + LATENCY)


@pytest.mark.parametrize("hopper", [False, True])
def test_a_tower_is_its_layers(monkeypatch, hopper):
    monkeypatch.setattr(predicted, "attention", lambda shape, direction, hopper: 1000.0)
    tower = shapes.MODELS["so400m-384"].vision
    one, all_layers = (
        predicted._vision_tower(shapes.ModelShape("", "so400m-384", 64, layers), hopper) for layers in (1, 0)
    )
    rows = 64 * tower.tokens
    mlp = predicted._pre_norm_mlp(shapes.MLPShape("", rows, tower.width, tower.hidden), hopper)
    half = predicted._pre_norm_attention(shapes.PreNormAttentionShape("", 64, 729, 16, 72), hopper)
    assert (all_layers - one) == pytest.approx((tower.layers - 1) * (mlp + half))


def test_nothing_is_counted_beyond_the_roofline(monkeypatch):
    """Of loops whose products are the bound, every quick setting."""
    loop = predicted.Count("", "", "h200", "", "loop 1", 0, 0, dict.fromkeys(PIPES, 0.0), 262_144)
    loop.clocks["tensor"] = 512.0
    monkeypatch.setattr(predicted, "_loop", lambda *arguments: loop)
    epilogue = predicted.Count("", "", "", "logit_grad_kernel", "epilogue 1", 0, 0, {"issue": 2000.0}, 0)
    monkeypatch.setattr(predicted, "_counted", lambda *arguments: (epilogue,))
    found = list(predicted.predictions())
    assert {one["op"] for one in found} >= {"vision_tower", "attention", "sigmoid_loss", "mlp", "linear"}
    assert {one["impl"] for one in found} == {"triton", "triton:hopper"}
    assert all(0.3 < one["share"] <= 1 for one in found), [one for one in found if not 0.3 < one["share"] <= 1]
