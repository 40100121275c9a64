"""The product's kernel for Blackwell, compiled without a GPU: registers, shared and tensor memory, tcgen05."""

import pytest

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess

ONLY = {"published": "46656x1152 (qkv|bias, residual|gelu, kept|gelu backward)$", "every": ""}  # each epilogue once
LAUNCHES = {"published": 4, "every": 11}


@pytest.fixture(scope="module")
def rows(extent: str) -> list[Row]:
    return rows_in_a_subprocess("linear_blackwell", "b200", only=ONLY[extent])


def test_no_spill_and_memory_that_fits(rows, extent):
    assert len(rows) == LAUNCHES[extent] and {row.kernel for row in rows} == {"gemm_blackwell_kernel"}
    assert not [str(row) for row in rows if row.problems()]
    for row in rows:
        assert row.stack_bytes == 0 and row.shared_bytes <= 227 * 1024, str(row)
        assert row.tensor_memory_columns == (256 if "fp32" in row.launch or "1024x768 bias" in row.launch else 512)


def test_registers_move_from_the_producer_to_the_epilogues(rows):
    for row in rows:
        assert row.warps == 12 and {24, 240} <= set(row.register_moves), str(row)


def test_a_block_of_depth_is_four_products_and_nothing_else_multiplies(rows):
    for row in rows:
        assert row.matrix == {"tcgen05": 4}, str(row)


def test_matrices_move_by_tma(rows):
    """Besides, only the bias is loaded, two numbers at a time, and only column sums are stored."""
    for row in rows:
        assert row.accesses["tma"] >= 6, str(row)
        assert set(row.accesses) <= {"tma", "ld 4", "st 8"}, str(row)
        assert ("st 8" in row.accesses) == ("backward" in row.launch), str(row)
