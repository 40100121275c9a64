"""Whole runs with a fake measurement: order, resuming, and the deadline."""

import time
from dataclasses import replace

import pytest
from bench_helpers import PROBE

from bench.cases.suites import DECISIVE, SUITES, _key, by_importance, is_decisive
from bench.measure import run as runs
from bench.measure.measure import DeadDevice, Plan, blank_row
from bench.measure.run import Request, deadline, run
from bench.peers import Peer, everyone, peers_of
from bench.report.rows import Results, read


@pytest.fixture(autouse=True)
def no_probe(monkeypatch):
    monkeypatch.setattr(runs, "RooflineProbe", lambda *arguments: PROBE)


class Measurement:
    """Replaces `measure`: writes a row for each entry and records the groups."""

    def __init__(self, stop_after=None, status="ok"):
        self.groups, self.stop_after, self.status = [], stop_after, status

    def __call__(self, suite, setting, entries, probe, plan, write, progress):
        if len(self.groups) == self.stop_after:
            raise KeyboardInterrupt
        self.groups.append((suite, setting.shape.name, setting.direction))
        for entry in entries:
            progress(entry)
            write(blank_row(suite, setting, entry, status=self.status, ms_median=1.0))


REQUEST = Request(["loss", "pool"], shapes=["pairs=8,width=8", "batch=2,tokens=5,width=8,heads=2"])
GROUPS = {("loss", "fwd+bwd"), ("pool", "fwd"), ("loss", "fwd"), ("pool", "fwd+bwd")}


def test_what_is_settled_is_skipped(tmp_path):
    path = tmp_path / "cpu.jsonl"
    first = Measurement(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        run(REQUEST, Results.open(path), Plan(), measure_group=first)
    written = len(read([path]))
    assert written > 0  # at once, not at the end
    second = Measurement()
    outcome = run(REQUEST, Results.open(path), Plan(), measure_group=second)
    assert outcome.settled == 2
    done = [(suite, direction) for suite, _, direction in first.groups + second.groups]
    assert len(done) == 4 and set(done) == GROUPS
    third = Measurement()
    assert run(REQUEST, Results.open(path), Plan(), measure_group=third).settled == 4 and not third.groups
    again = Request(REQUEST.suites, REQUEST.shapes, again=True)
    run(again, Results.open(path), Plan(), measure_group=third)
    assert len(third.groups) == 4


def test_another_commit_is_measured_again(tmp_path, monkeypatch):
    path = tmp_path / "cpu.jsonl"
    run(REQUEST, Results.open(path), Plan(), measure_group=Measurement())
    monkeypatch.setattr("bench.report.rows.environment", lambda: {"gpu": "cpu (x)", "commit": "other", "torch": "t"})
    again = Measurement()
    run(REQUEST, Results.open(path), Plan(), measure_group=again)
    assert len(again.groups) == 4


def test_a_peer_that_was_installed_since_is_measured_with_its_group(tmp_path, monkeypatch):
    path = tmp_path / "cpu.jsonl"
    request = Request(["loss"], shapes=["pairs=8,width=8"], peers=["eager", "open_clip"], directions=["fwd"])
    monkeypatch.setattr(Peer, "version", lambda entry: None if entry.package else "1")
    run(request, Results.open(path), Plan(), measure_group=Measurement(status="missing"))
    again = Measurement()
    assert run(request, Results.open(path), Plan(), measure_group=again).settled == 1
    monkeypatch.setattr(Peer, "version", lambda entry: "1")
    run(request, Results.open(path), Plan(), measure_group=again)
    assert len(again.groups) == 1


def test_a_contender_that_broke_the_cuda_context_is_skipped_on_the_next_run(tmp_path, monkeypatch):
    request = Request(["attention"], ["batch=1,tokens=5,heads=1,head_dim=8"], ["eager", "sdpa"], directions=["fwd"])
    monkeypatch.setattr("bench.measure.measure.device_is_dead", lambda: True)
    deadly = replace(everyone()["attention", "eager"], load=lambda setting: 1 / 0)
    monkeypatch.setattr(runs, "peers_of", lambda operation: {**peers_of(operation), "eager": deadly})
    path = tmp_path / "cpu.jsonl"
    with pytest.raises(DeadDevice, match="eager broke the CUDA context"):
        run(request, Results.open(path), Plan(0.0, 2))
    (row,) = read([path])
    assert row.status == "error" and row.crashed and row.reason.startswith("crashed: ZeroDivisionError")
    again = Measurement()
    outcome = run(request, Results.open(path), Plan(), measure_group=again)
    assert [one.impl for one in outcome.rows] == ["sdpa"]


def test_the_deadline(tmp_path):
    """It also interrupts a group, even code that catches every Exception; the rest is listed as left out."""
    seen = []

    def slow(suite, setting, entries, probe, plan, write, progress):
        seen.append(suite)
        if len(seen) == 2:
            try:
                time.sleep(30)
            except Exception:
                pytest.fail("swallowed")
        for entry in entries:
            write(blank_row(suite, setting, entry))

    start = time.monotonic()
    results = Results.open(tmp_path / "cpu.jsonl")
    outcome = run(REQUEST, results, Plan(), until=start + 1.0, measure_group=slow)
    assert time.monotonic() - start < 20
    assert len(outcome.left_out) == 3 and outcome.left_out[0].startswith("pool attention_pool fwd ")
    assert {row.suite for row in read([results.path])} == {"loss"}


def test_a_deadline_that_was_swallowed_is_raised_again(monkeypatch):
    monkeypatch.setattr(runs, "KEPT_SECONDS", 0.1)
    start, swallowed = time.monotonic(), 0
    with pytest.raises(runs.OutOfTime), deadline(start + 0.1):
        try:
            time.sleep(30)
        except BaseException:
            swallowed += 1
        time.sleep(30)
    assert swallowed == 1 and time.monotonic() - start < 20


def test_a_deadline_that_was_met_leaves_no_timer_behind():
    with deadline(time.monotonic() + 0.2):
        pass
    time.sleep(0.3)


def test_the_first_of_every_suite_comes_first():
    settings = {name: SUITES[name].settings("cuda", ["bf16"], quick=True) for name in ("attention", "loss", "mlp")}
    ordered = by_importance(settings)
    assert [name for name, _ in ordered[:3]] == ["attention", "loss", "mlp"]
    assert len(ordered) == sum(map(len, settings.values()))


def test_a_quick_run_on_a_gpu_has_every_suite_and_slow_peers_last(monkeypatch):
    monkeypatch.setattr("bench.measure.run.device", lambda: "cuda")
    request = Request(list(SUITES), quick=True)
    settings = request.settings()
    assert {suite for suite, _ in settings} == {name for name, suite in SUITES.items() if suite.device != "cpu"}
    assert [_key(*one) for one in settings[: len(DECISIVE)]] == list(DECISIVE)
    first = list(dict.fromkeys(settings))
    for suite, setting in first:
        assert not any(entry.slow for entry in request.entries(suite, setting))
    places = [place for place, one in enumerate(settings) if one in settings[:place]]
    again = [settings[place] for place in places]
    assert {suite for suite, _ in again} == {"model", "train", "latency"}
    for suite, setting in again:
        slow = {entry.name for entry in request.entries(suite, setting, waiting=True) if entry.slow}
        assert slow == set(SUITES[suite].quick_peers)
    # Those of the decisive settings come right behind them, the others at the end.
    decisive = [place for place, one in zip(places, again, strict=True) if is_decisive(*one)]
    assert decisive == list(range(len(DECISIVE), len(DECISIVE) + len(decisive))) and len(decisive) == 2
    assert places[len(decisive) :] == list(range(len(settings) - len(again) + len(decisive), len(settings)))
    assert request.labels()[places[-1]].endswith(" with transformers:sdpa:reduce-overhead")
    named = Request(["model"], peers=["triton"], quick=True)  # no other peer is waited for then
    assert len(named.settings()) == len(set(named.settings()))


def test_a_slow_peer_is_measured_with_its_whole_group(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.measure.run.device", lambda: "cuda")
    monkeypatch.setattr("bench.report.rows.environment", lambda: {"gpu": "NVIDIA H200", "commit": "c", "torch": "t"})
    measurement, path = Measurement(), tmp_path / "h200.jsonl"
    request = Request(["latency"], quick=True)
    outcome = run(request, Results.open(path), Plan(), measure_group=measurement)
    decisive, other = (measurement.groups[place] for place in (0, -1))
    assert measurement.groups == [decisive, decisive, other, other]
    slow = [number for number, one in enumerate(outcome.rows) if one.impl == "transformers:sdpa:reduce-overhead"]
    assert len(slow) == 2 and min(slow) > len(outcome.rows) // 4 - 1  # not in the first group of each two
    assert run(request, Results.open(path), Plan(), measure_group=measurement).settled == 4


def test_on_a_cpu_only_what_runs_there(monkeypatch):
    request = Request(["model", "loss", "attention", "mlp"], quick=True)
    settings = [
        (name, setting) for name in request.suites for setting in SUITES[name].settings("cpu", ["fp32"], quick=True)
    ]
    assert {name for name, _ in settings} == {"model", "loss", "attention"}
    monkeypatch.setattr("bench.measure.run.device", lambda: "cpu")
    assert request.without_settings() == ["mlp"]
    assert Request(["model"], directions=["bwd"]).without_settings() == ["model"]
    image = SUITES["cpu"].settings("cpu", ["fp32"], quick=True)[0]
    assert not SUITES["cpu"].settings("cuda", ["fp32"], quick=False, patterns=["base*"])
    assert "siglip_model:sdpa:bf16" in {entry.name for entry in request.entries("cpu", image)}
    embed = SUITES["embed"].settings("cuda", ["fp32"], quick=True)[0]
    assert "siglip_model:sdpa:bf16" not in {entry.name for entry in request.entries("embed", embed)}
    for name, setting in settings:
        entries = request.entries(name, setting)
        assert not any(entry.cuda for entry in entries) and len(entries) > 1
