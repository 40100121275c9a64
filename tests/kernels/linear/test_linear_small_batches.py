"""GEMMs of few rows: a depth that is split between programs, and tiles that leave few multiprocessors idle."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from error_budget import check_budget, check_error, run
from torch import Tensor

from bench.compiled.launch import GPUS
from bench.compiled.small_batches import WIDTHS, chosen, gemms, usual
from siglip_kernels import linear, mlp, pre_norm_mlp, pre_norm_qkv, reference
from siglip_kernels.device import pretend
from siglip_kernels.gemm import config
from siglip_kernels.gemm.clocks import clocks
from siglip_kernels.gemm.plan import plan
from siglip_kernels.gemm.tiles import Tile

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = Tile(16, 32, 16, 4, 2, pieces=2)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes every GEMM split its depth: split(3) in three."""

    def choose(splits: int, **fields: object) -> None:
        tile = dataclasses.replace(TILE, splits=splits, **fields)
        monkeypatch.setattr(config, "tile", lambda shape, facts: dataclasses.replace(tile, descriptors=shape.aligned))
        plan.cache_clear()

    yield choose
    monkeypatch.undo()
    plan.cache_clear()


def tensors(device: str, dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random ones; a matrix of weights is scaled by its depth."""
    scales = {
        name: shape[1] ** -0.5 if name.endswith("_weight") and len(shape) == 2 else 1 for name, shape in shapes.items()
    }
    return {name: (torch.randn(shape) * scales[name]).to(device, dtype) for name, shape in shapes.items()}


def linear_tensors(rows: int, columns: int, depth: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    shapes = {"x": (rows, depth), "weight": (columns, depth), "bias": (columns,), "residual": (rows, columns)}
    return tensors(device, dtype, **shapes)


@pytest.mark.parametrize(
    ("shape", "splits", "dtype"),
    [
        (shape, splits, DTYPES[(i + j) % 3])
        for i, shape in enumerate([(1, 24, 64), (5, 40, 130), (17, 33, 65), (33, 257, 48), (16, 32, 4)])
        for j, splits in enumerate((2, 3, 8))
    ],
    ids=str,
)
def test_linear_within_the_error_budget(shape, splits, dtype, split, device):
    """Rows, columns and depths off by one from tiles, and more splits than blocks of depth."""
    split(splits)
    out_grad = torch.randn(shape[:2], device=device).to(dtype)
    check_budget(linear, reference.linear, linear_tensors(*shape, dtype, device), out_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 19])
def test_every_epilogue_within_the_error_budget(rows, dtype, split, device):
    """GELU and its derivative with the activation and the column sums, the residual, three weights side by side."""
    split(3)
    width, hidden = 40, 72
    norm = {"norm_weight": (width,), "norm_bias": (width,)}
    fc1 = {"fc1_weight": (hidden, width), "fc1_bias": (hidden,)}
    fc2 = {"fc2_weight": (width, hidden), "fc2_bias": (width,)}
    qkv = {f"{name}_{kind}": (width, width)[: 2 - (kind == "bias")] for name in "qkv" for kind in ("weight", "bias")}

    kernel, definition = (functools.partial(f, eps=1e-6) for f in (pre_norm_mlp, reference.pre_norm_mlp))
    inputs = tensors(device, dtype, x=(rows, width), **norm, **fc1, **fc2)
    check_budget(kernel, definition, inputs, torch.randn(rows, width).to(device, dtype))

    def side_by_side(function: Callable, **inputs: Tensor) -> Tensor:
        return torch.cat([part.flatten(2) for part in function(**inputs, eps=1e-6, num_heads=5)], 2)

    kernel, definition = (functools.partial(side_by_side, f) for f in (pre_norm_qkv, reference.pre_norm_qkv))
    inputs = tensors(device, dtype, x=(1, rows, width), **norm, **qkv)
    check_budget(kernel, definition, inputs, torch.randn(1, rows, 3 * width).to(device, dtype))


@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
def test_residual_of_another_dtype(residual_dtype, split, device):
    """As autocast leaves it: out is in the dtype to which both promote."""
    split(2)
    inputs = linear_tensors(9, 40, 72, torch.bfloat16, device)
    inputs["residual"] = inputs["residual"].to(residual_dtype)
    out, eager = (function(**inputs) for function in (linear, reference.linear))
    exact = reference.linear(**{name: tensor.double() for name, tensor in inputs.items()})
    assert out.dtype == eager.dtype
    check_error(out, eager, exact)


@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_views_equal_their_contiguous_copies(name, split, device):
    split(3)
    inputs = linear_tensors(9, 40, 72, torch.float16, device)
    expected = linear(**inputs)
    shape = inputs[name].shape
    wider = torch.zeros(shape[0], shape[1] + 16, dtype=torch.float16, device=device)
    for view in (inputs[name].T.contiguous().T, wider[:, 8:-8], wider[:, 3:-13]):
        assert not view.is_contiguous()
        view.copy_(inputs[name])
        assert torch.equal(linear(**dict(inputs, **{name: view})), expected)


@pytest.mark.parametrize("descriptors", [True, False])
def test_partial_sums_are_added_in_their_order(descriptors, device):
    """Bitwise the sum of the products of three ranges of the depth, from left to right."""
    from siglip_kernels.gemm.kernels import gemm

    tile = dataclasses.replace(TILE, descriptors=descriptors)
    x, weight = torch.randn(21, 112, device=device), torch.randn(40, 112, device=device)
    ranges = [slice(0, 48), slice(48, 96), slice(96, 112)]  # seven blocks of 16, three per program
    parts = [gemm(x[:, r].contiguous(), [weight[:, r].contiguous()], [None], tile=tile)[0] for r in ranges]
    found, again = (gemm(x, [weight], [None], tile=dataclasses.replace(tile, splits=3))[0] for _ in range(2))
    assert torch.equal(found, (parts[0] + parts[1]) + parts[2])
    assert torch.equal(found, again)


def test_gradients_are_bitwise_repeatable(split, device):
    split(3)
    inputs = tensors(device, torch.bfloat16, x=(19, 40), fc1_weight=(72, 40), fc1_bias=(72,), fc2_weight=(40, 72))
    function = functools.partial(mlp, fc2_bias=None)
    out_grad = torch.randn(19, 40).to(device)
    first, second = (run(function, inputs, out_grad, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_not_a_number_is_not_hidden(split, device):
    split(2)
    inputs = linear_tensors(5, 40, 72, torch.bfloat16, device)
    inputs["x"][3, 1] = float("nan")
    out = linear(**inputs)
    assert out[3].isnan().all() and out.isnan().sum() == 40


def test_compiles_as_one_graph(split, device):
    split(2)
    inputs = linear_tensors(5, 40, 72, torch.float16, device)
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), linear(**inputs))
    torch.library.opcheck(torch.ops.siglip_kernels.linear.default, tuple(inputs.values()))


BASE, SO400M = WIDTHS["base"], WIDTHS["so400m"]


@pytest.mark.parametrize(("gpu", "share"), [("a100", 0.75), ("h200", 0.7), ("b200", 0.6), ("rtx5090", 0.8)])
@pytest.mark.parametrize("gemm", ["out_proj", "fc2"])
def test_one_image_of_base_occupies_the_gpu(gemm, gpu, share):
    """Usual tiles gave these 12 programs on 170 multiprocessors, and 48 on an H200's 132."""
    shape = gemms(196, *BASE)[gemm]
    now = chosen(shape, GPUS[gpu])
    assert now.share >= share
    assert now.clocks <= 0.75 * usual(shape, GPUS[gpu]).clocks


def test_many_rows_have_the_usual_tiles():
    """Neither smaller ones nor a split depth, which would make the operands pass the L2 more often."""
    for gpu, widths in itertools.product(GPUS.values(), WIDTHS.values()):
        for shape in gemms(46_656, *widths).values():
            tiles = config.candidates(shape, gpu)
            assert tiles == config.usual_tiles(shape, gpu) and not set(tiles) & set(config.small_tiles(shape, gpu))
            assert all(tile.splits == 1 for tile in tiles)


@pytest.mark.parametrize("gpu", ["h200", "b200"])
def test_tiles_of_a_training_batch(gpu):
    """64 images of so400m: rows, columns, pieces and stages."""
    expected = {
        "qkv": (256, 128, 4, 4),
        "out_proj": (256, 128, 2, 3),
        "fc1": (128, 256, 2, 4),
        "fc2": (256, 128, 2, 3),
        "gelu backward": (128, 256, 4, 4),
    }
    for gemm, (rows, columns, pieces, stages) in expected.items():
        tile = chosen(gemms(46_656, *SO400M)[gemm], GPUS[gpu]).tile
        assert (tile.rows, tile.columns, tile.pieces, tile.stages) == (rows, columns, pieces, stages), gemm


def test_tiles_depend_on_the_matrix_unit():
    """Consumer Blackwell has TMA, and Ada's tiles: its capability is the largest, its multiprocessor is not."""
    for shape in gemms(46_656, *SO400M).values():
        consumer, ada, hopper = (config.candidates(shape, GPUS[gpu]) for gpu in ("rtx5090", "rtx4090", "h200"))
        assert all(tile.descriptors for tile in consumer) and not any(tile.descriptors for tile in ada)
        sizes = [{(tile.rows, tile.columns, tile.depth) for tile in tiles} for tiles in (consumer, ada, hopper)]
        assert sizes[0] == sizes[1] and (128, 256, 64) in sizes[2] - sizes[0]


def test_a_split_is_counted_with_its_second_launch():
    """It is worth it for fc2's depth, and not for out_proj's."""
    facts = GPUS["rtx5090"]
    deep, shallow = (gemms(64, *BASE)[gemm] for gemm in ("fc2", "out_proj"))
    assert config.tile(deep, facts).splits > 1 and config.tile(shallow, facts).splits == 1
    tile = config.tile(deep, facts)
    count_of_split, whole = (clocks(deep, facts, dataclasses.replace(tile, splits=n)) for n in (tile.splits, 1))
    assert count_of_split.addition > 4000 and whole.addition == 0
    assert count_of_split.total < whole.total and max(count_of_split[:4]) < max(whole[:4]) / 2


def test_a_gpus_own_choice_splits_the_depth(device):
    """As pretended: nothing is replaced."""
    if device == "cuda":
        pytest.skip("the tiles of another GPU need not fit this one")
    inputs = linear_tensors(33, 64, 3072, torch.bfloat16, device)
    plan.cache_clear()
    with pretend(GPUS["rtx5090"]):
        assert config.tile(gemms(33, 64, 3072)["fc2"], GPUS["rtx5090"]).splits > 1
        out = linear(**inputs)
    exact = reference.linear(**{name: tensor.double() for name, tensor in inputs.items()})
    check_error(out, reference.linear(**inputs), exact)
