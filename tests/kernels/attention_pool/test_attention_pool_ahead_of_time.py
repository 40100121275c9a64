"""Pooling's kernels, compiled for GPUs that are not there: no spills, tensor cores, wide accesses."""

import pytest

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess

PUBLISHED = "^bf16 (64 x 729 x 1152|1 x 196 x 768)"  # the first takes more shared memory than an RTX 5090 has


@pytest.fixture(scope="module")
def rows(extent: str, gpus: tuple[str, ...]) -> list[Row]:
    return rows_in_a_subprocess("attention_pool", *gpus, only=PUBLISHED if extent == "published" else "")


def test_nothing_spills_or_fails(rows, gpus):
    assert {(row.kernel, row.gpu) for row in rows} == {
        (f"attention_pool_{part}_kernel", gpu) for part in ("forward", "combine", "backward") for gpu in gpus
    }
    assert not [str(row) for row in rows if row.problems()]


def test_tokens_arrive_sixteen_bytes_at_a_time_and_meet_tensor_cores(rows):
    """Sixteen rows, one for each head, are too few for the larger instructions of sm_90 and sm_100."""
    for row in rows:
        if row.kernel == "attention_pool_combine_kernel":
            continue
        assert "mma m16n8k16" in row.matrix, str(row)
        assert "cp.async 16" in row.accesses, str(row)
        assert not {"cp.async 4", "cp.async 8", "ld 2", "ld 8", "st 2", "st 8"} & set(row.accesses), str(row)
