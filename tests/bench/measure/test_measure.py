"""One group: correct contenders are timed, wrong ones are reported as wrong, and failures stay separate."""

import json
import types

import pytest
import torch
from bench_helpers import PROBE, ROOFLINE, SHAPE, contender, setting

from bench.cases.operations import OPERATIONS
from bench.cases.shapes import (
    LinearShape,
    LossShape,
    MLPShape,
    NormShape,
    PatchShape,
    PoolShape,
    PreNormAttentionShape,
    QKVShape,
)
from bench.measure import measure as measurement
from bench.measure.measure import Plan, measure
from bench.measure.roofline import RooflineProbe
from bench.measure.timing import Timing
from bench.peers import Missing, Unsupported, peers_of
from siglip_kernels import reference

PEAKS = measurement.peaks_in_a_process
PLAN = Plan(seconds=0.0, least_rounds=2)


@pytest.fixture(autouse=True)
def no_process_for_memory(monkeypatch):
    monkeypatch.setattr("bench.measure.measure.peaks_in_a_process", lambda setting, names: dict.fromkeys(names, 1000))


def rows_of(entries, plan=PLAN, **values):
    rows = []
    measure("attention", setting(**values), entries, PROBE, plan, rows.append)
    return {row.impl: row for row in rows}


def wrong(q, k, v):
    return 1.01 * reference.attention(q, k, v)


def test_a_peer_that_gives_wrong_results_is_shown_as_wrong_not_as_fast():
    rows = rows_of([contender("eager"), contender("wrong", wrong)])
    assert rows["wrong"].status == "error" and rows["wrong"].ms_median is None
    assert rows["wrong"].reason.startswith("wrong: results is off by 1.0e-02")
    assert rows["wrong"].error_vs_fp64 == pytest.approx(0.01, rel=1e-3)
    assert rows["eager"].status == "ok" and rows["eager"].ms_median > 0
    assert rows["eager"].error_vs_fp64 < 1e-6


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda q, k, v: torch.full_like(q, torch.nan), "off by nan"),
        (lambda q, k, v: reference.attention(q, k, v)[:, :-1], "shapes"),
    ],
)
def test_nan_and_wrong_shapes_are_wrong(call, reason):
    row = rows_of([contender("peer", call)])["peer"]
    assert (row.status, row.ms_median) == ("error", None)
    assert reason in row.reason


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        return reference.attention(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, grad


@pytest.mark.parametrize("direction", ["bwd", "fwd+bwd"])
def test_wrong_gradients_are_wrong(direction):
    rows = rows_of([contender("peer", WrongGradient.apply_by_name), contender("eager")], direction=direction)
    assert rows["peer"].status == "error" and "gradient of q" in rows["peer"].reason
    assert rows["eager"].status == "ok"


WrongGradient.apply_by_name = staticmethod(lambda q, k, v: WrongGradient.apply(q, k, v))


def test_this_project_has_to_be_closer_than_peers():
    def rounded(q, k, v):  # like a peer with outputs in a narrower type
        return (reference.attention(q, k, v) * (1 + 6e-7)).contiguous()

    rows = rows_of([contender("triton:rounded", rounded), contender("peer", rounded)])
    assert rows["triton:rounded"].status == "error"
    assert rows["peer"].status == "ok"


def raising(error):
    def load(q, k, v):
        raise error

    return load


def test_failures_stay_separate():
    entries = [
        contender("oom", raising(torch.OutOfMemoryError("CUDA out of memory"))),
        contender("unsupported", raising(Unsupported("head dim 8"))),
        contender("missing", raising(Missing("pip install it"))),
        contender("broken", raising(KeyError("no such | thing"))),
        contender("eager"),
    ]
    rows = rows_of(entries)
    assert {name: row.status for name, row in rows.items()} == {
        "oom": "oom", "unsupported": "unsupported", "missing": "missing", "broken": "error", "eager": "ok",
        "eager#2": "ok",
    }  # fmt: skip
    assert rows["missing"].reason == "pip install it"
    assert rows["broken"].reason.startswith("KeyError")


def test_a_failed_operation_is_not_timed():
    plan = Plan(0.0, 2, failed={("attention", "triton"): "failed the check (s64): too far"})
    rows = rows_of([contender("triton"), contender("triton:hopper"), contender("eager")], plan)
    assert rows["triton:hopper"].status == "ok"  # other kernels
    assert rows["triton"].status == "error" and rows["triton"].ms_median is None
    assert rows["triton"].reason == "not timed: failed the check (s64): too far"
    assert rows["eager"].status == "ok"


def test_a_failure_during_timing_stays_separate():
    calls = 0

    def soon_out_of_memory(q, k, v):
        nonlocal calls
        calls += 1
        if calls > 4:  # judged once, run twice, timed once
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reference.attention(q, k, v)

    rows = rows_of([contender("greedy", soon_out_of_memory), contender("eager")])
    assert rows["greedy"].status == rows["greedy#2"].status == "oom" and rows["greedy"].ms_median is None
    assert rows["greedy"].reason == "while it was timed: CUDA out of memory"
    assert rows["eager"].status == "ok"


def test_a_row_follows_from_its_time():
    rows = rows_of([contender("eager", note="the definition"), contender("sdpa")])
    row, again = rows["eager"], rows["eager#2"]  # the first is timed twice
    assert row.ms_p20 <= row.ms_median <= row.ms_p80
    flops, bytes_moved = SHAPE.flops("fwd"), SHAPE.bytes("fwd", 4)
    assert row.tflops == pytest.approx(flops / row.ms_median * 1e3 / 1e12)
    assert row.gbps == pytest.approx(bytes_moved / row.ms_median * 1e3 / 1e9)
    assert row.roofline_ms == pytest.approx(1e3 * max(flops / ROOFLINE.flops, bytes_moved / ROOFLINE.bytes))
    assert row.roofline_share == pytest.approx(row.roofline_ms / row.ms_median)
    assert row.peak_mem_bytes == 1000 and row.reason.startswith("the definition")
    assert row.shape == {"name": "tiny", "batch": 2, "tokens": 17, "heads": 2, "head_dim": 8, "peaked": 0}
    assert again.impl == "eager#2" and "sdpa#2" not in rows


@pytest.mark.parametrize("note", ["", "busy: load 9 on 2 cores"])
def test_a_disturbance_is_marked(monkeypatch, note):
    monkeypatch.setattr("bench.measure.measure.Watch.note", lambda watch: note)
    row = rows_of([contender("eager", note="the definition")])["eager"]
    assert row.disturbed == bool(note) and row.reason == "; ".join(filter(None, ["the definition", note]))


SMALL = {
    "attention": SHAPE,
    "linear": LinearShape("tiny", 5, 8, 6, True),
    "pre_norm_qkv": QKVShape("tiny", 5, 8, 2),
    "pre_norm_attention": PreNormAttentionShape("tiny", 2, 5, 2, 8),
    "mlp": MLPShape("tiny", 5, 8, 12),
    "pre_norm_mlp": MLPShape("tiny", 5, 8, 12),
    "layer_norm": NormShape("tiny", 5, 8),
    "attention_pool": PoolShape("tiny", 2, 5, 8, 2),
    "patch_embed": PatchShape("tiny", 2, 28, 14, 8),
    "sigmoid_loss": LossShape("tiny", 9, 8, negatives=4),
    "siglip_plus_loss": LossShape("tiny", 9, 8, captions=2, negatives=3),
    "matryoshka_sigmoid_loss": LossShape("tiny", 9, 80, weighted=True, negatives=3),
}


@pytest.mark.parametrize("operation", SMALL)
def test_every_operation_runs_in_every_direction_it_is_measured_in(operation):
    entries = [entry for entry in peers_of(operation).values() if not entry.cuda and not entry.package]
    assert entries
    for direction in OPERATIONS[operation].directions:
        rows = []
        measure("attention", setting(operation, SMALL[operation], direction), entries, PROBE, PLAN, rows.append)
        assert {row.impl for row in rows if row.status != "ok"} <= {"sdpa:flash"}, [row.reason for row in rows]


def test_the_roofline_comes_from_a_product_and_a_copy():
    probe = RooflineProbe("cpu", torch.float32)
    times = {probe.PRODUCT: Timing(10.0, 9.0, 11.0, 3), probe.COPY: Timing(2.0, 1.0, 3.0, 3)}
    roofline = probe.roofline(times)
    assert roofline.flops == pytest.approx(2 * 1024**3 / 10e-3) and roofline.bytes == pytest.approx(2 * 2**26 / 2e-3)
    for steps in probe.contenders.values():
        steps()
    shape = LinearShape("", 100, 1000, 1000)
    assert roofline.milliseconds(shape, "fwd", 4) == pytest.approx(1e3 * shape.flops("fwd") / roofline.flops)
    assert roofline.milliseconds(NormShape("", 10, 10), "fwd", 4) == pytest.approx(1e3 * 800 / roofline.bytes)


def test_inputs_depend_on_the_seed_and_are_never_zeros():
    for operation, shape in SMALL.items():
        first, second = (setting(operation, shape).inputs(seed) for seed in (0, 1))
        for name, tensor in first.tensors.items():
            assert tensor.abs().min() > 0, f"{operation}: {name}"
            assert name.startswith("logit_") or not torch.equal(tensor, second.tensors[name])


def test_memory_that_a_cpu_lacks_is_not_allocated():
    rows = []
    entries = [peers_of("sigmoid_loss")["eager"]]
    vast = setting("sigmoid_loss", LossShape("vast", 2**21, 8))
    measure("loss", vast, entries, PROBE, PLAN, rows.append)
    assert [row.status for row in rows] == ["oom"] and rows[0].reason.startswith("not tried")


def test_memory_of_the_contenders_after_one_that_ends_the_process(monkeypatch):
    monkeypatch.setattr(measurement.sys, "platform", "linux")
    asked = []

    def run(command, **options):
        left = json.loads(command[-1])["peers"]
        asked.append(left)
        whole = left[: left.index("greedy")] if "greedy" in left else left
        lines = "".join(json.dumps([name, len(name)]) + "\n" for name in whole)
        return types.SimpleNamespace(stdout=lines, returncode=int(whole != left))

    monkeypatch.setattr(measurement.subprocess, "run", run)
    peaks = PEAKS(setting(), ["eager", "greedy", "sdpa"])
    assert peaks == {"eager": 5, "greedy": None, "sdpa": 4}
    assert asked == [["eager", "greedy", "sdpa"], ["sdpa"]]
