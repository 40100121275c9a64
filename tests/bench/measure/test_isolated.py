"""Processes that hang, crash or break the CUDA context lose their own rows only; those here follow a script."""

import json
import sys
import textwrap
import time
from dataclasses import asdict

import pytest
import torch
from bench_helpers import row

from bench.measure import isolated
from bench.measure.check import failures
from bench.measure.isolated import check_isolated, run_isolated
from bench.measure.measure import Plan
from bench.measure.progress import Event
from bench.measure.run import Request
from bench.peers import peers_of
from bench.report.rows import is_of_rows, read

REQUEST = Request(["loss"], ["pairs=8,width=8"], ["eager", "chunked"])


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Makes the processes run a few lines, in which `task`, `path`, `tell` and `blank` are defined."""
    path = tmp_path / "h200.jsonl"

    def write(lines):
        script = tmp_path / "script.py"
        script.write_text(
            "import json, os, signal, sys, time\n"
            "task = json.loads(sys.argv[1])\n"
            f"path, blank = {str(path)!r}, json.loads({json.dumps(asdict(row('triton:hopper')))!r})\n"
            "def tell(**what): print(json.dumps(what), flush=True)\n" + textwrap.dedent(lines)
        )
        monkeypatch.setattr(isolated, "COMMAND", (sys.executable, str(script)))
        return path

    return write


def begun(seconds=60, kernels='"triton:hopper"', blank="blank"):
    step = dict(done=0, total=2, group="loss fwd", step="triton:hopper")
    return f"tell(path=path); tell(begun={step}, blank={blank}, kernels={kernels}, seconds={seconds})"


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        ("time.sleep(60)", "did not end within 1 s"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("sys.exit(3)", "ended with exit code 3"),
    ],
)
def test_a_contender_that_hangs_or_crashes_gets_a_row_and_the_next_process_resumes(scripted, fate, reason):
    path = scripted(
        f"""
        if task["failed"]:
            assert task["failed"][0][:2] == ["attention", "triton:hopper"] and task["start"] == 0
            assert ["vision_tower", "triton:hopper"] in [failed[:2] for failed in task["failed"]]
            tell(path=path); tell(settled=1, left_out=[]); sys.exit()
        {begun(seconds=1 if "sleep" in fate else 60)}
        {fate}
        """
    )
    outcome, where = run_isolated(REQUEST, None, Plan(), None, lambda event: None)
    (written,) = read([path])
    assert where == path and outcome.rows == [written] and outcome.settled == 1
    assert (written.impl, written.status) == ("triton:hopper", "error")
    assert written.crashed and written.reason == f"crashed: {reason}"


def test_a_peer_that_crashes_fails_no_kernel(scripted):
    scripted(
        f"""
        if os.path.exists(path):
            assert task["failed"] == []
            tell(path=path); tell(settled=0, left_out=[]); sys.exit()
        {begun(kernels="None")}
        sys.exit(1)
        """
    )
    outcome, _ = run_isolated(REQUEST, None, Plan(), None, lambda event: None)
    assert len(outcome.rows) == 1


def test_a_row_that_the_process_wrote_itself_is_not_written_twice(scripted):
    path = scripted(
        f"""
        if task["failed"]:
            tell(path=path); tell(settled=0, left_out=[]); sys.exit()
        {begun()}
        tell(row={{**blank, "status": "error", "crashed": True, "reason": "crashed: illegal memory access"}})
        sys.exit(1)
        """
    )
    outcome, _ = run_isolated(REQUEST, None, Plan(), None, lambda event: None)
    assert [one.reason for one in outcome.rows] == ["crashed: illegal memory access"]
    assert not path.exists()  # the other process writes it


def test_a_group_that_crashes_while_it_is_timed_is_left_out(scripted):
    scripted(
        f"""
        if task["start"] == 1:
            tell(path=path); tell(settled=0, left_out=["more"]); sys.exit()
        {begun(blank="None", kernels="None")}
        sys.exit(1)
        """
    )
    outcome, _ = run_isolated(REQUEST, None, Plan(), None, lambda event: None)
    assert outcome.rows == [] and outcome.left_out == ["loss fwd (ended with exit code 1 while it was timed)", "more"]


def test_a_process_that_cannot_be_interrupted_is_stopped_at_the_deadline(scripted, monkeypatch):
    monkeypatch.setattr(isolated, "GRACE", 0.5)
    scripted(begun() + "\ntime.sleep(60)")
    start = time.monotonic()
    outcome, _ = run_isolated(REQUEST, None, Plan(), start + 5, lambda event: None)
    assert time.monotonic() - start < 30
    assert outcome.rows == [] and len(outcome.left_out) == 2  # both directions; no contender is to blame


def test_a_process_that_cannot_begin_is_an_error(scripted):
    scripted("sys.exit(7)")
    with pytest.raises(RuntimeError, match="ended with exit code 7 before it had begun"):
        run_isolated(REQUEST, None, Plan(), None, lambda event: None)
    scripted("tell(error='read-only')")
    with pytest.raises(RuntimeError, match="read-only"):
        run_isolated(REQUEST, None, Plan(), None, lambda event: None)


@pytest.mark.parametrize(
    ("fate", "problem"), [("time.sleep(60)", "did not end within 5 s"), ("os.abort()", "ended by SIGABRT")]
)
def test_a_check_that_hangs_or_crashes_fails(scripted, monkeypatch, fate, problem):
    monkeypatch.setattr(isolated, "CHECK", 5.0 if "sleep" in fate else 60.0)
    scripted(
        f"""
        tell(begun=["s64", "bf16"])
        facts = dict(op=task["operation"], shape={{"name": "s64"}}, dtype="bf16", kernels=task["kernels"])
        tell(checked=dict(facts, ok=True))
        tell(begun=["s65", "bf16"])
        if task["kernels"] == "triton:hopper":
            assert os.environ["SIGLIP_KERNELS_HOPPER"] == "1"
            {fate}
        tell(ended=True)
        """
    )
    checked = check_isolated(["attention", "layer_norm"], quick=True)
    assert [(one.op, one.kernels, one.ok) for one in checked] == [
        ("attention", "triton", True),
        ("layer_norm", "triton", True),
        ("attention", "triton:hopper", True),
        ("attention", "triton:hopper", False),
        ("attention", "triton:blackwell", True),
    ]
    assert failures(checked)["attention", "triton:hopper"].endswith(f"(s65 bf16): crashed: {problem}")


def test_what_the_deadline_leaves_is_not_checked_and_still_timed(scripted):
    scripted(
        """
        tell(begun=["s64", "bf16"])
        if task["operation"] == "attention":
            time.sleep(60)
        tell(checked=dict(op="layer_norm", shape={"name": "s64"}, dtype="bf16", ok=True))
        tell(ended=True)
        """
    )
    start = time.monotonic()
    checked = check_isolated(["layer_norm", "attention"], quick=True, until=start + 5)
    assert time.monotonic() - start < 30
    assert [one.op for one in checked] == ["layer_norm", *["attention"] * 3] and failures(checked) == {}
    assert not checked[0].problem and all("not checked: the time limit" in one.problem for one in checked[1:])


def test_what_will_be_measured_is_compiled_with_the_check(scripted, monkeypatch):
    """In the process of its check, or one of its own; problems of the latter are left to the measurement."""
    monkeypatch.setattr("bench.measure.run.device", lambda: "cuda")
    path = scripted(
        """
        with open(path + task["task"], "a") as file:
            print(task["operation"], task.get("kernels") or task["peer"], file=file)
        assert task["request"]["suites"] == ["latency", "pool"]
        if task["task"] == "prepare":
            assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "2"
            sys.exit(1)
        tell(ended=True)
        """
    )
    steps = []
    request = Request(["latency", "pool"], quick=True)
    assert check_isolated(["attention_pool"], quick=True, request=request, progress=steps.append) == []
    checked, prepared = (path.with_name(path.name + task).read_text().splitlines() for task in ("check", "prepare"))
    assert checked == ["attention_pool triton"] and len(steps) == 1 + len(prepared)
    kernels = {"triton", "triton:fp8", "triton:graph", "triton:hopper", "triton:blackwell"}
    models = {*kernels, "transformers:sdpa:reduce-overhead"}
    assert set(prepared) == {"attention_pool compile", *(f"vision_tower {name}" for name in models)}


def test_checks_are_recorded_with_their_environment(tmp_path):
    (checked,) = check_isolated(["layer_norm"], quick=True)
    said = isolated.record_checks([checked, checked], tmp_path / "h200.jsonl")
    path = tmp_path / "check-h200.jsonl"
    assert said == f"written to {path}" and not is_of_rows(path)
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == second and first["op"] == "layer_norm" and first["ok"] and first["torch"] == torch.__version__


def test_contenders_are_called_once_per_setting(monkeypatch):
    """What it calls is compiled by the process; here PyTorch's own, whose errors are ignored."""
    asked, told = [], []
    entry = peers_of("attention_pool")["folded"]
    monkeypatch.setattr(isolated, "step_of", lambda contender, inputs, setting: lambda: asked.append(setting) or 1 / 0)
    request = Request(["pool"], ["batch=2,tokens=5,width=8,heads=2"], [entry.name])
    isolated._call(request, "attention_pool", entry.name, lambda **message: told.append(message))
    assert [setting.direction for setting in asked] == ["fwd", "fwd+bwd"]
    assert [message["seconds"] for message in told] == [isolated.KERNELS_QUICK] * 2


def test_real_processes(tmp_path):
    """On this machine, with or without a GPU: a check in the interpreter and a run."""
    steps = []
    (checked,) = check_isolated(["layer_norm"], quick=True, progress=steps.append)
    assert checked.ok, checked.problem
    assert steps == [Event(0, 1, "check layer_norm triton")]
    request = Request(["loss"], ["pairs=8,width=8"], ["eager"], directions=["fwd"])
    outcome, path = run_isolated(request, tmp_path, Plan(0.0, 2), None, steps.append)
    assert [one.impl for one in outcome.rows] == ["eager", "eager#2"] and outcome.rows == read([path])
    assert [step.step for step in steps[1:]][-1] == "timing" and steps[-1].group.startswith("loss sigmoid_loss fwd ")
