"""Layer normalisation: error budget, shapes, adversarial rows, strides, registration, and what bad input gets."""

import functools
import itertools

import pytest
import torch
import torch._dynamo.testing
from error_budget import check_budget, run
from torch import Tensor

from siglip_kernels import UnsupportedInputError, layer_norm, reference
from siglip_kernels.layer_norm.config import WIDEST_IN_REGISTERS, backward_tile, forward_tile
from siglip_kernels.layer_norm.kernels import layer_norm_backward, layer_norm_forward

pytestmark = pytest.mark.usefixtures("poisoned_empty", "seed")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPERATORS = torch.ops.siglip_kernels


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def random_inputs(rows: int, width: int, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], Tensor]:
    x, out_grad = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    return {"x": x, "weight": weight, "bias": bias}, out_grad


def check(inputs: dict[str, Tensor], out_grad: Tensor, eps: float = 1e-6, **slack: float) -> dict[str, Tensor]:
    kernel, definition = (functools.partial(function, eps=eps) for function in (layer_norm, reference.layer_norm))
    return check_budget(kernel, definition, inputs, out_grad, slack)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(width, dtype) for width in (2, 17, 255, 1152) for dtype in DTYPES]
    + [(768, torch.bfloat16), (1024, torch.bfloat16), (1153, torch.float16), (4304, torch.bfloat16)]
    + [(8192, torch.float16), (8193, torch.bfloat16), (20_000, torch.float32)],
    ids=str,
)
def test_widths(width, dtype, device):
    check(*random_inputs(5, width, dtype, device))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 63, 64, 65, 300])
def test_rows(rows, device):
    check(*random_inputs(rows, 48, torch.bfloat16, device))
    check(*random_inputs(rows, 200, torch.float16, device))


def test_width_of_one(device):
    """Every row is constant: y is the bias, and nothing but the bias has a gradient."""
    inputs, out_grad = random_inputs(5, 1, torch.float32, device)
    found = run(functools.partial(layer_norm, eps=1e-6), inputs, out_grad, torch.float32)
    assert torch.equal(found["out"], inputs["bias"].expand(5, 1))
    assert not found["x"].any() and not found["weight"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 1152, 9001])
def test_large_mean(width, dtype, device):
    inputs, out_grad = random_inputs(4, width, dtype, device)
    inputs["x"] = (inputs["x"].float() + 1e4).to(dtype)
    found = check(inputs, out_grad)
    if width <= WIDEST_IN_REGISTERS:  # the rounding of the mean itself is made good
        exact = reference.layer_norm(**{name: tensor.double() for name, tensor in inputs.items()})
        assert (found["out"].double() - exact).norm() <= torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -1e4])
def test_constant_rows(value, dtype, device):
    inputs, out_grad = random_inputs(3, 300, dtype, device)
    inputs["x"] = torch.full_like(inputs["x"], value)
    found = run(layer_norm, inputs, out_grad, dtype)
    assert torch.equal(found["out"], inputs["bias"].expand(3, 300))
    assert not found["weight"].any()
    exact = run(reference.layer_norm, inputs, out_grad, torch.float64)["x"]
    assert (found["x"].double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_huge_outlier(dtype, device):
    for place in (0, 799, 1100):
        inputs, out_grad = random_inputs(4, 1152, dtype, device)
        inputs["x"][1, place] = 3e4
        check(inputs, out_grad)


def test_integers_whose_answer_is_exact(device):
    """Rows of equally many 1 and -1 are normalised already."""
    signs = torch.tensor([1.0, -1.0], device=device).repeat(2, 32)
    out = layer_norm(3 * signs + 100, torch.full((64,), 2.0, device=device), torch.ones(64, device=device), eps=0.0)
    assert torch.equal(out, 2 * signs + 1)


def test_not_a_number_stays_in_its_row(device):
    inputs, out_grad = random_inputs(3, 40, torch.float32, device)
    inputs["x"][1, 3] = float("nan")
    out = run(layer_norm, inputs, out_grad, torch.float32)["out"]
    assert out[1].isnan().all() and out.isnan().sum() == 40


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, about rows beyond the last
@pytest.mark.parametrize("eps", [0.0, 1e-3, 1])
def test_eps(eps, device):
    check(*random_inputs(3, 40, torch.float32, device), eps=eps)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 9001), (2, 0, 3), (0, 0)])
def test_nothing_to_do(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight, bias = (torch.randn(shape[-1:], device=device, requires_grad=True) for _ in range(2))
    out = layer_norm(x, weight, bias)
    assert out.shape == x.shape
    for gradient, tensor in zip(torch.autograd.grad(out.sum(), (x, weight, bias)), (x, weight, bias), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (2, 1, 3, 40)])
def test_leading_dimensions(shape, device):
    x, out_grad = torch.randn(shape, device=device), torch.randn(shape, device=device)
    parameters = {name: torch.randn(40, device=device) for name in ("weight", "bias")}
    check({"x": x, **parameters}, out_grad)


@pytest.mark.parametrize(
    ("kind", "width"),
    [(kind, 72) for kind in ("sliced rows", "every other row", "transposed", "tokens", "expanded", "unaligned")]
    + [("every other row", 9001), ("unaligned", 9001)],
)
def test_views_equal_their_contiguous_copies(kind, width, device):
    def view() -> Tensor:
        if kind == "sliced rows":
            return torch.randn(6, 3 * width, device=device)[:, width : 2 * width]
        if kind == "every other row":
            return torch.randn(12, width, device=device)[::2]
        if kind == "transposed":
            return torch.randn(width, 6, device=device).T
        if kind == "tokens":
            return torch.randn(2, 4, width, device=device)[:, 1:]
        if kind == "expanded":
            return torch.randn(1, width, device=device).expand(6, width)
        return torch.randn(6, width + 1, device=device)[:, 1:]

    x, out_grad, parameters = view(), view(), [torch.randn(width, 2, device=device)[:, 0] for _ in range(2)]
    views = run(layer_norm, dict(x=x, weight=parameters[0], bias=parameters[1]), out_grad, torch.float32)
    copies = dict(x=x.contiguous(), weight=parameters[0].contiguous(), bias=parameters[1].contiguous())
    found = run(layer_norm, copies, out_grad.contiguous(), torch.float32)
    assert all(torch.equal(views[name], found[name]) for name in found)


def test_rows_with_a_stride_are_not_copied(device, monkeypatch):
    x = torch.randn(6, 144, device=device, requires_grad=True)[:, 72:]
    weight, bias = (torch.randn(72, device=device) for _ in range(2))
    monkeypatch.setattr(Tensor, "clone", lambda *_, **__: pytest.fail("a copy was made"))
    layer_norm(x, weight, bias).backward(torch.ones(6, 72, device=device))


@pytest.mark.parametrize("width", [48, 1152, 9001])
def test_bitwise_repeatable(width, device):
    inputs, out_grad = random_inputs(9 if width == 48 else 3, width, torch.bfloat16, device)
    first = run(layer_norm, inputs, out_grad, torch.bfloat16)
    second = run(layer_norm, inputs, out_grad, torch.bfloat16)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3))[1:], ids=str)
@pytest.mark.parametrize("width", [48, 9001])
def test_only_the_gradients_asked_for(width, needed, device):
    inputs, out_grad = random_inputs(5 if width == 48 else 2, width, torch.float16, device)
    everything = run(layer_norm, inputs, out_grad, torch.float16)
    tensors = {n: t.detach().requires_grad_(need) for (n, t), need in zip(inputs.items(), needed, strict=True)}
    layer_norm(**tensors).backward(out_grad)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.grad, everything[name]) if tensor.requires_grad else tensor.grad is None
    rows = torch.zeros(len(out_grad), device=device)
    sizes = [g.numel() for g in OPERATORS.layer_norm_backward(
        out_grad, inputs["x"], inputs["weight"], rows, rows, torch.float16, *needed
    )]  # fmt: skip
    assert [size > 0 for size in sizes] == list(needed)


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_without_weight_or_bias(missing, device):
    inputs, out_grad = random_inputs(9, 80, torch.bfloat16, device)
    inputs = {name: tensor for name, tensor in inputs.items() if name not in missing}
    nothing = dict.fromkeys(missing)

    def definition(**tensors):
        return torch.nn.functional.layer_norm(tensors["x"], (80,), tensors.get("weight"), tensors.get("bias"), 1e-6)

    check_budget(lambda **tensors: layer_norm(**tensors, **nothing), definition, inputs, out_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_in_fp32_beside_half_precision(dtype, device):
    inputs, out_grad = random_inputs(9, 80, dtype, device)
    wide = {name: inputs[name].float().requires_grad_() for name in ("weight", "bias")}
    x = inputs["x"].requires_grad_()
    out = layer_norm(x, **wide)
    gradients = torch.autograd.grad(out, (x, *wide.values()), out_grad)
    assert [tensor.dtype for tensor in (out, *gradients)] == [dtype, dtype, torch.float32, torch.float32]
    exact = run(reference.layer_norm, {"x": x, **wide}, out_grad, torch.float64)
    for found, true in zip((out, *gradients), exact.values(), strict=True):
        assert (found.double() - true).norm() <= torch.finfo(found.dtype).eps * 2 * true.norm()


@pytest.mark.parametrize("width", [80, 1000, 9001])
def test_launchers_add_the_gradient_of_the_residual_and_sum_it(width, device):
    inputs, out_grad = random_inputs(5, width, torch.bfloat16, device)
    _, mean, rstd = layer_norm_forward(inputs["x"], inputs["weight"], inputs["bias"], 1e-6)
    assert mean.dtype == rstd.dtype == torch.float32 and mean.shape == rstd.shape == (5,)
    residual_grad = 100 * torch.randn(5, 2 * width, device=device).bfloat16()[:, width:]
    arguments = (out_grad, inputs["x"], inputs["weight"], mean, rstd, residual_grad)
    x_grad, *parameters, sums = layer_norm_backward(*arguments, needs_residual_sums=True)
    exact = run(reference.layer_norm, inputs, out_grad, torch.float64)
    exact["x"] += residual_grad
    for found, name in zip((x_grad, *parameters), ("x", "weight", "bias"), strict=True):
        assert (found.double() - exact[name]).norm() <= 2**-8 * exact[name].norm()
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), residual_grad.double().sum(0), rtol=1e-5, atol=1e-3)
    *without, nothing = layer_norm_backward(*arguments)
    assert nothing.numel() == 0 and all(map(torch.equal, without, (x_grad, *parameters)))


def test_half_precision_can_be_normalised_into_fp32(device):
    """What autocast makes of it on CUDA: nothing is rounded but the statistics' own sums."""
    inputs, _ = random_inputs(9, 80, torch.bfloat16, device)
    out = layer_norm_forward(inputs["x"], inputs["weight"], inputs["bias"], 1e-6, torch.float32)[0]
    exact = reference.layer_norm(**{name: tensor.double() for name, tensor in inputs.items()})
    assert out.dtype == torch.float32
    assert (out.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_as_torch(dtype, device):
    for x_dtype in (torch.float32, dtype):
        x = torch.randn(3, 40, device=device, dtype=x_dtype, requires_grad=True)
        weight, bias = (torch.randn(40, device=device, requires_grad=True) for _ in range(2))
        with torch.autocast(device, dtype):
            out, expected = layer_norm(x, weight, bias), reference.layer_norm(x, weight, bias)
        assert out.dtype == expected.dtype
        gradients = torch.autograd.grad(out.sum(), (x, weight, bias))
        assert [gradient.dtype for gradient in gradients] == [x_dtype, torch.float32, torch.float32]


def test_offsets_beyond_32_bits(device):
    """The last of three rows begins after 2^31 elements."""
    step = 2**30 + 8
    storage = torch.empty(0)
    if device == "cpu":
        try:
            storage = torch.from_file(_sparse_file(2 * (2 * step + 64)), size=2 * step + 64, dtype=torch.float16)
        except (OSError, RuntimeError) as error:
            pytest.skip(f"no sparse file of 4 GB: {error}")
    else:
        storage = torch.empty(2 * step + 64, dtype=torch.float16, device=device)
    inputs, out_grad = random_inputs(3, 64, torch.float16, device)
    far = storage.as_strided((3, 64), (step, 1)).copy_(inputs["x"])
    expected = run(layer_norm, inputs, out_grad, torch.float16)
    weight, bias = inputs["weight"], inputs["bias"]
    out, mean, rstd = layer_norm_forward(far, weight, bias, 1e-6)
    assert torch.equal(out, expected["out"])
    assert torch.equal(layer_norm_backward(out_grad, far, weight, mean, rstd)[0], expected["x"])
    far.copy_(out_grad)
    gradients = layer_norm_backward(far, inputs["x"], weight, mean, rstd, far)
    assert torch.equal(gradients[1], expected["weight"])


def _sparse_file(size: int) -> str:
    import tempfile

    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.truncate(size)
    return file.name


def test_tiles_fill_the_gpu_and_hold_each_row_once():
    for width in (1, 17, 64, 768, 1024, 1152, 4304, 8192):
        for rows in (1, 729, 46_656):
            forward = forward_tile(width, rows, 132)
            assert forward.block * forward.chunks >= width
            assert forward.rows == 1 or -(-rows // forward.rows) >= 264
            for aligned in (True, False):
                backward = backward_tile(width, rows, 2, 132, aligned)
                assert backward.block * backward.chunks >= width
                assert backward.rows == 1 or backward.chunks > 1 or -(-rows // backward.rows) >= 264
    for width in (768, 1024, 1152):  # no column too many
        forward = forward_tile(width, 46_656, 132)
        assert forward.block * forward.chunks == width
        backward = backward_tile(width, 46_656, 2, 132, True)
        assert backward.block * backward.chunks == width and backward.rows == backward.warps


def test_operators_check(device):
    inputs, out_grad = random_inputs(4, 24, torch.float16, device)
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs.values())
    torch.library.opcheck(OPERATORS.layer_norm.default, (x, weight, bias, 1e-6, torch.float16))
    torch.library.opcheck(OPERATORS.layer_norm.default, (x, None, None, 1e-6, torch.float32))
    x, weight = x.detach(), weight.detach()
    _, mean, rstd = OPERATORS.layer_norm(x, weight, None, 1e-6, torch.float16)
    for needed in ((True, True, True), (False, True, False)):
        arguments = (out_grad, x, weight, mean, rstd, torch.float16, *needed)
        torch.library.opcheck(
            OPERATORS.layer_norm_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_compiles_as_one_graph_forward_and_backward(device):
    def block(x, weight, bias):
        return layer_norm(2 * x, weight, bias).sin()

    inputs, _ = random_inputs(4, 24, torch.float16, device)
    tensors = [tensor.requires_grad_() for tensor in inputs.values()]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    expected = torch.autograd.grad(block(*tensors).sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiles_once_for_any_number_of_rows(device):
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer_norm, fullgraph=True, dynamic=True, backend=frames)
    counts = []
    for rows in (4, 5, 9):
        inputs, _ = random_inputs(rows, 24, torch.float16, device)
        assert torch.equal(compiled(**inputs), layer_norm(**inputs))
        counts.append(frames.frame_count)
    assert len(set(counts)) == 1


def test_second_derivatives_are_refused(device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad((layer_norm(x, None, None) ** 2).sum(), x, create_graph=True)
    with pytest.raises(UnsupportedInputError, match=r"second derivatives.*eager"):
        gradient.sum().backward()


def test_shapes_without_data():
    x = torch.empty(2, 5, 72, device="meta", dtype=torch.bfloat16)
    out = layer_norm(x, x[0, 0], x[0, 0])
    assert out.is_meta and out.shape == x.shape and out.dtype == x.dtype


GOOD = dict(x=torch.zeros(2, 5, 24), weight=torch.zeros(24), bias=torch.zeros(24))
BAD = {
    "array": ({"x": [1.0, 2.0]}, "x is list; supported: a tensor"),
    "scalar": ({"x": torch.zeros(())}, r"x has no dimension; supported: \(..., width\)"),
    "fp64": ({"x": torch.zeros(5, 24, dtype=torch.float64)}, "x has dtype torch.float64; supported: float32"),
    "integers": ({"x": torch.zeros(5, 24, dtype=torch.int32)}, "x has dtype torch.int32; supported: float32"),
    "width": ({"weight": torch.zeros(23)}, r"weight has shape \(23,\); supported: \(24,\)"),
    "rank of bias": ({"bias": torch.zeros(1, 24)}, r"bias has shape \(1, 24\); supported: \(24,\)"),
    "number as weight": ({"weight": 1.0}, "weight is float; supported: a tensor"),
    "narrow weight": ({"weight": torch.zeros(24).half()}, "weight has dtype torch.float16 while x has torch.float32"),
    "mixed parameters": (
        {"x": torch.zeros(5, 24).half(), "bias": torch.zeros(24).half()},
        "bias has dtype torch.float16 while weight has torch.float32; supported: one dtype",
    ),
    "device": ({"bias": torch.zeros(24, device="meta")}, "bias is on meta while x is on cpu; supported: one device"),
    "negative eps": ({"eps": -1e-6}, "eps is -1e-06; supported: finite numbers from 0 on"),
    "nan eps": ({"eps": float("nan")}, "eps is nan; supported: finite numbers from 0 on"),
    "eps of text": ({"eps": "1e-6"}, "eps is '1e-6'; supported: finite numbers from 0 on"),
    "far too wide": (
        {"x": torch.zeros(1).expand(1, 2**25 + 1), "weight": None, "bias": None},
        "x has width 33554433; supported: widths up to 33554432",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, message):
    with pytest.raises(UnsupportedInputError, match="^layer_norm: " + message):
        layer_norm(**{**GOOD, **change})


@pytest.mark.parametrize("name", ["scalar", "integers", "width", "narrow weight", "negative eps"])
def test_bad_input_is_named_by_compiled_code(name):
    change, message = BAD[name]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="layer_norm: " + message):
        torch.compile(layer_norm, backend="eager", fullgraph=True)(**{**GOOD, **change})
