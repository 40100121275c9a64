"""The kernels of fp8, compiled for GPUs that are not there: spills, and matrix instructions that multiply fp8."""

import pytest

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess
from bench.compiled.launches import has_kernels_for, published

# A block of depth of these is 32 numbers: 32 bytes, fp8.
MATRIX_INSTRUCTION = {"rtx4090": "mma m16n8k32", "h200": "wgmma m64n", "b200": "tcgen05", "rtx5090": "mma m16n8k32"}
SOME = "^so400m 46656 (normalise, bound|gelu|fc2)$"


@pytest.fixture(scope="module")
def rows(extent: str) -> list[Row]:
    if extent == "every":
        return rows_in_a_subprocess("fp8", *MATRIX_INSTRUCTION)
    return [*rows_in_a_subprocess("fp8", "h200", only=SOME), *rows_in_a_subprocess("fp8", "rtx4090", only="gelu$")]


def test_nothing_spills_or_fails(rows):
    assert rows and not [str(row) for row in rows if row.problems()]


def test_products_are_of_fp8(rows):
    products = [row for row in rows if row.kernel == "gemm_kernel"]
    assert products
    for row in products:
        assert row.products == {"fp8": sum(row.products.values())}, str(row)
        assert all(name.startswith(MATRIX_INSTRUCTION[row.gpu]) for name in row.matrix), str(row)
        if row.gpu == "h200":
            assert all(name.endswith("k32") for name in row.matrix), str(row)


def test_older_gpus_have_no_launches():
    assert not has_kernels_for("fp8", "a100") and not has_kernels_for("fp8", "rtx3090")
    assert all(has_kernels_for("fp8", gpu) for gpu in MATRIX_INSTRUCTION)
    assert published("fp8")
