"""Counted times beside measured ones."""

import json
from dataclasses import replace

import pytest
from bench_helpers import row

from bench.report.counted import comparison, counted_milliseconds, read_shares


@pytest.fixture
def measured():
    return replace(row("triton", 1.0), roofline_ms=0.5, gpu="NVIDIA H200", dtype="bf16")


@pytest.fixture
def shares(tmp_path, measured):
    """That half of the roofline is counted."""
    sizes = {**measured.shape, "name": "another name"}
    one = dict(op=measured.op, direction=measured.direction, shape=sizes, dtype="bf16", impl="triton", share=0.5)
    path = tmp_path / "counted-h200.jsonl"
    path.write_text(json.dumps({**one, "gpu": "NVIDIA H200"}) + "\n")
    return read_shares([path])


@pytest.mark.parametrize(
    ("milliseconds", "says"),
    [(1.0, "0% shorter"), (1.1, "10% longer"), (1.2, "**20% longer**"), (0.8, "**20% shorter**")],
)
def test_more_than_fifteen_per_cent_stands_out(measured, shares, milliseconds, says):
    slower = replace(measured, ms_median=milliseconds)
    assert counted_milliseconds(slower, shares) == 1.0
    table = comparison([replace(measured, ms_median=7.0), slower], shares)  # the last row of a measurement counts
    assert table.count("`triton`") == 1 and f"| 1.00 | {says} |" in table


def test_only_what_is_counted_is_compared(measured, shares):
    failed = replace(measured, ms_median=None, roofline_ms=None, status="error")
    for other in (
        replace(measured, impl="sdpa"),
        replace(measured, gpu="NVIDIA H100"),
        replace(measured, shape={**measured.shape, "tokens": 9}),
        failed,
    ):
        assert comparison([other], shares) == ""
