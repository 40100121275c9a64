"""The sigmoid loss's kernels compiled without a GPU: no spills, tensor cores, one compilation."""

import pytest

from bench.compiled.ahead_of_time import GPUS, Row, rows_in_a_subprocess

PUBLISHED = "^bf16 D=768 train"


@pytest.fixture(scope="module")
def rows(extent: str, gpus: tuple[str, ...]) -> list[Row]:
    return rows_in_a_subprocess("sigmoid_loss", *gpus, only=PUBLISHED if extent == "published" else "")


def test_nothing_spills_or_fails(rows, gpus):
    kernels = {"logit_grad_kernel", "product_kernel", "scale_kernel"}
    assert {(row.kernel, row.gpu) for row in rows} == {(kernel, gpu) for kernel in kernels for gpu in gpus}
    assert not [str(row) for row in rows if row.problems()]


@pytest.mark.parametrize(
    ("gpu", "instruction"), [("a100", "mma"), ("h200", "wgmma"), ("b200", "tcgen05"), ("rtx5090", "mma")]
)
def test_half_precision_products_use_tensor_cores(rows, gpu, instruction):
    matrix = [row for row in rows if row.gpu == gpu and row.kernel != "scale_kernel" and "fp32" not in row.launch]
    assert matrix
    assert all(any(name.startswith(instruction) for name in row.matrix) for row in matrix)


def test_tiles_are_loaded_by_tma_or_sixteen_bytes_at_a_time(rows):
    for row in rows:
        if row.kernel != "scale_kernel" and "tf32" not in row.launch:
            assert "tma" in row.accesses if GPUS[row.gpu].has_tma else "cp.async 16" in row.accesses, str(row)


_COST = """
from bench.compiled.launches.sigmoid_loss import launches
from bench.compiled.tile_cost import costs_of
cost = next(cost for cost in costs_of([next(launches())]) if cost.kernel == "logit_grad_kernel")
print(max(cost.clocks.values()))
"""


def test_the_epilogue_leaves_the_tensor_cores_their_time(run_python):
    """Of a 128 x 256 tile at width 768: two warps per quarter of a multiprocessor, 512 multiply-adds a clock."""
    done = run_python(_COST)
    assert done.returncode == 0, done.stderr
    products = 128 * 256 * 768 / 4 / 512
    assert products / (products + 2 * float(done.stdout)) >= 0.72


_EPILOGUE = """
from bench.compiled.count import counts
rows = counts(["sigmoid_loss"], ["{gpu}"], "^bf16 D=768 train")
epilogue = next(row for row in rows if row.kernel == "logit_grad_kernel" and row.part == "epilogue 1")
print(epilogue.clocks["shared"] / epilogue.clocks["issue"])
"""


@pytest.mark.parametrize(
    "gpu", ["a100", *(pytest.param(gpu, marks=pytest.mark.thorough) for gpu in ("b200", "rtx5090"))]
)
def test_the_epilogue_adds_up_what_its_threads_have(run_python, gpu):
    """Shared memory is for storing G. Sums of what other threads have took it longer than all else together."""
    done = run_python(_EPILOGUE.format(gpu=gpu))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5


_EVERY_SIZE = """
import torch
from bench.compiled.ahead_of_time import GPUS, compiling_for
from siglip_kernels.sigmoid_loss.blocks import loss_and_gradients
from siglip_kernels.sigmoid_loss.api import make_engine
from siglip_kernels.sigmoid_loss.pairs import Pairs
compiled = []
def record(name, kernel):
    assert not isinstance(kernel, Exception), kernel
    compiled.append((name, kernel.hash))
scalar = torch.empty((), device="meta")
for pairs in (1000, 1, 2, 16, 17, 255, 4096, 5000):
    x = torch.empty(pairs, 64, dtype=torch.bfloat16, device="meta")
    with compiling_for(GPUS["{gpu}"], record):
        loss_and_gradients(make_engine("triton", x), x, x, scalar, scalar, Pairs(), pairs, True, True, True)
    print(pairs, len(set(compiled)))
"""


@pytest.mark.parametrize("gpu", [pytest.param("a100", marks=pytest.mark.thorough), "h200"])
def test_one_compilation_for_every_batch_size(run_python, gpu):
    done = run_python(_EVERY_SIZE.format(gpu=gpu))
    assert done.returncode == 0, done.stderr
    kernels = {int(pairs): int(count) for pairs, count in (line.split() for line in done.stdout.splitlines())}
    assert kernels[1000] == 3  # logits, and two products
    assert kernels[5000] == 3


def test_two_programs_share_a_multiprocessor_of_data_centre_blackwell():
    row = next(
        row
        for row in rows_in_a_subprocess("sigmoid_loss", "b200", only="^bf16 D=768 train")
        if row.kernel == "logit_grad_kernel"
    )
    assert row.registers <= 128  # of 65,536, with 256 threads
    assert 2 * (row.shared_bytes + 1024) <= 228 * 1024  # Triton's and the system's
