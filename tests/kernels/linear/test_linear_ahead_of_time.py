"""The kernel of the projections and the MLP, compiled for GPUs that are not there: spills, tensor cores, widths."""

import json

import pytest

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess

MATRIX_INSTRUCTION = {
    "a100": "mma",
    "rtx3090": "mma",
    "rtx4090": "mma",
    "h200": "wgmma",
    "b200": "tcgen05",
    "rtx5090": "mma",  # consumer Blackwell has neither of the others
}
CONSUMER = ("rtx3090", "rtx4090", "rtx5090")
DATA_CENTER = ("a100", "h200", "b200")
EPILOGUES = "^bf16 so400m 46656 (qkv|bias, residual|gelu, kept|gelu backward)$"  # one launch of each
LARGE_AND_SMALL = "^bf16 (so400m 46656 gelu backward|base 196 fc2, residual)$"


@pytest.fixture(scope="module")
def rows(extent: str) -> list[Row]:
    if extent == "every":
        return rows_in_a_subprocess("linear", *MATRIX_INSTRUCTION)
    return [
        *rows_in_a_subprocess("linear", *DATA_CENTER, only=f"{EPILOGUES}|{LARGE_AND_SMALL}"),
        *rows_in_a_subprocess("linear", *CONSUMER, only=LARGE_AND_SMALL),
    ]


def launches_that_split(rows: list[Row]) -> set[tuple[str, str]]:
    """(GPU, launch) of those with a second kernel."""
    return {(row.gpu, row.launch) for row in rows if row.kernel == "add_partial_sums_kernel"}


def test_nothing_spills_or_fails(rows):
    assert {row.gpu for row in rows} == set(MATRIX_INSTRUCTION)
    assert not [str(row) for row in rows if row.problems()]


def test_a_split_depth_has_a_second_kernel(rows):
    """Small batches alone. A second kernel has no products."""
    split = launches_that_split(rows)
    assert ("a100", "bf16 base 196 fc2, residual") in split and ("rtx5090", "bf16 base 196 fc2, residual") in split
    assert not [launch for _, launch in split if " 46656 " in launch]
    for row in rows:
        assert row.kernel in ("gemm_kernel", "add_partial_sums_kernel")
        assert row.kernel == "gemm_kernel" or (not row.matrix and row.registers <= 64), str(row)


@pytest.mark.parametrize(("gpu", "instruction"), MATRIX_INSTRUCTION.items())
def test_products_use_tensor_cores(rows, gpu, instruction):
    """All but those of IEEE fp32, which no tensor core makes; TF32 on Blackwell may come through the older ones."""
    products = [
        row for row in rows if row.gpu == gpu and row.kernel == "gemm_kernel" and not row.launch.startswith("fp32")
    ]
    assert products
    for row in products:
        allowed = (instruction, "mma") if row.launch.startswith("tf32") and gpu == "b200" else (instruction,)
        assert any(name.startswith(allowed) for name in row.matrix), str(row)


def test_tiles_come_and_go_by_the_copy_engine_or_sixteen_bytes_at_a_time(rows):
    """What is narrower is a vector: a bias, or the sums of columns. Odd widths do not align: nothing helps them.
    Partial sums are written sixteen bytes at a time, and read so by the second kernel.
    """
    split = launches_that_split(rows)
    for row in rows:
        if " odd " in row.launch:
            continue
        if row.kernel == "add_partial_sums_kernel":
            assert {"ld 16", "st 16"} <= set(row.accesses) and not {"st 8", "st 2"} & set(row.accesses), str(row)
        elif row.gpu in ("a100", "rtx3090", "rtx4090"):
            assert "cp.async 16" in row.accesses and "st 16" in row.accesses, str(row)
            assert not {"cp.async 4", "cp.async 8", "st 8", "st 2"} & set(row.accesses), str(row)
            has_matrix_to_read = any(word in row.launch for word in ("residual", "backward"))
            read_here = has_matrix_to_read and (row.gpu, row.launch) not in split
            assert "ld 16" in row.accesses or not read_here, str(row)
        else:
            assert "tma" in row.accesses, str(row)
            assert not any(kind.startswith("cp.async") for kind in row.accesses), str(row)
            assert "st 2" not in row.accesses, str(row)
            if (row.gpu, row.launch) not in split:
                stores = sum(row.accesses.get(kind, 0) for kind in ("st 8", "st 16"))
                copies = 2 if row.gpu == "b200" else 1  # of the epilogue in the code
                sums = 4 * copies if "gelu backward" in row.launch else 0  # of columns, once per piece
                assert stores <= sums, str(row)
            else:
                assert "st 8" not in row.accesses, str(row)


_EVERY_SIZE = """
import torch
from bench.compiled.ahead_of_time import GPUS, compiling_for
from siglip_kernels.gemm.kernels import gemm
compiled = set()
def record(name, kernel):
    assert not isinstance(kernel, Exception), kernel
    compiled.add(kernel.hash)
weight, bias = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((1152, 1152), (1152,)))
for rows in ({rows}):
    x = torch.empty(rows, 1152, dtype=torch.bfloat16, device="meta")
    with compiling_for(GPUS["{gpu}"], record):
        gemm(x, [weight], [bias], residual=x)
print(len(compiled))
"""


@pytest.mark.parametrize("gpu", [pytest.param("a100", marks=pytest.mark.thorough), "h200"])
def test_few_compilations_for_every_batch_size(run_python, gpu):
    """One for each tile that some size is best served by, and none for a size's being 1 or a multiple of 16."""
    done = run_python(_EVERY_SIZE.format(gpu=gpu, rows="93_312, 93_313, 186_631"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 1
    done = run_python(_EVERY_SIZE.format(gpu=gpu, rows="1, 2, 16, 17"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 1


_EVERY_TILE = """
import dataclasses
import torch
from bench.compiled.ahead_of_time import GPUS, compile_launches
from bench.compiled.launch import Launch
from bench.compiled.small_batches import WIDTHS, gemms
from siglip_kernels.gemm.config import candidates
from siglip_kernels.gemm.kernels import gemm
width, hidden = WIDTHS["base"]
def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
calls = {{
    "fc2": lambda tile: gemm(empty(64, hidden), [empty(width, hidden)], [None], residual=empty(64, width), tile=tile),
    "gelu backward": lambda tile: gemm(
        empty(64, width), [empty(width, hidden).T], [None], gelu="backward", pre_activation=empty(64, hidden),
        keep_activation=True, keep_column_sums=True, tile=tile,
    ),
}}
for name, call in calls.items():
    tiles = candidates(gemms(64, width, hidden)[name], GPUS["{gpu}"])
    for tile in {{dataclasses.replace(tile, splits=min(tile.splits, 2)) for tile in tiles}}:
        for row in compile_launches(iter([Launch(f"{{name}} {{tile}}", lambda: call(tile))]), "{gpu}"):
            assert not row.error and row.stack_bytes <= 16, row
            assert row.shared_bytes * tile.residents <= row.shared_limit, row
            assert row.matrix or row.kernel == "add_partial_sums_kernel", row
"""


@pytest.mark.thorough
@pytest.mark.parametrize("gpu", MATRIX_INSTRUCTION)
def test_every_candidate_of_a_small_batch_fits(run_python, gpu):
    done = run_python(_EVERY_TILE.format(gpu=gpu))
    assert done.returncode == 0, done.stderr


_COSTS = """
import dataclasses
import json
from bench.compiled.launches.linear import launches
from bench.compiled.tile_cost import costs_of
chosen = [launch for launch in launches() if launch.name.startswith("bf16 so400m 46656 gelu")]
print(json.dumps({cost.launch.removeprefix("bf16 so400m 46656 "): cost.clocks for cost in costs_of(chosen)}))
"""


@pytest.fixture(scope="module")
def gelu_costs(run_python) -> dict[str, dict[str, float]]:
    """Clocks of one warp by pipe, outside the main loop, of every GEMM with a GELU on an H200."""
    done = run_python(_COSTS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_gelu_is_computed_once_where_it_is_also_stored(gelu_costs):
    """Left to itself the compiler does so twice, in the layout of the load and in that of the product."""
    stored, not_stored = gelu_costs["gelu backward"], gelu_costs["gelu backward, frozen weight"]
    assert round(stored["mufu"]) == round(not_stored["mufu"])


@pytest.mark.parametrize(("epilogue", "share"), [("gelu", 0.84), ("gelu, kept", 0.83), ("gelu backward", 0.76)])
def test_gelu_leaves_the_tensor_cores_their_time(gelu_costs, epilogue, share):
    """Bounds of 128 x 256 tiles of depth 1152: two warps per quarter of a multiprocessor, 512 multiply-adds a clock."""
    products = 128 * 256 * 1152 / 4 / 512
    assert products / (products + 2 * max(gelu_costs[epilogue].values())) >= share
