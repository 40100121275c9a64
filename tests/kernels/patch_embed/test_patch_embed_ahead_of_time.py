"""Patch embedding's kernel, compiled for GPUs that are not there: no spills, tensor cores, wide accesses."""

import pytest

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess

PUBLISHED = r"^bf16 64 x \S+ patch \d+ width \d+$"


@pytest.fixture(scope="module")
def rows(extent: str, gpus: tuple[str, ...]) -> list[Row]:
    return rows_in_a_subprocess("patch_embed", *gpus, only=PUBLISHED if extent == "published" else "")


def test_nothing_spills_or_fails(rows, gpus):
    assert {row.kernel for row in rows} == {"patch_embed_kernel"} and {row.gpu for row in rows} == set(gpus)
    assert not [str(row) for row in rows if row.problems()]


@pytest.mark.parametrize(
    ("gpu", "instruction"), [("a100", "mma"), ("h200", "wgmma"), ("b200", "tcgen05"), ("rtx5090", "mma")]
)
def test_products_use_tensor_cores(rows, gpu, instruction):
    products = [row for row in rows if row.gpu == gpu and "fp32 64" not in row.launch]
    assert products
    assert all(any(name.startswith(instruction) for name in row.matrix) for row in products)


def test_accesses_are_as_wide_as_the_patches_allow(rows):
    """Rows of 16 pixels begin at multiples of 16 bytes; rows of 14 pixels are 28 bytes, which 4 divides."""
    for row in rows:
        if "patch 14" in row.launch:
            assert "cp.async 4" in row.accesses and "ld 2" not in row.accesses, str(row)
        elif "tf32" not in row.launch:
            assert "cp.async 16" in row.accesses and not {"cp.async 4", "cp.async 8"} & set(row.accesses), str(row)
        assert "st 16" in row.accesses and not {"st 2", "st 8"} & set(row.accesses), str(row)
