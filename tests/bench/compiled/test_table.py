"""`python -m bench compile`: which launches, in which order, in several processes, and what an interruption leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bench.compiled import table
from bench.compiled.ahead_of_time import Row
from bench.compiled.launch import Launch
from bench.compiled.launches import family_of, launches_of, published
from bench.compiled.table import Task, compile_task, compile_tasks, kernels, tasks
from bench.environment import ROOT, process_environment
from bench.measure.progress import Event

GPUS = ("a100", "rtx3090", "rtx4090", "h200", "b200", "rtx5090")


def environment(**variables):
    found = process_environment(**variables)
    found.pop("TRITON_INTERPRET", None)
    return found


@pytest.fixture(scope="module")
def traced():
    """operation -> GPU -> launch -> kernels that it starts."""
    command = [sys.executable, ROOT / "tests" / "support" / "traced_launches.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_quick_run_compiles_every_kernel_for_every_gpu(traced):
    for operation, gpus in traced.items():
        everywhere = tuple(GPUS)[2:] if operation == "fp8" else tuple(GPUS)  # A100 and RTX 3090 have no fp8
        assert tuple(gpus) == {"hopper": ("h200",), "blackwell": ("b200",), "": everywhere}[family_of(operation)]
        quick = {launch.name for launch in launches_of(operation, published(operation))}
        assert quick
        for gpu, launches in gpus.items():
            every = {kernel for started in launches.values() for kernel in started}
            assert {kernel for name in quick for kernel in launches[name]} == every, (operation, gpu)


def test_a_gpu_gets_the_launches_that_the_operations_make_there(traced):
    """so400m's pooling is left to PyTorch where shared memory is small; tiles are tried where they are candidates."""
    for gpu in GPUS:
        small = gpu.startswith("rtx")
        assert bool(traced["attention_pool"][gpu]["bf16 64 x 729 x 1152 backward"]) != small
        tried = {name for name, started in traced["attention"][gpu].items() if "candidate" in name and started}
        assert 0 < len(tried) < sum("candidate" in name for name in traced["attention"][gpu])
    assert all(started for name, started in traced["linear"]["rtx5090"].items())


def test_kernels_for_an_architecture_are_compiled_for_it_alone(monkeypatch):
    def launches(operation, only=""):
        yield Launch("bf16", lambda: None)
        yield Launch("broken", lambda: None)

    monkeypatch.setattr(table, "launches_of", launches)
    assert tasks(["linear", "linear_hopper"], ["a100", "h200"]) == [
        Task("linear", "bf16", "a100"),
        Task("linear", "bf16", "h200"),
        Task("linear", "broken", "a100"),
        Task("linear", "broken", "h200"),
        Task("linear_hopper", "bf16", "h200"),
        Task("linear_hopper", "broken", "h200"),
    ]
    assert [task.gpu for task in tasks(["linear_blackwell"], list(GPUS))] == ["b200", "b200"]


def test_a_launch_that_raises_is_a_row(monkeypatch):
    def raise_error(launches, gpu):
        raise ValueError(f"{next(launches).name}: no such shape")

    monkeypatch.setattr(table, "use_the_compiler", lambda: None)
    monkeypatch.setattr(table, "compile_launches", raise_error)
    (launch, *_) = launches_of("layer_norm")
    (row,) = compile_task(Task("layer_norm", launch.name, "a100"))
    assert row.problems() == [f"ValueError: {launch.name}: no such shape"] and row.gpu == "a100"


def test_rows_are_in_the_order_of_the_tasks(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chosen = [
        Task("layer_norm", "fp16 64 x 768", "h200"),
        Task("patch_embed", "absent", "a100"),
        Task("layer_norm", "fp16 64 x 768", "rtx5090"),
    ]
    events = []
    found = compile_tasks(chosen, jobs=2, progress=events.append)
    assert [(operation, row.gpu, row.kernel) for operation, row in found] == [
        ("layer_norm", "h200", "layer_norm_forward_kernel"),
        ("layer_norm", "h200", "layer_norm_backward_kernel"),
        ("layer_norm", "h200", "layer_norm_parameter_gradients_kernel"),
        ("patch_embed", "a100", "none"),
        ("layer_norm", "rtx5090", "layer_norm_forward_kernel"),
        ("layer_norm", "rtx5090", "layer_norm_backward_kernel"),
        ("layer_norm", "rtx5090", "layer_norm_parameter_gradients_kernel"),
    ]
    assert [row.launch for _, row in found if row.problems()] == ["absent"]
    assert events[0] == Event(0, 3, "layer_norm fp16 64 x 768 for sm_90") and events[-1] == Event(3, 3)
    assert compile_tasks(chosen, jobs=1) == found


def test_a_kernel_of_several_launches_counts_once():
    first, same, other = (Row(name, "kernel", "h200", key=key) for name, key in (("a", "1"), ("b", "1"), ("c", "2")))
    elsewhere = Row("a", "kernel", "a100", key="3")
    failed = [Row(name, "none", "h200", error="no") for name in "ab"]
    rows = [("linear", row) for row in (first, same, elsewhere, other, *failed)]
    assert kernels(rows) == [("linear", row) for row in (first, elsewhere, other, *failed)]


def _ends(group, seconds):
    """Whether every process of the group ends in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_ctrl_c_ends_every_process(tmp_path):
    command = [sys.executable, "-m", "bench", "compile", "layer_norm", "--jobs", "2"]
    started = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(TRITON_CACHE_DIR=str(tmp_path)),
        start_new_session=True,
    )
    try:
        assert started.stderr is not None
        assert started.stderr.readline().startswith("bench: [1/")
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does
        _, errors = started.communicate(timeout=60)
        assert started.returncode == 130
        assert errors == "bench: interrupted; kernels compiled so far are kept, and the next run reuses them\n"
        assert _ends(started.pid, seconds=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def test_without_the_cache_nothing_is_kept(tmp_path):
    command = [sys.executable, "-m", "bench", "compile", "patch_embed", "--quick", "--gpu", "sm_80", "--no-cache"]
    variables = environment(TRITON_CACHE_DIR=str(tmp_path / "cache"), TMPDIR=str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 kernels compile without a problem" in done.stdout
    assert list(tmp_path.iterdir()) == []
