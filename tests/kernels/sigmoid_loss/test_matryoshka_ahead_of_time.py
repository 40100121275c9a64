"""The kernels of the losses of prefixes compiled without a GPU: no spills, tensor cores, the cost beside one loss."""

import pytest
import torch

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess
from bench.compiled.launch import GPUS
from bench.compiled.launches.matryoshka_sigmoid_loss import WIDTHS
from siglip_kernels.sigmoid_loss.config import choose
from siglip_kernels.sigmoid_loss.matryoshka.blocks import Segments
from siglip_kernels.sigmoid_loss.matryoshka.config import columns_of, padding_of, prefix_config


@pytest.fixture(scope="module")
def rows(extent: str, gpus: tuple[str, ...]) -> list[Row]:
    if extent == "published":
        return rows_in_a_subprocess("matryoshka_sigmoid_loss", "h200", only="^bf16 D=768 train$")
    return rows_in_a_subprocess("matryoshka_sigmoid_loss", *gpus)


def test_nothing_spills_or_fails(rows):
    kernels = {"normalise_kernel", "prefix_logit_grad_kernel", "prefix_product_kernel", "finish_kernel"}
    assert {row.kernel for row in rows} == kernels
    assert not [str(row) for row in rows if row.problems()]


def test_the_products_pad_no_column():
    """Of segments of 64 columns, which fill half of a tile."""
    for gpu in GPUS.values():
        base = choose(torch.bfloat16, WIDTHS[-1], gpu, "ieee")
        ends = Segments(WIDTHS, padding_of(base.weighted)).ends
        assert ends[-1] == columns_of(ends, prefix_config(base, ends, gpu).product) == WIDTHS[-1]


_COST = """
from bench.compiled.prefixes import clocks_of
clocks = clocks_of("{gpu}")
print(clocks.products / clocks.one_products, clocks.every / clocks.bound, clocks.every / clocks.loss)
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("gpu", "products", "by_bound", "by_loss"), [("a100", 1.05, 1.04, 1.55), ("h200", 1.001, 1.001, 1.75)]
)
def test_all_prefixes_cost_the_widest_and_the_epilogues_of_the_shorter(run_python, gpu, products, by_bound, by_loss):
    """Separately the products would be 2.25 times those of the widest. Half tiles cost sm_80 more than half."""
    done = run_python(_COST.format(gpu=gpu))
    assert done.returncode == 0, done.stderr
    found = list(map(float, done.stdout.split()))
    assert all(ratio <= most for ratio, most in zip(found, (products, by_bound, by_loss), strict=True)), found
