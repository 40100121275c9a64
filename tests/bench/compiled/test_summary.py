"""The tables of compiled kernels: per operation and architecture, from the rows and from a file of them."""

import dataclasses
import json

import pytest

from bench.compiled.ahead_of_time import Row
from bench.compiled.summary import by_architecture, by_operation, problems, read_table, summarise
from bench.compiled.table import write_table


def row(key, gpu="h200", **values):
    facts = dict(registers=128, shared_bytes=2048, shared_limit=232_448, matrix={"wgmma m64n64k16": 4})
    return Row(f"bf16 {key}", "forward_kernel", gpu, key=key, **{**facts, **values})


ROWS = [
    ("attention", row("1")),
    ("attention", row("1", registers=128)),  # of another launch
    ("attention", row("2", registers=255, stack_bytes=8, shared_bytes=131_072, matrix={"mma m16n8k16": 2})),
    ("attention", row("3", "rtx5090", stack_bytes=144, shared_limit=101_376, matrix={"mma m16n8k16": 2})),
    ("layer_norm", row("4", matrix={})),
    ("layer_norm", Row("bf16", "none", "a100", error="ValueError: no such width")),
]
UNKNOWN_GPU = json.dumps({"op": "attention", **dataclasses.asdict(row("1", "v100"))})


def test_a_summary_holds_the_worst_of_each_kernel():
    attention, consumer, failed, norm = summarise(ROWS)
    assert (attention.operation, attention.architecture, attention.kernels) == ("attention", "sm_90", 2)
    assert attention.cells() == ["2", "255", "1", "8 B", "128 of 227 KiB", "mma, wgmma"] and attention.problems == 0
    assert (consumer.architecture, consumer.spilling, consumer.stack_bytes, consumer.problems) == ("sm_120", 1, 144, 1)
    assert (failed.architecture, failed.problems) == ("sm_80", 1) and norm.cells()[-1] == "none"
    assert [(one.architecture, one.kernels) for one in summarise(ROWS, by_operation=False)] == [
        ("sm_80", 1),
        ("sm_90", 3),
        ("sm_120", 1),
    ]


def test_tables_are_made_from_the_file(tmp_path):
    path = write_table(ROWS, tmp_path)
    rows, shared = read_table(path)
    assert rows == [one for number, one in enumerate(ROWS) if number != 1]  # a line per kernel
    assert set(shared) == {"quick", "triton", "commit", "dirty", "date"}
    page = by_operation(path)
    assert "| `attention` | sm_120 | 1 | 128 | 1 | 144 B | 2 of 99 KiB | mma | 1 |" in page
    assert all(f"- {problem}" in page for problem in problems(ROWS)) and "No kernel has a problem" not in page
    assert f"]({path.name})" in page and str(shared["date"]) in page and str(shared["commit"]) in page
    readme = by_architecture(path, "bench/results/x.jsonl")
    assert "| sm_90 | H200 | 3 | 255 | 1 | 8 B | 128 of 227 KiB | mma, wgmma | 0 |" in readme
    assert "(bench/results/x.jsonl)" in readme and "`python -m bench compile`" in readme
    assert "`python -m bench compile --quick`" in by_operation(write_table(ROWS, tmp_path, quick=True))
    assert "No kernel has a problem." in by_operation(write_table(ROWS[:1], tmp_path / "other.jsonl"))


@pytest.mark.parametrize("line", ["", "{", '{"op": "attention"}', "[]", UNKNOWN_GPU])
def test_a_bad_file_is_named(tmp_path, line):
    path = tmp_path / "compile-triton-3.7.1.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"compile-triton-3.7.1.jsonl, line 1: "):
        read_table(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        read_table(path)
