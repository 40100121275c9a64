"""The section of the checks."""

import json

from bench.report.checked import checks


def written(path, *found):
    facts = dict(shape={"name": "s729-d72"}, dtype="bf16", kernels="triton", gpu="NVIDIA H200", commit="c", date="d")
    path.write_text("".join(json.dumps({**facts, "ok": True, "problem": "", **one}) + "\n" for one in found))
    return path


def test_the_last_check_of_a_shape_counts(tmp_path):
    first = written(tmp_path / "check-a.jsonl", dict(op="mlp", ok=False, problem="was wrong"), dict(op="linear"))
    wrong = dict(op="attention", kernels="triton:hopper", ok=False, problem="crashed: ended by SIGABRT")
    late = dict(op="layer_norm", problem="not checked: the time limit was reached")
    text = checks([first, written(tmp_path / "check-b.jsonl", dict(op="mlp"), wrong, late)])
    assert "NVIDIA H200, commit c, d: 2 of 4 correct." in text and "was wrong" not in text
    assert "- **wrong** `attention` s729-d72 bf16, `triton:hopper`: crashed: ended by SIGABRT" in text
    assert "- `layer_norm` s729-d72 bf16, `triton`: not checked: the time limit was reached" in text
    assert "| " not in text and checks([]) == ""
