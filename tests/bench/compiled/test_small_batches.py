"""The table of counted clocks of small batches."""

import re
from pathlib import Path

import pytest

from bench.compiled import small_batches

ROOT = Path(__file__).parents[3]
LINE = re.compile(
    r"^(?P<gpu>\w+) +(?P<model>\w+) +(?P<rows>\d+) (?P<gemm>.+?) +usual (?P<usual>.+?) clocks"
    r" +chosen (?P<chosen>.+?) clocks +(?P<gain>\d+\.\d\d)x$"
)


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[re.Match]:
    monkeypatch.setattr("sys.argv", ["small_batches", *arguments])
    assert small_batches.main() == 0
    return [match for line in capsys.readouterr().out.splitlines() if (match := LINE.match(line))]


def test_a_line_for_each_gemm_of_each_batch_and_gpu(capsys, monkeypatch):
    lines = printed(capsys, monkeypatch, "--gpu", "h200", "rtx5090", "--batch", "base:196", "so400m:729")
    assert len(lines) == 2 * 2 * 5 and {line["gpu"] for line in lines} == {"h200", "rtx5090"}
    assert all(float(line["gain"]) >= 1 for line in lines)  # the usual tiles are candidates as well


def test_readme_has_the_numbers_of_the_table(capsys, monkeypatch):
    """What it says about fc2 of one image of base."""
    text = " ".join((ROOT / "README.md").read_text().split())
    for gpu, name in (("h200", "an H200's"), ("rtx5090", "an RTX 5090's")):
        (line,) = [
            line for line in printed(capsys, monkeypatch, "--gpu", gpu, "--batch", "base:196") if line["gemm"] == "fc2"
        ]
        before, now = (re.search(r"(\d+) programs", line[side])[1] for side in ("usual", "chosen"))
        multiprocessors = small_batches.GPUS[gpu].multiprocessors
        assert f"{now} of {name} {multiprocessors}" in text and f"instead of {before}" in text
        assert re.search(rf"{name} .*?{float(line['gain']):.1f} times fewer", text)


@pytest.mark.parametrize("batch", ["base", "base:0", "large:196", "base:x", "base:-1"])
def test_a_batch_that_is_not_one_is_named(batch, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["small_batches", "--batch", batch])
    with pytest.raises(SystemExit):
        small_batches.main()
    assert f"{batch!r} is not MODEL:ROWS, with one of base, so400m" in capsys.readouterr().err
