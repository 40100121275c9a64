"""The file format: every field, nothing lost, an incomplete line dropped, and which measurements are settled."""

import json
import re

import pytest
from bench_helpers import row

from bench import environment as environment_module
from bench.environment import commit, environment
from bench.report.rows import FIELDS, LATER, Results, Row, new_row, read, slug

SCHEMA = [
    "suite", "op", "direction", "shape", "dtype", "impl", "status", "reason", "crashed", "disturbed",
    "comparable", "ms_median", "ms_p20", "ms_p80",
    "tflops", "gbps", "roofline_ms", "roofline_share", "peak_mem_bytes", "error_vs_fp64", "precision", "least_cosine",
    "gpu", "driver", "cuda", "torch", "triton", "peer_version", "commit", "dirty", "date",
]  # fmt: skip


def test_schema(tmp_path):
    assert list(FIELDS) == SCHEMA
    results = Results.open(tmp_path / "h200-2026-12-01.jsonl")
    results.add(row("triton", 1.5))
    (line,) = results.path.read_text().splitlines()
    assert list(json.loads(line)) == SCHEMA
    assert read([results.path]) == [row("triton", 1.5)]


def test_environment_of_this_machine():
    facts = environment()
    assert set(facts) <= set(SCHEMA)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"])
    assert facts["commit"] and facts["torch"] and facts["gpu"]
    assert bool(facts["dirty"]) == ("+" in facts["commit"])


def test_a_copy_of_the_code_without_its_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(environment_module, "in_repository", lambda: False)
    monkeypatch.setattr(environment_module, "ROOT", tmp_path)
    monkeypatch.delenv("SIGLIP_BENCH_COMMIT", raising=False)
    (tmp_path / "bench").mkdir()
    commits = []
    for code in ("a = 1", "a = 2", "a = 1"):
        (tmp_path / "bench" / "run.py").write_text(code)
        commits.append(commit.__wrapped__())
    assert commits[0] == commits[2] != commits[1]  # other code is not settled
    assert commits[0][0].startswith("code ") and commits[0][1] is None
    monkeypatch.setenv("SIGLIP_BENCH_COMMIT", "5c8d394")
    assert commit.__wrapped__() == ("5c8d394", None)


def test_an_unknown_status_is_an_error():
    with pytest.raises(ValueError, match="ok, oom, unsupported, missing, error"):
        row("triton", status="fast")


def test_slug():
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert slug("NVIDIA H200") == "h200"
    assert slug("cpu (AMD EPYC, 2 threads)") == "cpu"


def test_an_incomplete_last_line_is_dropped(tmp_path):
    results = Results.open(tmp_path / "a.jsonl")
    results.add(row("triton", 1.0))
    whole = results.path.read_text()
    results.path.write_text(whole + whole[: len(whole) // 2])
    assert read([results.path]) == [row("triton", 1.0)]  # the report does not change the file
    again = Results.open(results.path)
    assert len(again.rows) == 1
    assert results.path.read_text() == whole


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"suite": "loss", "speed": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .*speed.*lacking"):
        read([path])
    path.write_text(json.dumps(vars(row("triton")))[:-9] + "\n" + json.dumps(vars(row("triton"))) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1"):  # an incomplete line before the end
        read([path])
    path.write_text("not json\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1"):
        read([path])


def test_files_from_before_precisions_were_recorded(tmp_path):
    path = tmp_path / "a.jsonl"
    values = vars(row("triton", 1.0))
    path.write_text(json.dumps({name: values[name] for name in values if name not in LATER}) + "\n")
    assert {"precision", "least_cosine"} == LATER and read([path]) == [row("triton", 1.0)]


def test_settled(tmp_path):
    results = Results.open(tmp_path / "a.jsonl")
    results.add(row("triton", 1.0, peer_version="3.6.0"))
    same = dict(peer_version="3.6.0")
    assert results.settled(row("triton", **same))
    assert not results.settled(row("triton", peer_version="3.7.0"))
    assert not results.settled(row("triton", commit="abc+123456", **same))
    assert not results.settled(row("triton", torch="2.13.0", **same))
    assert not results.settled(row("triton", dtype="fp16", **same))
    assert not results.settled(row("sdpa", **same))


def test_the_last_row_counts(tmp_path):
    results = Results.open(tmp_path / "a.jsonl")
    results.add(row("triton", 2.0))
    results.add(row("triton", 1.0))
    assert [kept.ms_median for kept in Results.open(results.path).rows.values()] == [1.0]


def test_new_row_carries_the_environment():
    made = new_row(suite="loss", op="sigmoid_loss", direction="fwd", shape={}, dtype="fp32", impl="eager")
    assert isinstance(made, Row) and made.commit == environment()["commit"] and made.status == "ok"
