"""Attention's kernel for Blackwell, compiled without a GPU: registers, shared and tensor memory, tcgen05."""

import pytest

from bench.compiled.ahead_of_time import STACK_LIMIT, Row, rows_in_a_subprocess

ONLY = {"published": "bf16 S=(729 D=72|1024 D=128) ", "every": ""}
LAUNCHES = {"published": 2, "every": 6}


@pytest.fixture(scope="module")
def rows(extent: str) -> list[Row]:
    return rows_in_a_subprocess("attention_blackwell", "b200", only=ONLY[extent])


def test_memory_that_fits_and_no_spill_beyond_the_limit(rows, extent):
    assert len(rows) == LAUNCHES[extent] and {row.kernel for row in rows} == {"attention_forward_blackwell_kernel"}
    assert not [str(row) for row in rows if row.problems()]
    for row in rows:
        assert row.shared_bytes <= 227 * 1024 and row.stack_bytes <= STACK_LIMIT, str(row)
        assert row.tensor_memory_columns <= 512, str(row)


def test_registers_move_to_the_warps_that_weigh(rows):
    for row in rows:
        assert row.warps == 16 and {48, 80, 192} <= set(row.register_moves), str(row)


def test_products_are_tcgen05_and_matrices_move_by_tma(rows):
    """Besides, only the log-sum-exp is stored."""
    for row in rows:
        assert set(row.matrix) == {"tcgen05"}, str(row)
        assert set(row.accesses) == {"tma", "st 4"}, str(row)
