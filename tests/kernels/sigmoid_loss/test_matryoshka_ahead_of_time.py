"""The kernels of the losses of prefixes compiled without a GPU: no spills, tensor cores, the cost beside one loss."""

import pytest

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess


@pytest.fixture(scope="module")
def rows(extent: str, gpus: tuple[str, ...]) -> list[Row]:
    if extent == "published":
        return rows_in_a_subprocess("matryoshka_sigmoid_loss", "h200", only="^bf16 D=768 train$")
    return rows_in_a_subprocess("matryoshka_sigmoid_loss", *gpus)


def test_nothing_spills_or_fails(rows):
    kernels = {"normalise_kernel", "prefix_logit_grad_kernel", "prefix_product_kernel", "finish_kernel"}
    assert {row.kernel for row in rows} == kernels
    assert not [str(row) for row in rows if row.problems()]


_COST = """
from bench.compiled.prefixes import clocks_of
print(*clocks_of("{gpu}"))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("gpu", ["a100", "h200"])
def test_all_prefixes_cost_the_products_of_the_widest(run_python, gpu):
    done = run_python(_COST.format(gpu=gpu))
    assert done.returncode == 0, done.stderr
    one, one_epilogue, every, epilogues = map(float, done.stdout.split())
    assert every <= 1.2 * one  # tiles of 128 columns, of which a segment of 64 fills half; separately it would be 2.25
    assert every + epilogues <= 1.9 * (one + one_epilogue)
