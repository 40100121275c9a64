"""The count by which tiles of fp8 are chosen, beside compiled code, and what a layer gains by it."""

import json

import pytest

from bench.compiled import fp8_layer
from bench.compiled.launch import GPUS
from bench.compiled.small_batches import gemms
from siglip_kernels.gemm import config
from siglip_kernels.gemm.clocks import epilogue

_COUNT = """
import json
from bench.compiled.fp8_layer import HIDDEN, ROWS, WIDTH
from bench.compiled.gemm_tiles import counted
from bench.compiled.launch import GPUS
from bench.compiled.small_batches import gemms
from siglip_kernels.gemm.config import tile
found = {{}}
for name in {names}:
    shape = gemms(ROWS, WIDTH, HIDDEN, 1)[name]
    loop, rest = counted("h200", shape, tile(shape, GPUS["h200"]))
    found[name] = loop.clocks, rest.clocks
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counted(extent: str, run_python) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """By GEMM: the clocks of a warp in its loop, per block of depth, and in its epilogue, by pipe."""
    names = ("qkv", "out_proj", "fc1", "fc2") if extent == "every" else ("fc1",)
    done = run_python(_COUNT.format(names=names))
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[dict[str, float], dict[str, float]]] = json.loads(done.stdout)
    return found


def test_products_bound_the_loop_and_the_model_has_its_epilogue(counted):
    """The epilogue within 4 % of a tile of depth 768, the least of the published models."""
    for name, (loop, rest) in counted.items():
        shape = gemms(fp8_layer.ROWS, fp8_layer.WIDTH, fp8_layer.HIDDEN, 1)[name]
        tile = config.tile(shape, GPUS["h200"])
        per_quarter = tile.warps / 4
        assert loop["tensor"] == max(loop.values()) == tile.rows * tile.columns * tile.depth / tile.warps / 1024
        whole = per_quarter * 768 / tile.depth * loop["tensor"]
        cost = per_quarter * max(rest.values())
        assert abs(epilogue(shape, tile) - cost) <= 0.04 * (whole + cost), name


@pytest.mark.parametrize("gpu", fp8_layer.BYTES_PER_CLOCK)
def test_products_take_little_more_than_half_of_the_clocks(gpu):
    with_fp8, without = (sum(fp8_layer.products(gpu, in_fp8).values()) for in_fp8 in (True, False))
    assert 1.7 < without / with_fp8 <= 2
