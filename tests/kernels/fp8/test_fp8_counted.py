"""The count by which tiles of fp8 are chosen, beside compiled code, and what a layer gains by it."""

import json

import pytest

from bench.compiled import fp8_layer, pipeline
from bench.compiled.launch import GPUS
from bench.compiled.small_batches import gemms
from siglip_kernels.gemm import config
from siglip_kernels.gemm.clocks import LATENCY, epilogue

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


_PIPELINE = """
import json
from bench.compiled import pipeline
print(json.dumps({{str(in_fp8): pipeline.epilogues({names}, in_fp8) for in_fp8 in (False, True)}}))
"""


@pytest.fixture(scope="module")
def pipelined_epilogues(extent: str, run_python) -> dict[bool, dict[str, float]]:
    """In bf16 and in fp8: the clocks of a consumer's epilogue, by GEMM."""
    done = run_python(_PIPELINE.format(names=list(fp8_layer.shapes(True)) if extent == "every" else ["fc1"]))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {in_fp8: found[str(in_fp8)] for in_fp8 in (False, True)}


def test_the_pipeline_hides_its_epilogues(pipelined_epilogues):
    """All but the last, to a hundredth of the GEMM; so it takes fewer clocks than the portable kernel, also in fp8."""
    for in_fp8, epilogues in pipelined_epilogues.items():
        portable = fp8_layer.products(pipeline.GPU, in_fp8)
        for name, epilogue_clocks in epilogues.items():
            shape = fp8_layer.shapes(in_fp8)[name]
            found = pipeline.pipelined(shape, epilogue_clocks)
            assert found.outside <= 0.01 * found.total and found.l2 == max(found[:4]), name
            assert found.total < portable[name], name


def test_an_epilogue_is_exposed_beyond_what_the_ring_holds():
    """By hand, fc1 in fp8: four blocks of 512 clocks per consumer; 365 · 17 tiles on 132 multiprocessors."""
    shape = fp8_layer.shapes(True)["fc1"]
    assert pipeline.tile_of(shape).stages == 4
    hidden, exposed = (pipeline.pipelined(shape, epilogue_clocks) for epilogue_clocks in (2048, 2148))
    assert hidden.outside == 2048 + LATENCY
    assert exposed.outside == 2148 + LATENCY + 48 * 2 * 100
    assert hidden[:4] == exposed[:4]
