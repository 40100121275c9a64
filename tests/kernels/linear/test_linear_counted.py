"""The count by which tiles are chosen, beside the same counted from compiled code; the tiles that it chooses."""

import dataclasses
import json

import pytest

from bench.compiled.launch import GPUS
from bench.compiled.small_batches import WIDTHS, chosen, gemms
from siglip_kernels.gemm import config
from siglip_kernels.gemm.clocks import LATENCY, clocks, epilogue
from siglip_kernels.gemm.tiles import Shape, Tile

SO400M = WIDTHS["so400m"]
ROWS = 46_656  # 64 images of 729 tokens

# GPU -> GEMM -> usual tiles that are compiled, by their place; None: all of them.
COMPILED: dict[str, dict[str, dict[str, list[int] | None]]] = {
    "published": {"a100": {"out_proj": [0, 2]}, "h200": {"fc1": [0], "out_proj": [3]}},
    "every": {
        gpu: dict.fromkeys(("qkv", "out_proj", "fc1", "gelu backward"))
        for gpu in ("a100", "rtx4090", "h200", "rtx5090")
    },
}

_COUNT = """
import json
from bench.compiled.gemm_tiles import counted
from bench.compiled.launch import GPUS
from bench.compiled.small_batches import gemms
from siglip_kernels.gemm.config import usual_tiles
found = []
for gpu, wanted in {compiled}.items():
    for gemm, places in wanted.items():
        shape = gemms({rows}, *{widths})[gemm]
        for place, tile in enumerate(usual_tiles(shape, GPUS[gpu])):
            if places is None or place in places:
                loop, rest = counted(gpu, shape, tile)
                found.append((gpu, gemm, place, loop.clocks, loop.multiply_adds, rest.clocks))
print(json.dumps(found))
"""


@dataclasses.dataclass(frozen=True)
class Counted:
    """What the model and the compiled code come to for a tile, in clocks of a multiprocessor."""

    gpu: str
    shape: Shape
    tile: Tile
    loop: dict[str, float]  # by pipe, per block of depth
    multiply_adds: float  # per block of depth
    epilogue: float

    @property
    def copied(self) -> float:
        """The clocks of shared memory for what TMA writes, which is not in the code of the loop."""
        tile, written = self.tile, self.tile.depth * self.shape.element_bytes / 128
        return (tile.rows + tile.columns) * written if tile.descriptors else 0

    @property
    def shared_by_the_model(self) -> float:
        """Per block of depth."""
        tile = self.tile
        one = dataclasses.replace(self.shape, rows=tile.rows, columns=tile.columns, depth=tile.depth, parts=1)
        return clocks(one, GPUS[self.gpu], tile).shared


@pytest.fixture(scope="module")
def counts(extent: str, run_python) -> list[Counted]:
    done = run_python(_COUNT.format(compiled=COMPILED[extent], rows=ROWS, widths=SO400M))
    assert done.returncode == 0, done.stderr
    found = []
    for gpu, gemm, place, loop, multiply_adds, rest in json.loads(done.stdout):
        shape = gemms(ROWS, *SO400M)[gemm]
        tile = config.usual_tiles(shape, GPUS[gpu])[place]
        per_quarter = tile.warps / 4
        loop = {pipe: per_quarter * count for pipe, count in loop.items()}
        rest = per_quarter * max(rest.values())
        found.append(Counted(gpu, shape, tile, loop, tile.warps * multiply_adds, rest))
    return found


def test_a_block_has_its_products(counts):
    assert counts
    for one in counts:
        assert one.multiply_adds == one.tile.rows * one.tile.columns * one.tile.depth, one


def test_shared_memory_moves_what_the_model_says(counts):
    """Within a tenth: on Ampere and Ada the loop also reads a word per barrier."""
    for one in counts:
        assert one.shared_by_the_model == pytest.approx(one.loop["shared"] + one.copied, rel=0.1), one


def test_only_products_and_shared_memory_bound_the_loop(counts):
    """The model has no other pipes."""
    for one in counts:
        modelled = max(one.loop["tensor"], one.loop["shared"] + one.copied)
        assert max(one.loop.values()) <= modelled, one


def test_epilogues_cost_what_the_model_says(counts):
    """Within 4 % of a tile of depth 768, the least of the published models."""
    for one in counts:
        loop = 768 / one.tile.depth * max(one.loop["tensor"], one.loop["shared"] + one.copied)
        assert abs(epilogue(one.shape, one.tile) - one.epilogue) <= 0.04 * (loop + one.epilogue), one


def test_a_large_batch_on_an_a100_is_bound_by_products():
    """Tiles of 64 rows are bound by shared memory there: 85 % and less of the tensor cores' peak."""
    facts = GPUS["a100"]
    for width, hidden in (*WIDTHS.values(), (1024, 4096)):
        for gemm, shape in gemms(ROWS, width, hidden).items():
            tile = config.tile(shape, facts)
            count = clocks(shape, facts, tile)
            assert (tile.rows, tile.columns) == (128, 128) and count.products == max(count[:4]), gemm
    shape = dataclasses.replace(gemms(ROWS, *SO400M)["fc2"], residual_bytes=4)
    alone = config.tile(shape, facts)  # the addresses of an fp32 residual leave no registers for four warps
    assert (alone.rows, alone.columns, alone.warps) == (128, 128, 8)
    narrow = dataclasses.replace(alone, rows=64, warps=4, residents=2)
    count = clocks(shape, facts, narrow)
    assert count.products / count.shared == pytest.approx(8 / 9)  # 256 clocks of products, 288 of shared memory


@pytest.mark.parametrize("gpu", ["rtx3090", "rtx4090", "rtx5090"])
def test_a_large_batch_on_geforce_has_tiles_that_spare_the_l2(gpu):
    """Products are the bound of every tile; of 64 x 64 ones the L2 would be as busy."""
    for width, hidden in (*WIDTHS.values(), (1024, 4096)):
        for gemm, shape in gemms(ROWS, width, hidden).items():
            count = clocks(shape, GPUS[gpu], chosen(shape, GPUS[gpu]).tile)
            assert count.products == max(count[:4]) and count.l2 <= 0.9 * count.products, gemm


def test_the_last_wave_is_counted_in_whole_tiles():
    """By hand, for an A100: 108 multiprocessors, 128 x 128 tiles of depth 1152 in 128 * 128 * 1152 / 1024 clocks."""
    facts, tile = GPUS["a100"], Tile(128, 128, 32, 4, 4, pieces=4, residents=2, descriptors=False)

    def products(row_tiles: int) -> float:
        return clocks(Shape(128 * row_tiles, 128, 1152, 1, 2, 0, "", False, True), facts, tile).products

    assert products(1) == products(108) == 18_432
    assert products(109) == products(216) == 2 * 18_432
    assert products(217) == 3 * 18_432


def test_epilogues_are_hidden_by_another_programs_products_but_for_the_last():
    """By hand: three tiles per multiprocessor. A flattened loop waits for its first loads once."""
    facts, shape = GPUS["h200"], Shape(128 * 132 * 3, 128, 1152, 1, 2, 0, "", False, True)
    alone = Tile(128, 128, 64, 8, 4, pieces=2, residents=1)
    assert clocks(shape, facts, alone).outside == 3 * epilogue(shape, alone) + LATENCY
    pair = dataclasses.replace(alone, warps=4, residents=2)
    assert clocks(shape, facts, pair).outside == epilogue(shape, pair) + LATENCY
    pointers = dataclasses.replace(alone, descriptors=False)
    assert clocks(shape, facts, pointers).outside == 3 * (epilogue(shape, pointers) + LATENCY)


def test_a_split_depth_is_counted_with_its_partial_sums():
    """By hand, fc2 of one image of base on an H200: 12 tiles of 128 x 128, each in eight ranges of 384."""
    facts, shape = GPUS["h200"], gemms(196, *WIDTHS["base"])["fc2"]
    tile = dataclasses.replace(chosen(shape, facts).tile, splits=8)
    assert (tile.rows, tile.columns) == (128, 128)
    count = clocks(shape, facts, tile)
    assert count.products == 128 * 128 * 384 / 2048
    port = 5120 / 96  # bytes per clock of each of the 96 programs
    assert count.l2 == pytest.approx((2 * 128 * 384 * 2 + 4 * 128 * 128) / port)  # operands, and sums in fp32
    blocks = 25 * 6  # of 8 x 128 of the result, more than there are multiprocessors
    assert blocks > facts.multiprocessors
    read = 4 * 196 * 768 * 8 / 5120
    assert count.addition == pytest.approx(4000 + LATENCY + read)
