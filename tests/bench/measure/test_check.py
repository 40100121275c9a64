"""The check itself: it passes correct kernels, in the interpreter, and fails each kind of error."""

from dataclasses import replace
from types import FunctionType

import pytest
import torch
from bench_helpers import SHAPE, setting

import siglip_kernels
from bench.cases import fp8
from bench.cases.checked import TINY
from bench.cases.operations import DTYPES, OPERATIONS, kernels_for
from bench.cases.suites import SUITES
from bench.measure.check import (
    Checked,
    check,
    check_all,
    failures,
    kernel_operations,
    kernels_can_run,
    not_checked,
    settings,
)
from bench.measure.measure import DeadDevice
from bench.peers.registry import selected_family
from siglip_kernels import MissingBackendError, reference


def test_kernels_run_in_the_interpreter():
    assert kernels_can_run() is None
    operations = kernel_operations(SUITES)
    assert {"attention", "sigmoid_loss", "layer_norm", "linear", "mlp"} <= set(operations)
    (checked,) = check_all(["layer_norm"], quick=True)
    assert checked.ok, checked.problem
    assert checked.dtype == "bf16" and 0 < checked.error <= checked.allowed and checked.eager_error > 0


def test_every_kernel_is_checked():
    for name in OPERATIONS:
        if kernels_for(name) is not None:
            assert settings(name, quick=True) and name in TINY
            assert {one.dtype for one in settings(name, quick=False)} == {
                DTYPES[dtype] for dtype in OPERATIONS[name].dtypes
            }


def test_every_public_operation_has_a_check():
    checked = {kernels_for(name) for name in kernel_operations(SUITES)}
    public = [getattr(siglip_kernels, name) for name in siglip_kernels.__all__]
    public += [getattr(siglip_kernels.fp8, name) for name in siglip_kernels.fp8.__all__]
    without_kernels = ("plain_sigmoid_loss", "chunked_sigmoid_loss", "forget", "why_not", "why_not_here", "why_no_gpu")
    functions = [one for one in public if isinstance(one, FunctionType) and one.__name__ not in without_kernels]
    assert len(functions) == 16 and set(functions) <= checked


def test_packed_sequences_resizing_and_fp8_are_checked():
    for name in ("packed_attention", "resize_normalize", "fp8_mlp"):
        for checked in check_all([name], quick=True):
            assert checked.ok, checked.problem


def test_fp8_that_loses_more_than_fp8_fails(monkeypatch):
    (wanted,) = settings("fp8_mlp", quick=True)
    wrong = lambda **inputs: fp8.DEFINITIONS["fp8_mlp"](**inputs) * 1.1  # noqa: E731
    assert "results is off by" in check(wanted, wrong).problem

    def without_fp8(**inputs):
        raise MissingBackendError("fp8.mlp needs compute capability 8.9")

    checked = check(wanted, without_fp8)
    assert checked.ok and checked.problem.startswith("not checked: fp8.mlp needs")


def test_a_gpu_can_check_the_tiny_shapes_of_the_interpreter(monkeypatch):
    monkeypatch.setattr("bench.measure.check.device", lambda: "cuda")
    names = {
        name: {one.shape.name for one in settings("attention", True, tiny=name == "tiny")} for name in ("", "tiny")
    }
    assert names["tiny"] == {"s65-d72"} and "s729-d72" in names[""]


def test_what_kernels_for_one_architecture_reject_is_not_wrong(monkeypatch):
    rejected = Checked("linear", {"name": "odd"}, "fp32", ok=False, problem="has dtype fp32", unsupported=True)
    assert not_checked(rejected).ok and not_checked(rejected).problem == "not checked: has dtype fp32"
    wrong = replace(rejected, unsupported=False)
    assert not_checked(wrong) is wrong
    assert selected_family() == ""
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "1")
    assert selected_family() == "triton:hopper"


def test_the_definition_passes_and_sdpa_stands_beside_it():
    checked = check(setting(direction="fwd+bwd"), reference.attention)
    assert checked.ok, checked.problem
    assert checked.sdpa_error is not None and checked.sdpa_error < 1e-5


def forgets_an_element(q, k, v):
    out = torch.empty_like(q)
    right = reference.attention(q, k, v)
    out[:, 1:] = right[:, 1:]
    return out + 0 * right


def drifting():
    """Gives other bits in each run, in one element and within the budget."""
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
def test_wrong_kernels_fail(kernels, problem):
    checked = check(setting(direction="fwd+bwd"), kernels)
    assert not checked.ok and problem in checked.problem
    assert failures([checked]) == {("attention", "triton"): f"failed the check ({SHAPE.name} fp32): {checked.problem}"}


def test_other_bits_in_a_second_run_fail():
    checked = check(setting(direction="fwd+bwd"), drifting())
    assert not checked.ok and checked.problem == "a second run gave other bits"


def test_a_crash_excludes_the_models_that_would_repeat_it():
    checked = Checked("mlp", {"name": "s1"}, "bf16", False, "triton:hopper", "crashed: did not end", crashed=True)
    assert set(failures([checked])) == {
        (name, "triton:hopper") for name in ("mlp", "vision_tower", "naflex_tower", "siglip", "training_step")
    }
    assert set(failures([replace(checked, problem="results is off", crashed=False)])) == {("mlp", "triton:hopper")}


def test_a_kernel_that_breaks_the_device_ends_the_check(monkeypatch):
    monkeypatch.setattr("bench.measure.check.device_is_dead", lambda: True)
    checks = check_all(["layer_norm"], quick=True)
    checked = next(checks)
    assert not checked.ok and checked.crashed and checked.problem.startswith("crashed: ")
    with pytest.raises(DeadDevice, match="broke the CUDA context"):
        next(checks)


def test_a_correct_kernel_does_not_fail():
    assert failures([check(setting(direction="fwd+bwd"), reference.attention)]) == {}
