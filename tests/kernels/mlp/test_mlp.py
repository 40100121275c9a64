"""mlp and pre_norm_mlp: error budget, awkward shapes, GELU far from zero, what is kept for the backward."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from error_budget import check_budget, run
from torch import Tensor

from bench.compiled.ahead_of_time import GPUS
from siglip_kernels import mlp, pre_norm_mlp, reference
from siglip_kernels.device import pretend

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "seed"),
    # numpy's, in the interpreter: far from zero e^x overflows, and 1 / inf is what is wanted.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRE_NORM = functools.partial(pre_norm_mlp, eps=1e-6)
PRE_NORM_REFERENCE = functools.partial(reference.pre_norm_mlp, eps=1e-6)


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def mlp_inputs(
    rows: int | tuple[int, ...], width: int, hidden: int, dtype: torch.dtype, device: str, pre_norm: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """x, the weights and biases, the residual or the norm's parameters; and the gradient of the result."""
    leading = (rows,) if isinstance(rows, int) else rows
    inputs = {
        "x": torch.randn(*leading, width),
        "fc1_weight": torch.randn(hidden, width) / math.sqrt(width),
        "fc1_bias": torch.randn(hidden),
        "fc2_weight": torch.randn(width, hidden) / math.sqrt(hidden),
        "fc2_bias": torch.randn(width),
    }
    if pre_norm:
        inputs |= {"norm_weight": torch.rand(width) + 0.5, "norm_bias": torch.randn(width)}
    else:
        inputs |= {"residual": torch.randn(*leading, width)}
    inputs = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    return inputs, torch.randn(*leading, width).to(device, dtype)


SHAPES = [
    (1, 8, 16),
    (1, 1, 1),
    (3, 17, 9),
    (127, 24, 40),
    (128, 24, 40),
    (129, 24, 40),
    (33, 257, 64),
    (33, 64, 255),
    (33, 64, 257),
    (130, 264, 264),
]


@pytest.mark.parametrize(
    ("shape", "dtype"), [(shape, DTYPES[(i + j) % 3]) for i, shape in enumerate(SHAPES) for j in range(2)], ids=str
)
@pytest.mark.parametrize("pre_norm", [False, True], ids=["mlp", "pre_norm_mlp"])
def test_shapes_off_by_one_from_each_tile(shape, dtype, pre_norm, device):
    if pre_norm and shape[1] == 1:
        shape = (shape[0], 2, shape[2])  # a normalised row of one element is nothing but the bias
    inputs, out_grad = mlp_inputs(*shape, dtype, device, pre_norm)
    kernel, definition = (PRE_NORM, PRE_NORM_REFERENCE) if pre_norm else (mlp, reference.mlp)
    check_budget(kernel, definition, inputs, out_grad)


@pytest.mark.parametrize(
    ("rows", "width", "hidden", "dtype"),
    [
        (5, 1152, 4304, torch.bfloat16),
        (1, 1152, 4304, torch.float32),
        (3, 768, 3072, torch.float16),
    ],
    ids=str,
)
def test_widths_of_models(rows, width, hidden, dtype, device):
    check_budget(PRE_NORM, PRE_NORM_REFERENCE, *mlp_inputs(rows, width, hidden, dtype, device, pre_norm=True))


@pytest.mark.parametrize("gpu", ["a100", "h200"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_gpus(gpu, dtype, device):
    if device == "cuda":
        pytest.skip("the tiles of another GPU need not fit this one")
    inputs, out_grad = mlp_inputs(70, 72, 136, dtype, device)
    with pretend(GPUS[gpu]):
        check_budget(mlp, reference.mlp, inputs, out_grad)


@pytest.mark.parametrize("descriptors", [True, False])
def test_every_tile_has_its_gelu_and_its_column_sums(descriptors, device):
    """More row tiles than one group has, each with sums of its own; columns that end within a piece."""
    from siglip_kernels.gemm.config import GROUP, Tile
    from siglip_kernels.gemm.kernels import gemm

    tile = Tile(16, 32, 16, 4, 2, pieces=4, descriptors=descriptors)
    rows = 16 * (GROUP + 3) - 5
    x, weight, kept = (torch.randn(shape).to(device) for shape in ((rows, 24), (72, 24), (rows, 72)))
    out, product, _, _ = gemm(x, [weight], [None], gelu="forward", keep_pre_activation=True, tile=tile)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(product.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.double(), F.gelu(exact, approximate="tanh"), atol=1e-5, rtol=1e-5)
    out, _, activation, sums = gemm(
        x,
        [weight],
        [None],
        gelu="backward",
        pre_activation=kept,
        keep_activation=True,
        keep_column_sums=True,
        tile=tile,
    )
    exact_kept = kept.double().requires_grad_()
    exact_activation = F.gelu(exact_kept, approximate="tanh")
    (exact_out,) = torch.autograd.grad(exact_activation, exact_kept, exact)
    torch.testing.assert_close(activation.double(), exact_activation, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.double(), exact_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums.double(), exact_out.sum(0), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("descriptors", "roundings"), [(True, 0), (False, 1)])
def test_column_sums_of_sixteen_bits(descriptors, roundings, dtype, device):
    """Those of the result as it is rounded, where tensor cores sum it; otherwise of the result before."""
    from siglip_kernels.gemm.config import Tile
    from siglip_kernels.gemm.kernels import gemm

    x, weight, kept = (torch.randn(shape).to(device, dtype) for shape in ((70, 24), (72, 24), (70, 72)))
    tile = Tile(32, 32, 16, 4, 2, pieces=2, descriptors=descriptors)
    out, _, _, sums = gemm(x, [weight], [None], gelu="backward", pre_activation=kept, keep_column_sums=True, tile=tile)
    rounding = torch.finfo(dtype).eps / 2 * out.double().abs().sum(0)
    assert ((sums.double() - out.double().sum(0)).abs() <= (roundings + 1e-3) * rounding).all()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_shapes(leading, device):
    check_budget(mlp, reference.mlp, *mlp_inputs(leading, 24, 40, torch.bfloat16, device))
    check_budget(PRE_NORM, PRE_NORM_REFERENCE, *mlp_inputs(leading, 24, 40, torch.bfloat16, device, pre_norm=True))


@pytest.mark.parametrize("without", [("residual",), ("fc1_bias",), ("fc2_bias",), ("residual", "fc1_bias", "fc2_bias")])
def test_without_residual_or_biases(without, device):
    inputs, out_grad = mlp_inputs(9, 24, 40, torch.bfloat16, device)
    given = {name: tensor for name, tensor in inputs.items() if name not in without}
    missing = dict.fromkeys(without)
    check_budget(functools.partial(mlp, **missing), functools.partial(reference.mlp, **missing), given, out_grad)
    if "residual" not in without:
        inputs, out_grad = mlp_inputs(9, 24, 40, torch.bfloat16, device, pre_norm=True)
        given = {name: tensor for name, tensor in inputs.items() if name not in without}
        check_budget(
            functools.partial(PRE_NORM, **missing), functools.partial(PRE_NORM_REFERENCE, **missing), given, out_grad
        )


def test_as_many_results_as_fc2_has_rows(device):
    inputs, _ = mlp_inputs(9, 24, 40, torch.bfloat16, device)
    inputs["fc2_weight"], inputs["fc2_bias"] = inputs["fc2_weight"][:8], inputs["fc2_bias"][:8]
    inputs["residual"] = inputs["residual"][:, :8]
    check_budget(mlp, reference.mlp, inputs, torch.randn(9, 8).to(device, torch.bfloat16))


@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
def test_nothing_to_do(leading, device):
    for pre_norm, kernel, definition in ((False, mlp, reference.mlp), (True, PRE_NORM, PRE_NORM_REFERENCE)):
        inputs, out_grad = mlp_inputs(leading, 24, 40, torch.float16, device, pre_norm)
        found, expected = (run(function, inputs, out_grad, torch.float16) for function in (kernel, definition))
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["x", "fc1_weight", "fc2_weight", "residual", "out_grad"])
@pytest.mark.parametrize("kind", ["transposed", "slice", "expanded"])
def test_views(name, kind, device):
    inputs, out_grad = mlp_inputs(9, 24, 40, torch.float16, device)
    views = dict(inputs, out_grad=out_grad)
    rows, columns = views[name].shape
    fresh = torch.randn(columns, rows + 8).to(device, torch.float16) / 5
    views[name] = {
        "transposed": fresh[:, :rows].T,
        "slice": fresh.reshape(-1)[: rows * (columns + 3)].view(rows, columns + 3)[:, 1:-2]
        if fresh.numel() >= rows * (columns + 3)
        else torch.randn(rows, columns + 3).to(device, torch.float16)[:, 1:-2],
        "expanded": fresh[:1, :1].expand(rows, columns),
    }[kind]
    out_grad = views.pop("out_grad")
    check_budget(mlp, reference.mlp, views, out_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_far_from_zero(dtype, device):
    """The pre-activations are the bias: 0, ±30, ±1e4 and the largest numbers; gelu is 0 or x, its derivative 0 or 1."""
    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, 1e-4, -1e-4, 1.0, -1.0, 5.0, -5.0, 30.0, -30.0, 1e4, -1e4, largest, -largest]
    inputs, out_grad = mlp_inputs(3, 8, len(values), dtype, device)
    inputs["fc1_weight"].zero_()
    inputs["fc1_bias"] = torch.tensor(values, dtype=dtype, device=device)
    inputs["fc2_weight"][:, -2:] = 0  # what is as large as that would drown the rest, or overflow
    inputs["fc2_weight"][:, -4:-2] /= 1e4
    found = run(mlp, inputs, out_grad, dtype)
    truth = run(reference.mlp, inputs, out_grad, torch.float64)
    for name, exact in truth.items():
        assert not found[name].isnan().any()
        if name == "fc2_weight":  # the largest numbers times a gradient may overflow
            found[name], exact = found[name][:, :-2], exact[:, :-2]
        error = (found[name].double() - exact).norm()
        assert error <= 4 * torch.finfo(dtype).eps * exact.norm() + 1e-30, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_its_derivative_everywhere(dtype, device):
    """Identities in front of gelu and behind it: gelu(x) and gelu'(x) by themselves, over a wide range."""
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.logspace(-6, 4, 60), -torch.logspace(-6, 4, 60)])[:, None]
    x = x.to(device, dtype).requires_grad_()
    one, nothing = torch.ones(1, 1, dtype=dtype, device=device), torch.zeros(1, dtype=dtype, device=device)
    out = mlp(x, one, nothing, one, nothing, torch.zeros_like(x))
    (slope,) = torch.autograd.grad(out.sum(), x)
    exact_x = x.detach().double().requires_grad_()
    exact = exact_x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (exact_x + 0.044715 * exact_x**3))  # F.gelu cancels
    (exact_slope,) = torch.autograd.grad(exact.sum(), exact_x)
    eps = torch.finfo(dtype).eps
    # Element by element: a rounding of the result, and far below zero, where gelu is tiny, fp32's of the exponent.
    assert ((out - exact).abs() <= eps * exact.abs() + 2e-6 * exact.abs().sqrt() + torch.finfo(dtype).tiny).all()
    assert ((slope - exact_slope).abs() <= eps * exact_slope.abs() + 2e-6).all()


def test_neighbours_share_nothing_but_time(device):
    """Whatever the other column of a pair is: a number far from zero, infinite or none at all. gelu(-inf) is NaN."""
    from siglip_kernels.gemm.kernels import gemm

    values = torch.tensor([0.0, 1.0, -1.0, -5.0, -7.4, -7.6, -12.0, 30.0, -1e38, 1e38, math.inf, -math.inf, math.nan])
    biases = torch.cartesian_prod(values, values).flatten().to(device)  # all pairs, side by side
    nothing = torch.zeros(1, 8, device=device), torch.zeros(len(biases), 8, device=device)
    out, *_ = gemm(nothing[0], [nothing[1]], [biases], gelu="forward")
    exact = biases.double() * torch.sigmoid(
        2 * math.sqrt(2 / math.pi) * (biases.double() + 0.044715 * biases.double() ** 3)
    )
    exact[biases == -1e38] = 0.0
    torch.testing.assert_close(out[0].double(), exact, atol=1e-12, rtol=1e-6, equal_nan=True)
    assert (out[0, biases.isfinite() & (biases <= -12)] == 0).all()


def test_infinite_pre_activations(device):
    """fp16 cannot hold ±1e5: kept as ±inf, whose gelu is inf or 0 and whose slope is 1 or 0, and never NaN."""
    from siglip_kernels.gemm.kernels import gemm

    x = torch.ones(1, 8, dtype=torch.float16, device=device)
    weight = torch.eye(8, dtype=torch.float16, device=device)
    kept = torch.tensor(
        [[math.inf, -math.inf, 0.0, 1.0, -1.0, 60_000, -60_000, 2.0]], dtype=torch.float16, device=device
    )
    slope, _, activation, _ = gemm(x, [weight], [None], gelu="backward", pre_activation=kept, keep_activation=True)
    assert slope[0, :3].tolist() == [1.0, 0.0, 0.5] and slope[0, 5:7].tolist() == [1.0, 0.0]
    assert activation[0, :3].tolist() == [math.inf, 0.0, 0.0] and activation[0, 5:7].tolist() == [60_000, 0.0]


def test_large_mean_before_the_norm(device):
    for dtype in DTYPES:
        inputs, out_grad = mlp_inputs(9, 72, 40, dtype, device, pre_norm=True)
        inputs["x"] = (inputs["x"].float() + 1e4).to(dtype)
        check_budget(PRE_NORM, PRE_NORM_REFERENCE, inputs, out_grad)


def test_not_a_number_is_not_hidden(device):
    inputs, out_grad = mlp_inputs(5, 24, 40, torch.bfloat16, device)
    inputs["x"][3, 1] = float("nan")
    found = run(mlp, inputs, out_grad, torch.bfloat16)
    assert found["out"][3].isnan().all() and found["out"].isnan().sum() == 24
    assert found["x"][3].isnan().all() and found["x"].isnan().sum() == 24


def test_gradients_as_large_as_a_scaler_makes_them(device):
    """fp16 gradients that a GradScaler has multiplied by 2^12 keep their bits: the results scale along exactly."""
    inputs, out_grad = mlp_inputs(9, 24, 40, torch.float16, device)
    plain = run(mlp, inputs, out_grad / 64, torch.float16)
    scaled = run(mlp, inputs, out_grad / 64 * 4096, torch.float16)
    for name in inputs:
        torch.testing.assert_close(scaled[name] / 4096, plain[name], atol=2e-6, rtol=2e-3)
    (gradient,) = torch.autograd.grad(
        mlp(**{name: tensor.requires_grad_(name == "x") for name, tensor in inputs.items()}),
        inputs["x"],
        torch.full_like(out_grad, math.inf),
    )
    assert not gradient.isfinite().any()  # so the scaler sees it, and skips the step


def test_nothing_is_written_beyond_the_results(device, monkeypatch):
    """Every fresh tensor lies between two fences, on tiles that reach whole pieces beyond the last column."""
    real, fences = torch.empty, []

    def fenced(shape: tuple[int, ...], **options: object) -> Tensor:
        flat = real(math.prod(shape) + 1024, **options).fill_(7)
        fences.append(flat)
        return flat[512:-512].view(shape)

    inputs, out_grad = mlp_inputs(5, 8, 14, torch.float32, device)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", fenced)
        run(mlp, inputs, out_grad, torch.float32)
    assert len(fences) >= 5
    assert all((flat[:512] == 7).all() and (flat[-512:] == 7).all() for flat in fences)


def test_bitwise_repeatable(device):
    for pre_norm, kernel in ((False, mlp), (True, PRE_NORM)):
        inputs, out_grad = mlp_inputs(140, 72, 264, torch.bfloat16, device, pre_norm)
        first, second = (run(kernel, inputs, out_grad, torch.bfloat16) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("pre_norm", [False, True], ids=["mlp", "pre_norm_mlp"])
def test_only_the_gradients_asked_for(pre_norm, device):
    kernel = PRE_NORM if pre_norm else mlp
    inputs, out_grad = mlp_inputs(9, 24, 40, torch.bfloat16, device, pre_norm)
    everything = run(kernel, inputs, out_grad, torch.bfloat16)
    for wanted in (*((name,) for name in inputs), ("x", "fc2_bias"), ("fc1_weight", "fc2_weight")):
        tensors = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
        gradients = torch.autograd.grad(kernel(**tensors), [tensors[name] for name in wanted], out_grad)
        for name, gradient in zip(wanted, gradients, strict=True):
            torch.testing.assert_close(gradient, everything[name], msg=f"{name} of {wanted}")


def kept_bytes(call, parameters: list[Tensor]) -> int:
    """What autograd keeps for the backward of a call, without the parameters."""
    kept: dict[int, int] = {}
    skip = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    del out
    return sum(kept.values())


@pytest.mark.parametrize("pre_norm", [False, True], ids=["mlp", "pre_norm_mlp"])
def test_input_and_pre_activation_are_all_that_is_kept(pre_norm, device):
    rows, width, hidden = 50, 24, 88
    kernel = PRE_NORM if pre_norm else mlp
    inputs, _ = mlp_inputs(rows, width, hidden, torch.bfloat16, device, pre_norm)
    parameters = [t for name, t in inputs.items() if name not in ("x", "residual")]

    def kept(*wanted: str) -> int:
        tensors = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
        return kept_bytes(lambda: kernel(**tensors), parameters)

    statistics = rows * 2 * 4 if pre_norm else 0
    assert kept(*inputs) == rows * (width + hidden) * 2 + statistics
    if not pre_norm:
        assert kept("residual") == kept("fc2_bias") == kept() == 0
        assert kept("fc1_bias") == kept("fc2_weight") == rows * hidden * 2


def test_inference_writes_no_pre_activation(device, monkeypatch):
    from siglip_kernels.gemm import kernels

    asked = []
    original = kernels.gemm

    def spy(*arguments, **options):
        asked.append(options.get("keep_pre_activation"))
        return original(*arguments, **options)

    monkeypatch.setattr(kernels, "gemm", spy)
    inputs, _ = mlp_inputs(9, 24, 40, torch.bfloat16, device)
    mlp(**inputs)
    with torch.no_grad():
        mlp(**{name: tensor.requires_grad_() for name, tensor in inputs.items()})
    assert asked == [False, None, False, None]
    mlp(**inputs)
    assert asked[4:] == [True, None]
