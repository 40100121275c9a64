"""linear and pre_norm_qkv: error budget, shapes off by one from tiles, strides, adversarial values, repeatability."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from error_budget import check_budget, check_error, run
from torch import Tensor

from bench.compiled.ahead_of_time import GPUS
from siglip_kernels import linear, pre_norm_qkv, reference
from siglip_kernels.device import precision, pretend

pytestmark = pytest.mark.usefixtures("poisoned_empty", "seed")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def linear_inputs(
    rows: int | tuple[int, ...], columns: int, depth: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], Tensor]:
    """x, weight, bias and residual, and the gradient of the result."""
    leading = (rows,) if isinstance(rows, int) else rows
    inputs = {
        "x": torch.randn(*leading, depth),
        "weight": torch.randn(columns, depth) / math.sqrt(max(depth, 1)),
        "bias": torch.randn(columns),
        "residual": torch.randn(*leading, columns),
    }
    inputs = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    return inputs, torch.randn(*leading, columns).to(device, dtype)


def qkv_inputs(
    batch: int, tokens: int, width: int, out: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of pre_norm_qkv, and the gradient of its three results side by side."""
    inputs = {
        "x": torch.randn(batch, tokens, width) + 0.5,
        "norm_weight": torch.rand(width) + 0.5,
        "norm_bias": torch.randn(width),
    }
    for name in "qkv":
        inputs[f"{name}_weight"] = torch.randn(out, width) / math.sqrt(width)
        inputs[f"{name}_bias"] = torch.randn(out)
    inputs = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    return inputs, torch.randn(batch, tokens, 3 * out).to(device, dtype)


def side_by_side(function, num_heads: int, **tensors: Tensor) -> Tensor:
    """(B, S, 3 H D): the results of pre_norm_qkv as one, so that its gradient is also one."""
    parts = function(**tensors, eps=1e-6, num_heads=num_heads)
    return torch.cat([part.flatten(2) for part in parts], 2)


def check_qkv(inputs: dict[str, Tensor], out_grad: Tensor, num_heads: int) -> dict[str, Tensor]:
    kernel, definition = (
        functools.partial(side_by_side, function, num_heads) for function in (pre_norm_qkv, reference.pre_norm_qkv)
    )
    return check_budget(kernel, definition, inputs, out_grad)


SHAPES = [
    (1, 1, 1),
    (1, 24, 17),
    (3, 1, 40),
    (40, 3, 1),
    (127, 64, 64),
    (128, 64, 64),
    (129, 64, 64),
    (65, 255, 40),
    (65, 256, 40),
    (65, 257, 40),
    (33, 80, 255),
    (33, 80, 256),
    (33, 80, 257),
    (129, 257, 257),
    (130, 264, 520),
]


@pytest.mark.parametrize(
    ("shape", "dtype"), [(shape, DTYPES[(i + j) % 3]) for i, shape in enumerate(SHAPES) for j in range(2)], ids=str
)
def test_shapes_off_by_one_from_each_tile(shape, dtype, device):
    check_budget(linear, reference.linear, *linear_inputs(*shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 1152, 4304), (2, 4304, 1152), (1, 768, 3072)], ids=str)
def test_widths_of_models(shape, dtype, device):
    check_budget(linear, reference.linear, *linear_inputs(*shape, dtype, device))


@pytest.mark.parametrize("gpu", ["a100", "h200", "b200", "rtx5090"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_gpus(gpu, dtype, device):
    if device == "cuda":
        pytest.skip("the tiles of another GPU need not fit this one")
    for shape in ((260, 264, 136), (70, 72, 200)) if dtype != torch.float32 else ((70, 72, 200),):
        inputs, out_grad = linear_inputs(*shape, dtype, device)
        with pretend(GPUS[gpu]):
            check_budget(linear, reference.linear, inputs, out_grad)


def test_every_shape_has_a_tile_on_every_gpu():
    """Down to a GPU with a copy engine and as little shared memory as consumers get."""
    from siglip_kernels.gemm.config import Shape, candidates, programs, tile

    small = dataclasses.replace(GPUS["b200"], name="small", capability=(12, 0), shared_memory=101_376)
    for gpu in (*GPUS.values(), small):
        for rows, bytes_, residual, gelu, aligned in itertools.product(
            (1, 729, 46_656), (2, 4), (0, 2, 4), ("", "forward", "backward"), (True, False)
        ):
            for tf32 in {False, bytes_ == 4}:
                shape = Shape(rows, 1152, 4304, 1, bytes_, residual, gelu, tf32, aligned)
                chosen = tile(shape, gpu)
                assert chosen in candidates(shape, gpu) and chosen.pieces in (1, 2, 4)
                in_flight = chosen.stages * (chosen.rows + chosen.columns) * chosen.depth * bytes_
                assert chosen.residents * in_flight <= gpu.shared_memory
                assert 1 <= programs(chosen, 10_000, gpu) <= 3 * gpu.multiprocessors
    assert tile(Shape(46_656, 1152, 4304, 1, 2, 2, "", False, True), GPUS["h200"]).columns == 128  # 9 x 128, 4.5 x 256
    assert tile(Shape(46_656, 4304, 1152, 1, 2, 0, "forward", False, True), GPUS["h200"]).rows >= 128


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_leading_shapes_with_and_without(leading, residual, device):
    inputs, out_grad = linear_inputs(leading, 24, 40, torch.bfloat16, device)
    if not residual:
        del inputs["residual"]
    check_budget(linear, reference.linear, inputs, out_grad)
    del inputs["bias"]
    check_budget(linear, reference.linear, inputs, out_grad)


@pytest.mark.parametrize("shape", [(0, 24, 40), (5, 0, 40), (5, 24, 0), ((2, 0), 24, 40)], ids=str)
def test_nothing_to_do(shape, device):
    inputs, out_grad = linear_inputs(*shape, torch.float16, device)
    found, expected = (run(function, inputs, out_grad, torch.float16) for function in (linear, reference.linear))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def strided(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """A view of that shape in some other layout."""

    def make(*extents: int) -> Tensor:
        return torch.randn(extents).to(device, dtype)

    *leading, rows, columns = shape
    if kind == "transposed":
        return make(*leading, columns, rows).transpose(-1, -2)
    if kind == "slice":
        return make(*leading, rows, columns + 16)[..., 8:-8]
    if kind == "unaligned slice":
        return make(*leading, rows, columns + 3)[..., 1:-2]
    if kind == "every other row":
        return make(*leading, 2 * rows, columns)[..., ::2, :]
    if kind == "every other column":
        return make(*leading, rows, 2 * columns)[..., ::2]
    if kind == "expanded rows":
        return make(*leading, 1, columns).expand(shape)
    if kind == "expanded columns":
        return make(*leading, rows, 1).expand(shape)
    raise ValueError(kind)


KINDS = ("transposed", "slice", "unaligned slice", "every other row", "every other column")
KINDS += ("expanded rows", "expanded columns")


@pytest.mark.parametrize("kind", KINDS)
def test_views_equal_their_contiguous_copies(kind, device):
    inputs, out_grad = linear_inputs((2, 9), 40, 24, torch.float16, device)
    for name in ("x", "weight", "residual", "out_grad"):
        views = dict(inputs, out_grad=out_grad)
        views[name] = strided(kind, views[name].shape, torch.float16, device)
        copies = {name: tensor.contiguous() for name, tensor in views.items()}
        found, expected = (
            run(linear, {n: t for n, t in tensors.items() if n != "out_grad"}, tensors["out_grad"], torch.float16)
            for tensors in (views, copies)
        )
        for result, tensor in expected.items():
            # Gradients are cuBLAS's, or on a CPU another library's, whose order of sums depends on the layout.
            assert result != "out" or torch.equal(found[result], tensor), name
            torch.testing.assert_close(found[result], tensor, msg=f"{result} for {name}")


@pytest.mark.parametrize(("rows", "stride"), [(300, 2**23 - 8), (2, 2**23)])
def test_rows_far_apart(rows, stride, device):
    """Offsets from row to row pass 2^31 elements; in the second case even those within a tile would."""
    bytes_spanned = 2 * (stride * (rows - 1) + 16)
    # Not filled with NaN: the pages between the rows are never touched and take no memory.
    storage = torch.UntypedStorage(bytes_spanned, device=device)
    x = torch.empty(0, dtype=torch.float16, device=device).set_(storage).as_strided((rows, 16), (stride, 1))
    x.copy_(torch.randn(rows, 16))
    inputs, _ = linear_inputs(rows, 24, 16, torch.float16, device)
    out, expected = (linear(**dict(inputs, x=each)) for each in (x, x.contiguous()))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("descriptors", [True, False])
def test_every_tile_is_computed_once_in_whatever_order(descriptors, device):
    """More row tiles than one group has, a last group that is smaller, and programs with several tiles each."""
    from siglip_kernels.gemm.config import GROUP, Tile
    from siglip_kernels.gemm.kernels import gemm

    tile = Tile(16, 32, 16, 4, 2, pieces=2, residents=3, descriptors=descriptors)
    rows = 16 * (GROUP + 3) - 5
    x, weight, residual, bias = (torch.randn(s).to(device).half() for s in ((rows, 24), (72, 24), (rows, 72), (72,)))
    out = gemm(x, [weight], [bias], residual=residual, tile=tile)[0]
    exact = reference.linear(x.double(), weight.double(), bias.double(), residual.double())
    assert (out - exact).norm() <= torch.finfo(torch.float16).eps / 2 * exact.norm()
    out = gemm(x, [weight, 2 * weight, -weight], [bias, bias, None], tile=tile)[0]
    exact = torch.cat([exact - residual, 2 * (exact - residual) - bias, bias - (exact - residual)], 1)
    assert (out - exact).norm() <= torch.finfo(torch.float16).eps / 2 * exact.norm()


def test_a_case_is_planned_once(device):
    """The same sizes and strides find their plan again; what lies elsewhere gets another, and the same result."""
    from siglip_kernels.gemm.plan import plan

    inputs, _ = linear_inputs(20, 40, 24, torch.float16, device)
    plan.cache_clear()
    expected = linear(**inputs)
    assert torch.equal(linear(**{name: tensor.clone() for name, tensor in inputs.items()}), expected)
    assert plan.cache_info()[:2] == (1, 1)  # hits, misses
    shape = inputs["x"].shape
    shifted = inputs["x"].new_empty(inputs["x"].numel() + 1)[1:].view(shape).copy_(inputs["x"])
    assert torch.equal(linear(**dict(inputs, x=shifted)), expected)
    apart = inputs["x"].new_empty(shape[0], shape[1] + 16)[:, : shape[1]].copy_(inputs["x"])
    assert torch.equal(linear(**dict(inputs, x=apart)), expected)
    assert plan.cache_info()[:2] == (1, 3)


def test_transposed_weights_are_not_copied(device, monkeypatch):
    inputs, _ = linear_inputs(5, 40, 24, torch.float16, device)
    inputs["weight"] = strided("transposed", (40, 24), torch.float16, device)

    def refuse(self, *arguments, **options):
        raise AssertionError("a copy was made")

    for name in ("clone", "copy_"):
        monkeypatch.setattr(Tensor, name, refuse)
    linear(**inputs)
    linear(**dict(inputs, x=inputs["x"].T.contiguous().T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_whose_answer_is_exact(dtype, device):
    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, device=device).to(dtype)

    x, weight, bias, residual = integers(65, 40), integers(72, 40), integers(72), integers(65, 72)
    exact = reference.linear(*(tensor.double() for tensor in (x, weight, bias, residual)))
    assert torch.equal(linear(x, weight, bias, residual).double(), exact.to(dtype).double())
    ones = torch.ones(65, 40, device=device, dtype=dtype)
    assert (linear(ones, ones, None, torch.zeros(65, 65, device=device, dtype=dtype)) == 40).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_huge_outlier(dtype, device):
    for name in ("x", "weight", "residual"):
        inputs, out_grad = linear_inputs(20, 40, 24, dtype, device)
        inputs[name][3, 5] = 3e4 if name == "residual" else 1e3
        check_budget(linear, reference.linear, inputs, out_grad)


def test_a_large_residual_does_not_cost_the_product_its_bits(device):
    inputs, out_grad = linear_inputs(20, 40, 600, torch.float32, device)
    inputs["residual"] *= 1e4
    check_budget(linear, reference.linear, inputs, out_grad)


def test_not_a_number_is_not_hidden(device):
    inputs, _ = linear_inputs(5, 40, 24, torch.bfloat16, device)
    inputs["x"][3, 1] = float("nan")
    out = linear(**inputs)
    assert out[3].isnan().all() and out.isnan().sum() == 40


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
def test_residual_of_another_dtype(dtype, residual_dtype, device):
    inputs, out_grad = linear_inputs(9, 40, 24, dtype, device)
    inputs["residual"] = inputs["residual"].to(residual_dtype)

    def results(function, wide: bool) -> list[Tensor]:
        tensors = [(t.double() if wide else t).detach().requires_grad_() for t in inputs.values()]
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, out_grad.to(out.dtype))]

    found, eager, truth = results(linear, False), results(reference.linear, False), results(reference.linear, True)
    for one, other, exact in zip(found, eager, truth, strict=True):
        assert one.dtype == other.dtype
        check_error(one, other, exact)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_only_the_gradients_asked_for(wanted, device):
    inputs, out_grad = linear_inputs(9, 40, 24, torch.bfloat16, device)
    everything = run(linear, inputs, out_grad, torch.bfloat16)
    inputs[wanted].requires_grad_()
    (gradient,) = torch.autograd.grad(linear(**inputs), inputs[wanted], out_grad)
    assert torch.equal(gradient, everything[wanted])


@pytest.mark.parametrize(
    ("switch", "on", "off"), [("allow_tf32", True, False), ("fp32_precision", "tf32", "ieee")], ids=str
)
def test_fp32_products_round_as_they_are_told(switch, on, off, device):
    """By PyTorch's older switch and by its newer: TF32, which the interpreter computes in full, or IEEE."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    inputs, out_grad = linear_inputs(9, 40, 24, torch.float32, device)
    try:
        setattr(settings, switch, off)
        assert precision(torch.float32) == "ieee"
        setattr(settings, switch, on)
        assert precision(torch.float32) == "tf32"
        assert precision(torch.bfloat16) == "ieee"
        found = run(linear, inputs, out_grad, torch.float32)
    finally:
        settings.fp32_precision = before
    exact = run(reference.linear, inputs, out_grad, torch.float64)
    for name, tensor in exact.items():
        assert (found[name].double() - tensor).norm() <= 2e-3 * tensor.norm(), name


@pytest.mark.parametrize(
    ("shape", "heads", "dtype"),
    [
        ((2, 7, 24, 40), 5, torch.float32),
        ((2, 7, 24, 40), 5, torch.float16),
        ((1, 1, 16, 8), 1, torch.bfloat16),
        ((3, 43, 72, 72), 2, torch.bfloat16),
        ((1, 129, 40, 257), 1, torch.float16),
        ((1, 5, 1152, 1152), 16, torch.bfloat16),
        ((1, 5, 768, 768), 12, torch.float32),
        ((1, 30, 33, 35), 7, torch.bfloat16),
    ],
    ids=str,
)
def test_qkv(shape, heads, dtype, device):
    check_qkv(*qkv_inputs(*shape, dtype, device), heads)


@pytest.mark.parametrize("gpu", ["a100", "h200"])
def test_three_weights_with_tiles_of_gpus(gpu, device):
    from siglip_kernels.gemm.kernels import gemm

    if device == "cuda":
        pytest.skip("the tiles of another GPU need not fit this one")
    x, *weights = (torch.randn(rows, 136).bfloat16() for rows in (70, 144, 144, 144))
    biases = [torch.randn(144).bfloat16() for _ in range(3)]
    with pretend(GPUS[gpu]):
        out = gemm(x, weights, biases)[0]
    exact = reference.linear(x.double(), torch.cat(weights).double(), torch.cat(biases).double())
    assert (out - exact).norm() <= torch.finfo(torch.bfloat16).eps / 2 * exact.norm()


def test_qkv_is_packed_and_each_part_is_its_own_projection(device):
    inputs, _ = qkv_inputs(2, 7, 24, 40, torch.float16, device)
    q, k, v = pre_norm_qkv(**inputs, eps=1e-6, num_heads=5)
    assert q.shape == k.shape == v.shape == (2, 7, 5, 8)
    assert q.stride() == k.stride() == v.stride() == (7 * 3 * 40, 3 * 40, 8, 1)
    assert k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == 2 * 40
    for part, expected in zip((q, k, v), reference.pre_norm_qkv(**inputs, eps=1e-6, num_heads=5), strict=True):
        torch.testing.assert_close(part, expected)


def test_qkv_without_some_biases(device):
    inputs, out_grad = qkv_inputs(2, 7, 24, 40, torch.bfloat16, device)
    for without in (("k_bias",), ("q_bias", "k_bias", "v_bias")):
        given = {name: tensor for name, tensor in inputs.items() if name not in without}
        missing = dict.fromkeys(without)
        kernel, definition = (
            functools.partial(side_by_side, functools.partial(function, **missing), 5)
            for function in (pre_norm_qkv, reference.pre_norm_qkv)
        )
        check_budget(kernel, definition, given, out_grad)


@pytest.mark.parametrize("kind", ["transposed", "slice", "expanded rows"])
def test_qkv_of_views(kind, device):
    inputs, out_grad = qkv_inputs(2, 7, 24, 40, torch.float16, device)
    for names in (("x",), ("k_weight",), ("q_weight", "k_weight", "v_weight")):
        views = {n: strided(kind, t.shape, t.dtype, device) if n in names else t for n, t in inputs.items()}
        kernel = functools.partial(side_by_side, pre_norm_qkv, 5)
        found = run(kernel, views, out_grad, torch.float16)
        expected = run(kernel, {n: t.contiguous() for n, t in views.items()}, out_grad, torch.float16)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, msg=f"{name} for {names}")


def test_qkv_gradients_that_are_missing_or_lie_elsewhere(device):
    """The loss may use one of q, k and v; their gradients may have any strides."""
    inputs, _ = qkv_inputs(2, 7, 24, 40, torch.float32, device)
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    for used in ((0,), (1, 2)):
        gradients = []
        for function in (pre_norm_qkv, reference.pre_norm_qkv):
            parts = function(**tensors, eps=1e-6, num_heads=5)
            upstream = [torch.linspace(0, 1, part.numel(), device=device).view(2, 5, 8, 7) for part in parts]
            gradients.append(
                torch.autograd.grad(
                    [parts[i] for i in used],
                    list(tensors.values()),
                    [upstream[i].permute(0, 3, 1, 2) for i in used],
                    allow_unused=True,
                )
            )
        for name, found, expected in zip(tensors, *gradients, strict=True):
            if expected is None:
                assert found is None or not found.any(), name
            else:
                torch.testing.assert_close(found, expected, msg=name)


@pytest.mark.parametrize(
    "wanted", [("x",), ("norm_weight",), ("k_weight",), ("q_bias", "v_bias"), ("q_weight", "v_weight", "v_bias")]
)
def test_qkv_only_the_gradients_asked_for(wanted, device):
    inputs, out_grad = qkv_inputs(2, 7, 24, 40, torch.bfloat16, device)
    everything = run(functools.partial(side_by_side, pre_norm_qkv, 5), inputs, out_grad, torch.bfloat16)
    for name in wanted:
        inputs[name].requires_grad_()
    out = side_by_side(pre_norm_qkv, 5, **inputs)
    for name, gradient in zip(wanted, torch.autograd.grad(out, [inputs[n] for n in wanted], out_grad), strict=True):
        torch.testing.assert_close(gradient, everything[name])


@pytest.mark.parametrize("batch_and_tokens", [(0, 7), (2, 0)])
def test_qkv_of_nothing(batch_and_tokens, device):
    inputs, out_grad = qkv_inputs(*batch_and_tokens, 24, 40, torch.float16, device)
    found, expected = (
        run(functools.partial(side_by_side, function, 5), inputs, out_grad, torch.float16)
        for function in (pre_norm_qkv, reference.pre_norm_qkv)
    )
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_bitwise_repeatable(device):
    inputs, out_grad = linear_inputs(140, 264, 72, torch.bfloat16, device)
    first, second = (run(linear, inputs, out_grad, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    inputs, out_grad = qkv_inputs(2, 70, 24, 40, torch.bfloat16, device)
    kernel = functools.partial(side_by_side, pre_norm_qkv, 5)
    first, second = (run(kernel, inputs, out_grad, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
