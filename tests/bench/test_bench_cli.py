"""`python -m bench`: bad arguments list the supported ones, and each command says what this machine cannot do."""

import json
import sys

import pytest
import torch
from bench_helpers import PROBE, row
from typer.testing import CliRunner

from bench.cli import app
from bench.compiled.ahead_of_time import Row as Compiled
from bench.environment import ROOT
from bench.report.rows import Results


def bench(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "bad", "listed"),
    [
        (["run", "attentoin"], "attentoin", ["attention", "loss", "latency", "all"]),
        (["run", "loss", "--peers", "siglip"], "siglip", ["siglip_kernel", "open_clip", "triton"]),
        (["run", "loss", "--shapes", "n5"], "n5", ["n65536-d768", "n1048576-d768"]),
        (["run", "attention", "--shapes", "so400m-384-b65"], "so400m-384-b65", ["so400m-384-b64"]),
        (["run", "loss", "--shapes", "pairs=8"], "width", ["pairs=", "width="]),
        (["run", "loss", "--shapes", "n=8"], "n", ["pairs=", "width="]),
        (["run", "--dtype", "fp8"], "fp8", ["bf16", "fp16", "fp32"]),
        (["run", "--direction", "back"], "back", ["fwd", "bwd", "fwd+bwd"]),
        (["check", "atention"], "atention", ["attention", "layer_norm"]),
        (["compile", "gelu"], "gelu", ["attention", "sigmoid_loss"]),
        (["compile", "--gpu", "sm_90"], "sm_90", ["a100", "h200", "b200"]),
        (["tune", "gelu"], "gelu", ["attention", "linear"]),
        (["peers", "nobody"], "nobody", ["attention", "all"]),
    ],
)
def test_bad_arguments_list_the_valid_ones(arguments, bad, listed):
    result = bench(*arguments)
    assert result.exit_code == 2, result.output
    assert bad in result.stderr and "supported: " in result.stderr
    assert all(name in result.stderr.partition("supported: ")[2] for name in listed), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr("siglip_kernels.device.interpreting", lambda: False)
    checked = bench("check")
    assert checked.exit_code == 2 and "need a CUDA device" in checked.stderr and "TRITON_INTERPRET=1" in checked.stderr
    assert bench("gpu", "--quick").exit_code == 2 and bench("tune").exit_code == 2
    monkeypatch.setattr("bench.measure.run.RooflineProbe", lambda *arguments: PROBE)
    request = ("run", "loss", "--shapes", "pairs=8,width=8", "--direction", "fwd", "--peers", "eager,chunked")
    done = bench(*request, "--quick", "--results", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "Triton kernels are not timed here; they are only checked" in done.stderr
    (path,) = tmp_path.glob("cpu-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {item["impl"] for item in rows} == {"chunked", "eager", "chunked#2"}
    assert all(item["status"] == "ok" for item in rows)
    assert all(item["peak_mem_bytes"] is not None for item in rows) or sys.platform != "linux"
    again = bench(*request, "--results", str(tmp_path))
    assert "1 group(s) measured before with this commit" in again.output
    assert len(path.read_text().splitlines()) == len(rows)


def compiled(stack_bytes=0, **values):
    facts = dict(warps=8, registers=200, shared_bytes=1000, shared_limit=232_448, matrix={"wgmma m64n64k16": 4})
    return Compiled("bf16", "attention_forward_kernel", "h200", stack_bytes=stack_bytes, **{**facts, **values})


@pytest.mark.parametrize(
    ("rows", "exit_code", "said"),
    [
        ([compiled()], 0, "1 of 1 kernels"),
        ([compiled(), compiled(stack_bytes=16)], 1, "16 B of stack"),
        ([compiled(error="CompilationError: no")], 1, "CompilationError"),
        ([compiled(shared_bytes=10**6)], 1, "shared memory"),
    ],
)
def test_compile_fails_on_a_spill(monkeypatch, tmp_path, rows, exit_code, said):
    monkeypatch.setattr("bench.compiled.table.use_the_compiler", lambda: None)
    monkeypatch.setattr(
        "bench.compiled.table.compile_operations", lambda modules, gpus, progress: [("attention", row) for row in rows]
    )
    result = bench("compile", "--results", str(tmp_path))
    assert result.exit_code == exit_code, result.output
    assert said in result.output.replace("\n", " ")
    (path,) = tmp_path.glob("compile-*.jsonl")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(written) == len(rows) and {"commit", "triton", "date", "registers", "matrix"} <= set(written[0])
    assert written[0]["arch"] == "sm_90" and bool(written[-1]["problems"]) == bool(exit_code)


def test_every_module_of_launches_is_found():
    from bench.compiled.launches import operation_names

    hopper = {"attention_hopper", "sigmoid_loss_hopper", "linear_hopper"}
    assert {"attention", "sigmoid_loss", "linear", "layer_norm", *hopper} <= set(operation_names())


def test_report(tmp_path):
    results = Results.open(tmp_path / "h200-2026-12-01.jsonl")
    for one in (row("triton", 1.0), row("sdpa", 2.0)):
        results.add(one)
    (tmp_path / "compile-triton-3.6.0.jsonl").write_text('{"op": "attention"}\n')  # has no times
    readme = tmp_path / "page.md"
    readme.write_text("<!-- bench: begin -->\n<!-- bench: end -->\n")
    result = bench("report", "--results", str(tmp_path), "--readme", str(readme))
    assert result.exit_code == 0, result.output
    assert "`triton` 1.00 | `sdpa` 2.00 | **2.00x**" in readme.read_text()
    assert "h200-2026-12-01.jsonl" in readme.read_text()
    assert "![h200 attention tflops by shape](h200-attention-tflops-by-shape.png)" in readme.read_text()
    assert "`sdpa`" in (tmp_path / "README.md").read_text()
    assert bench("report", "absent.jsonl").exit_code == 2
    before = (ROOT / "README.md").read_text()
    elsewhere = bench("report", "--results", str(tmp_path), "--no-plots")
    assert elsewhere.exit_code == 0 and "`triton` 1.00" in elsewhere.output
    assert (ROOT / "README.md").read_text() == before  # it shows the project's own results
    readme.write_text("no marks")
    failed = bench("report", "--results", str(tmp_path), "--readme", str(readme), "--no-plots")
    assert failed.exit_code == 2 and "bench: begin" in failed.stderr


def test_gpu_checks_runs_and_reports_within_nine_minutes(monkeypatch):
    done = []
    monkeypatch.setattr("bench.environment.device", lambda: "cuda")
    monkeypatch.setattr("bench.cli._deadline", lambda minutes: minutes)
    monkeypatch.setattr(
        "bench.cli._check_before_timing",
        lambda suites, until: done.append(("check", until)) or {("mlp", "triton"): "wrong"},
    )
    monkeypatch.setattr(
        "bench.cli._run", lambda request, where, failed, until: done.append(("run", request.quick, failed))
    )
    monkeypatch.setattr("bench.cli._report", lambda *arguments, **more: done.append("report"))
    result = bench("gpu", "--quick")
    assert done == [("check", 9.0), ("run", True, {("mlp", "triton"): "wrong"}), "report"]
    assert result.exit_code == 1  # a kernel is wrong


def test_kernels_for_hopper_are_compiled_for_hopper_alone(monkeypatch):
    from bench.compiled import table
    from bench.compiled.ahead_of_time import Launch

    monkeypatch.setattr(table, "launches_of", lambda operation: launches())
    monkeypatch.setattr(table, "compile_launches", lambda launches, gpu: [row_of(next(launches), gpu)] * 2)

    def launches():
        yield Launch("bf16", lambda: None)
        yield Launch("broken", lambda: None)

    def row_of(launch, gpu):
        if launch.name == "broken":
            raise ValueError("no such shape")
        return Compiled(launch.name, "kernel", gpu)

    rows = list(table.compile_operations(["mlp", "mlp_hopper"], ["a100", "h200"]))
    assert [(operation, row.launch, row.gpu) for operation, row in rows] == [
        ("mlp", "bf16", "a100"),
        ("mlp", "bf16", "h200"),
        ("mlp", "broken", "a100"),
        ("mlp", "broken", "h200"),
        ("mlp_hopper", "bf16", "h200"),
        ("mlp_hopper", "broken", "h200"),
    ]
    assert [row.problems() for _, row in rows if row.launch == "broken"] == [["ValueError: no such shape"]] * 3
