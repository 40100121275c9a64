"""The loss's kernels for Hopper, compiled without a GPU: registers, shared memory, wgmma, the cost of epilogues."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess
from bench.compiled.sass import Loop

ROOT = Path(__file__).parents[3]
PUBLISHED = "bf16 D=768 train"


@pytest.fixture(scope="module")
def rows(extent: str) -> list[Row]:
    rows = rows_in_a_subprocess("sigmoid_loss_hopper", "h200", only=PUBLISHED if extent == "published" else "")
    return [row for row in rows if row.kernel != "scale_kernel"]


def test_no_spill_and_shared_memory_that_fits(rows):
    assert {row.kernel for row in rows} == {"logit_grad_kernel", "product_kernel"}
    assert not [str(row) for row in rows if row.problems()]
    assert all(row.shared_bytes <= 227 * 1024 for row in rows)


def test_registers_move_from_the_producer_to_the_consumers(rows):
    for row in rows:
        assert {24, 240} <= set(row.register_moves), str(row)


def test_wgmma_as_wide_as_the_embeddings_allow(rows):
    for row in rows:
        (shape,) = row.matrix
        wide = row.kernel == "logit_grad_kernel" or "D=768" in row.launch
        assert shape == ("wgmma m64n256k16" if wide else "wgmma m64n128k16"), str(row)


def test_only_sums_are_loaded_and_stored_without_tma(rows):
    """Without TMA: fp32 gradients two numbers at a time, each thread's sums, t and b."""
    for row in rows:
        assert set(row.accesses) <= {"tma", "ld 4", "ld 8", "st 4", "st 8"} and row.accesses["tma"] >= 3, str(row)


def test_the_epilogue_nearly_hides_under_the_other_consumers_products():
    """A pair costs one exponential, one reciprocal and fewer than twenty instructions."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    module = ["sigmoid_loss_hopper", "--only", PUBLISHED, "--json"]
    command = [sys.executable, "-m", "bench.compiled.tile_cost", *module]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    costs = [Loop(**cost) for cost in json.loads(done.stdout)]
    costs = [cost for cost in costs if cost.kernel == "logit_grad_kernel"]
    assert costs
    for cost in costs:
        assert cost.clocks["mufu"] <= 2 * 128 * 8 + 64, str(cost)
        assert cost.clocks["issue"] <= 20 * 128, str(cost)
