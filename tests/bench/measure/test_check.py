"""The check itself: it passes what is right, in the interpreter, and is red for each kind of wrong."""

from dataclasses import replace

import pytest
import torch
from bench_helpers import SHAPE, setting

from bench.cases.operations import OPERATIONS, ours
from bench.cases.suites import SUITES
from bench.measure.check import _TINY, Checked, check, check_all, kernel_operations, kernels_can_run, red, settings
from bench.measure.measure import DeadDevice
from siglip_kernels import reference


def test_kernels_run_in_the_interpreter():
    assert kernels_can_run() is None
    operations = kernel_operations(SUITES)
    assert {"attention", "sigmoid_loss", "layer_norm", "linear", "mlp"} <= set(operations)
    (checked,) = check_all(["layer_norm"], quick=True)
    assert checked.ok, checked.problem
    assert checked.dtype == "bf16" and 0 < checked.error <= checked.allowed and checked.eager_error > 0


def test_every_kernel_of_ours_is_checked():
    for name in OPERATIONS:
        if ours(name) is not None:
            assert settings(name, quick=True) and len(settings(name, quick=False)) >= 3 and name in _TINY


def test_the_definition_is_right_and_sdpa_stands_beside_it():
    checked = check(setting(direction="fwd+bwd"), reference.attention)
    assert checked.ok, checked.problem
    assert checked.sdpa_error is not None and checked.sdpa_error < 1e-5


def forgets_an_element(q, k, v):
    out = torch.empty_like(q)
    right = reference.attention(q, k, v)
    out[:, 1:] = right[:, 1:]
    return out + 0 * right


def drifting():
    """Gives other bits each time, in one element and within the budget."""
    calls = iter(range(10))

    def kernels(q, k, v):
        out = reference.attention(q, k, v)
        nudge = torch.zeros_like(out)
        nudge[0, 0, 0, 0] = next(calls) * 2**-22
        return out + nudge

    return kernels


def raises(q, k, v):
    raise RuntimeError("illegal memory access")


@pytest.mark.parametrize(
    ("kernels", "problem"),
    [
        (lambda q, k, v: reference.attention(q, k, v) * 1.001, "results is off by"),
        (lambda q, k, v: reference.attention(q, k.detach(), v), "gradient of k is off by"),
        (forgets_an_element, "results is off by nan"),
        (raises, "RuntimeError: illegal memory access"),
    ],
)
def test_wrong_kernels_are_red(kernels, problem):
    checked = check(setting(direction="fwd+bwd"), kernels)
    assert not checked.ok and problem in checked.problem
    assert red([checked]) == {("attention", "triton"): f"wrong in check ({SHAPE.name} fp32): {checked.problem}"}


def test_other_bits_in_a_second_run_are_red():
    checked = check(setting(direction="fwd+bwd"), drifting())
    assert not checked.ok and checked.problem == "a second run gave other bits"


def test_what_takes_the_process_down_is_not_met_again_in_a_model():
    checked = Checked("mlp", {"name": "s1"}, "bf16", False, "triton:hopper", "took the process down: did not end")
    assert set(red([checked])) == {
        (name, "triton:hopper") for name in ("mlp", "vision_tower", "siglip", "training_step")
    }
    assert set(red([replace(checked, problem="results is off")])) == {("mlp", "triton:hopper")}


def test_a_kernel_that_breaks_the_device_ends_the_check(monkeypatch):
    monkeypatch.setattr("bench.measure.check.device_is_dead", lambda: True)
    checks = check_all(["layer_norm"], quick=True)
    checked = next(checks)
    assert not checked.ok and checked.problem.startswith("took the process down: ")
    with pytest.raises(DeadDevice, match="broke the CUDA context"):
        next(checks)


def test_green_is_not_red():
    assert red([check(setting(direction="fwd+bwd"), reference.attention)]) == {}
