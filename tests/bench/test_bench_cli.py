"""`python -m bench`: bad arguments list the supported ones, and each command says what this machine cannot do."""

import json
import sys

import pytest
import torch
from bench_helpers import PROBE, row
from typer.testing import CliRunner

from bench.cli import app
from bench.compiled.ahead_of_time import Row as Compiled
from bench.compiled.table import write_table
from bench.environment import ROOT
from bench.report.rows import Results


def bench(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_help_is_whole_in_a_narrow_terminal():
    commands, run = (
        CliRunner().invoke(app, [*command, "--help"], terminal_width=60, env={"COLUMNS": "60"}).stdout
        for command in ((), ("run",))
    )
    assert "..." not in commands.partition("Commands:")[2] and "(batch=8,tokens=729,…)" in run


@pytest.mark.parametrize("command", ["check", "compile", "count", "peers", "report", "tune"])
def test_help_speaks_of_what_a_command_does(command):
    """Some options are those of `run`, whose contenders and measured suites the others do not have."""
    said = " ".join(bench(command, "--help").stdout.split())
    assert "Suites to measure" not in said and "peers that are ready" not in said and "fp32 on a CPU" not in said


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
        (["count", "gelu"], "gelu", ["attention", "triton_tutorial_attention"]),
        (["count", "--gpu", "sm_75"], "sm_75", ["a100", "h200", "b200", "sm_80", "sm_120"]),
        (["count", "attention", "--only", "("], "'('", ["regular expressions"]),
        (["compile", "gelu"], "gelu", ["attention", "sigmoid_loss"]),
        (["compile", "--gpu", "sm_75"], "sm_75", ["a100", "h200", "b200", "rtx5090", "sm_80", "sm_89", "sm_120"]),
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
    request = ("run", "loss", "--shapes", "pairs=512,width=8", "--direction", "fwd", "--peers", "eager,chunked")
    done = bench(*request, "--quick", "--results", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "Triton kernels are not timed here; they are only checked" in done.stderr
    (path,) = tmp_path.glob("cpu-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {item["impl"] for item in rows} == {"chunked", "eager", "chunked#2"}
    assert all(item["status"] == "ok" for item in rows)
    if sys.platform == "linux":  # each in a process of its own: the definition holds several fp32 matrices of logits
        peaks = {item["impl"]: item["peak_mem_bytes"] for item in rows}
        assert 0 < peaks["chunked"] < peaks["eager"] and 2 * 4 * 512**2 < peaks["eager"] < 12 * 4 * 512**2
    again = bench(*request, "--results", str(tmp_path))
    assert "1 group(s) measured before with this commit" in again.output
    assert len(path.read_text().splitlines()) == len(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_checks_are_written_where_asked(tmp_path):
    done = bench("check", "layer_norm", "--quick", "--tiny", "--results", str(tmp_path / "rows.jsonl"))
    assert done.exit_code == 0 and "1 of 1 correct" in done.output, done.output
    (line,) = (tmp_path / "check-rows.jsonl").read_text().splitlines()
    assert json.loads(line)["op"] == "layer_norm"
    assert bench("report", "--results", str(tmp_path), "--no-plots").exit_code == 0  # which reads no checks


def compiled(stack_bytes=0, **values):
    facts = dict(warps=8, registers=200, shared_bytes=1000, shared_limit=232_448, matrix={"wgmma m64n64k16": 4})
    return Compiled("bf16", "attention_forward_kernel", "h200", stack_bytes=stack_bytes, **{**facts, **values})


@pytest.fixture
def fake_compiler(monkeypatch):
    """Stands in for the compiler: returns the rows, and the tasks and number of processes of each call."""
    calls = []

    def install(*rows):
        def compile_tasks(wanted, jobs, progress):
            calls.append((wanted, jobs))
            return [("attention", row) for row in rows]

        monkeypatch.setattr("bench.compiled.table.use_the_compiler", lambda: None)
        monkeypatch.setattr("bench.compiled.table.compile_tasks", compile_tasks)
        return calls

    return install


@pytest.mark.parametrize(
    ("rows", "exit_code", "said"),
    [
        ([compiled()], 0, "1 of 1 kernels"),
        ([compiled(stack_bytes=16)], 0, "1 of 1 kernels"),
        ([compiled(), compiled(stack_bytes=24, key="1")], 1, "24 B of stack"),
        ([compiled(error="CompilationError: no")], 1, "CompilationError"),
        ([compiled(shared_bytes=10**6)], 1, "shared memory"),
        ([compiled(matrix={}, products={"bf16": 1})], 1, "products of bf16 without matrix instructions"),
    ],
)
def test_compile_fails_on_a_problem(fake_compiler, tmp_path, rows, exit_code, said):
    fake_compiler(*rows)
    result = bench("compile", "--results", str(tmp_path))
    assert result.exit_code == exit_code, result.output
    assert said in result.output.replace("\n", " ")
    (path,) = tmp_path.glob("compile-*.jsonl")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(written) == len(rows) and {"commit", "triton", "date", "registers", "matrix"} <= set(written[0])
    assert written[0]["arch"] == "sm_90" and bool(written[-1]["problems"]) == bool(exit_code)


ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def test_compile_takes_every_architecture_unless_some_are_named(fake_compiler):
    from bench.compiled.launch import architecture

    calls = fake_compiler(compiled())
    bench("compile", "--quick")
    bench("compile", "patch_embed", "--gpu", "sm_120,h200", "--gpu", "sm_90", "--jobs", "3")
    (every, _), (some, jobs) = calls
    assert {(task.operation, architecture(task.gpu)) for task in every} == {
        (operation, name)
        for operation in (
            *("attention", "attention_pool", "layer_norm", "linear"),
            *("matryoshka_sigmoid_loss", "patch_embed", "resize_normalize", "sigmoid_loss"),
        )
        for name in ARCHITECTURES
    } | {(f"{operation}_hopper", "sm_90") for operation in ("attention", "fp8", "linear", "sigmoid_loss")} | {
        (f"{operation}_blackwell", "sm_100") for operation in ("attention", "linear")
    } | {("fp8", name) for name in ("sm_89", "sm_90", "sm_100", "sm_120")}  # which multiply fp8
    assert list(dict.fromkeys(task.gpu for task in some)) == ["rtx5090", "h200"] and jobs == 3


def test_compile_says_what_it_cannot_compile():
    result = bench("compile", "linear_hopper", "--gpu", "sm_80")
    assert result.exit_code == 2 and "linear_hopper: has no kernels for a100" in result.stderr


def test_only_a_complete_table_replaces_the_committed_one(fake_compiler, monkeypatch, tmp_path):
    fake_compiler(compiled())
    monkeypatch.setattr("bench.report.rows.results_directory", lambda: tmp_path)
    bench("compile", "--quick")
    bench("compile", "linear")
    bench("compile", "--gpu", "h200")
    assert not list(tmp_path.iterdir())
    assert "Written to" in bench("compile").output
    (path,) = tmp_path.iterdir()
    bench("compile", "--quick", "--results", str(tmp_path / "quick.jsonl"))
    quick, full = (json.loads(one.read_text()) for one in (tmp_path / "quick.jsonl", path))
    assert {**quick, "quick": False} == full and quick["quick"]


def test_compile_prints_json(fake_compiler):
    fake_compiler(compiled(), compiled(stack_bytes=24, key="1"))
    result = bench("compile", "--json", "--quick")
    rows = json.loads(result.stdout)
    assert [(row["op"], row["arch"], len(row["problems"])) for row in rows] == [
        ("attention", "sm_90", 0),
        ("attention", "sm_90", 1),
    ]
    assert "1 of 2 kernels compile without a problem" in result.stderr and result.exit_code == 1


def test_every_module_of_launches_is_found():
    from bench.compiled.launches import operation_names

    special = {"attention_hopper", "sigmoid_loss_hopper", "linear_hopper", "linear_blackwell"}
    special |= {"attention_blackwell", "fp8_hopper"}
    assert {"attention", "sigmoid_loss", "linear", "layer_norm", *special} <= set(operation_names())


def test_report(tmp_path):
    results = Results.open(tmp_path / "h200-2026-12-01.jsonl")
    for one in (row("triton", 1.0), row("sdpa", 2.0)):
        results.add(one)
    write_table([("attention", compiled())], tmp_path / "compile-triton-3.6.0.jsonl")  # has no times
    readme = tmp_path / "page.md"
    readme.write_text("<!-- bench: begin -->\n<!-- bench: end -->\n")
    result = bench("report", "--results", str(tmp_path), "--readme", str(readme))
    assert result.exit_code == 0, result.output
    assert "`triton` 1.00 | `sdpa` 2.00 | **2.00x**" in readme.read_text()
    assert "h200-2026-12-01.jsonl" in readme.read_text()
    assert "| sm_90 | H200 | 1 | 200 | 0 | none |" in readme.read_text()
    assert "| `attention` | sm_90 | 1 | 200 | 0 | none |" in (tmp_path / "README.md").read_text()
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
        lambda request, where, until: done.append(("check", until)) or {("mlp", "triton"): "wrong"},
    )
    monkeypatch.setattr(
        "bench.cli._run", lambda request, where, failed, until: done.append(("run", request.quick, failed))
    )
    monkeypatch.setattr("bench.cli._report", lambda *arguments, **more: done.append("report"))
    result = bench("gpu", "--quick")
    assert done == [("check", 9.0), ("run", True, {("mlp", "triton"): "wrong"}), "report"]
    assert result.exit_code == 1  # a kernel is wrong
