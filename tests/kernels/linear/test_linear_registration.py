"""How PyTorch knows linear, mlp and the pre_norm operations: operators, compilation, autocast, and bad input."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from siglip_kernels import (
    UnsupportedInputError,
    linear,
    mlp,
    pre_norm_attention,
    pre_norm_mlp,
    pre_norm_qkv,
    reference,
)

OPERATORS = torch.ops.siglip_kernels
B, S, WIDTH, HIDDEN, HEADS = 2, 5, 24, 40, 3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def parameters(operation: str, device: str, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Every tensor of the operation, by its name."""
    shapes: dict[str, tuple[int, ...]] = {"x": (B, S, WIDTH)}
    if operation.startswith("pre_norm"):
        shapes |= {"norm_weight": (WIDTH,), "norm_bias": (WIDTH,)}
    if operation == "linear":
        shapes |= {"weight": (HIDDEN, WIDTH), "bias": (HIDDEN,), "residual": (B, S, HIDDEN)}
    elif operation in ("pre_norm_qkv", "pre_norm_attention"):
        for name in ("q", "k", "v", "out")[: 3 if operation == "pre_norm_qkv" else 4]:
            shapes |= {f"{name}_weight": (WIDTH, WIDTH), f"{name}_bias": (WIDTH,)}
    else:
        shapes |= {"fc1_weight": (HIDDEN, WIDTH), "fc1_bias": (HIDDEN,)}
        shapes |= {"fc2_weight": (WIDTH, HIDDEN), "fc2_bias": (WIDTH,)}
    if operation == "mlp":
        shapes |= {"residual": (B, S, WIDTH)}
    return {
        name: (torch.randn(shape, device=device) / (6 if len(shape) == 2 else 1)).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


PUBLIC = {
    "linear": linear,
    "mlp": mlp,
    "pre_norm_qkv": pre_norm_qkv,
    "pre_norm_attention": pre_norm_attention,
    "pre_norm_mlp": pre_norm_mlp,
}
OPTIONS: dict[str, dict[str, object]] = {
    "pre_norm_mlp": {"eps": 1e-6},
    "pre_norm_qkv": {"eps": 1e-6, "num_heads": HEADS},
    "pre_norm_attention": {"eps": 1e-6, "num_heads": HEADS},
}


def call(function: Callable, operation: str, tensors: dict[str, Tensor | None]) -> Tensor:
    """The operation's result as one tensor, whose gradient reaches each part differently."""
    result = function(**tensors, **OPTIONS.get(operation, {}))
    return torch.cat([part.flatten(2) for part in result], 2).sin() if isinstance(result, tuple) else result.sin()


def gradients(function: Callable, operation: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(call(function, operation, tensors).sum(), list(tensors.values())))


@pytest.mark.parametrize("operation", PUBLIC)
def test_operators_check(operation, device):
    p = parameters(operation, device)
    if operation == "linear":
        arguments = (p["x"], p["weight"], p["bias"], p["residual"])
    elif operation == "mlp":
        arguments = (*p.values(), True)
    elif operation == "pre_norm_mlp":
        x, weight, bias, *others = p.values()
        arguments = (x, weight, bias, 1e-6, *others, True)
    else:
        x, weight, bias, *others = p.values()
        lengths = torch.tensor([3, 5], dtype=torch.int32, device=device)
        masked = () if operation == "pre_norm_qkv" else (0.3, lengths, None, None)
        arguments = (x, weight, bias, 1e-6, *others, HEADS, *masked, True)
    torch.library.opcheck(getattr(OPERATORS, operation).default, arguments)


def test_backward_operators_check(device):
    check = functools.partial(
        torch.library.opcheck, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )
    p = {name: tensor.detach() for name, tensor in parameters("pre_norm_mlp", device).items()}
    x, out_grad = p["x"], torch.randn_like(p["x"])
    for needs in ((True,) * 3, (False, True, False)):
        check(
            OPERATORS.linear_backward.default,
            (out_grad, x if needs[1] else None, p["fc2_weight"][:, :7].contiguous() if needs[0] else None, needs[2]),
        )
    kept = torch.randn(B * S, HIDDEN, device=device).half()
    for needs in ([True] * 5, [False, False, False, True, True]):
        weights = (p["fc1_weight"], p["fc2_weight"]) if needs[0] else (None, None)
        check(OPERATORS.mlp_backward.default, (out_grad, x, kept, *weights, needs))
    mean, rstd = torch.zeros(B * S, device=device), torch.ones(B * S, device=device)
    norm = (p["norm_weight"], p["norm_bias"], 1e-6, mean, rstd)
    for needs in ([True] * 7, [False, False, False, True, True, True, False]):
        weights = (p["fc1_weight"] if needs[0] else None, p["fc2_weight"])
        check(OPERATORS.pre_norm_mlp_backward.default, (out_grad, x, *norm, kept, *weights, needs))
    packed_grad = torch.randn(B, S, 3, HEADS, WIDTH // HEADS, device=device).half()
    weights = torch.randn(3 * WIDTH, WIDTH, device=device).half()
    for needs in ([True] * 3, [False, True, False]):
        check(OPERATORS.pre_norm_qkv_backward.default, (packed_grad, x, *norm, weights, needs, needs, needs))
    kept = (packed_grad, torch.randn_like(packed_grad[:, :, 0]), torch.empty(0, device=device), *(None,) * 4)
    for needs in ([True] * 11, [False] * 3 + [True, False] * 4):
        arguments = (out_grad, x, *norm, *kept, weights if needs[0] else None, weights[:WIDTH], needs)
        check(OPERATORS.pre_norm_attention_backward.default, arguments)


@pytest.mark.parametrize("operation", PUBLIC)
def test_compiles_as_one_graph_forward_and_backward(operation, device):
    tensors = parameters(operation, device)
    torch._dynamo.reset()
    compiled = torch.compile(PUBLIC[operation], fullgraph=True, backend="aot_eager")
    found, expected = (gradients(function, operation, tensors) for function in (compiled, PUBLIC[operation]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(call(compiled, operation, tensors), call(PUBLIC[operation], operation, tensors))


@pytest.mark.parametrize("operation", PUBLIC)
def test_compiles_once_for_all_batches(operation, device):
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(PUBLIC[operation], fullgraph=True, dynamic=True, backend=frames)
    counts = []
    for batch in (2, 3, 5):
        tensors = {
            name: (tensor[:1].expand(batch, -1, -1) if tensor.dim() == 3 else tensor).detach()
            for name, tensor in parameters(operation, device).items()
        }
        assert torch.equal(call(compiled, operation, tensors), call(PUBLIC[operation], operation, tensors))
        counts.append(frames.frame_count)
    # eps, which dynamic=True first takes for a variable, costs a second look at the first batch.
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("operation", PUBLIC)
def test_activation_checkpointing(operation, device):
    tensors = parameters(operation, device)

    def checkpointed(**arguments):
        return checkpoint(PUBLIC[operation], use_reentrant=False, **arguments)

    found, expected = (gradients(function, operation, tensors) for function in (checkpointed, PUBLIC[operation]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operation", PUBLIC)
def test_autocast_as_the_definition(operation, dtype, device):
    """The dtypes of results and gradients are those of PyTorch's own operations, and fp32 residuals stay fp32."""
    tensors = parameters(operation, device, torch.float32)
    definition = getattr(reference, operation)
    with torch.autocast(device, dtype):
        out, expected = (call(function, operation, tensors) for function in (PUBLIC[operation], definition))
        assert out.dtype == expected.dtype == (dtype if operation == "pre_norm_qkv" else torch.float32)
        without = {name: None if name == "residual" else tensor for name, tensor in tensors.items()}
        if "residual" in tensors:
            assert call(PUBLIC[operation], operation, without).dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (out - expected).norm() <= 2 * eps * expected.norm()
    for name, found, wanted in zip(
        tensors,
        torch.autograd.grad(out.sum(), list(tensors.values())),
        torch.autograd.grad(expected.sum(), list(tensors.values())),
        strict=True,
    ):
        assert found.dtype == torch.float32, name
        if (operation, name) == ("pre_norm_attention", "k_bias"):  # exactly zero; the definition's is rounding
            assert not found.any()
        else:
            assert (found - wanted).norm() <= 4 * eps * wanted.norm(), name


@pytest.mark.parametrize("operation", PUBLIC)
def test_compiles_under_autocast(operation, device):
    tensors = parameters(operation, device, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(PUBLIC[operation], fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, PUBLIC[operation]):
        with torch.autocast(device, torch.bfloat16):
            out = call(function, operation, tensors)
        results.append([out, *torch.autograd.grad(out.sum(), list(tensors.values()))])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("operation", PUBLIC)
def test_autocast_takes_inputs_of_mixed_dtypes(operation, device):
    tensors = {name: tensor.detach() for name, tensor in parameters(operation, device, torch.float32).items()}
    tensors["x"] = tensors["x"].bfloat16()
    with torch.autocast(device, torch.bfloat16):
        out, expected = (call(f, operation, tensors) for f in (PUBLIC[operation], getattr(reference, operation)))
        with torch.autocast(device, enabled=False), pytest.raises(UnsupportedInputError, match=f"^{operation}: "):
            call(PUBLIC[operation], operation, tensors)
    assert (out.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


@pytest.mark.parametrize("operation", PUBLIC)
def test_backward_inside_autocast(operation, device):
    tensors = parameters(operation, device, torch.float32)
    expected = gradients(PUBLIC[operation], operation, tensors)
    out = call(PUBLIC[operation], operation, tensors).sum()
    with torch.autocast(device, torch.bfloat16):
        found = torch.autograd.grad(out, list(tensors.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("operation", PUBLIC)
def test_second_derivatives_are_refused(operation, device):
    tensors = parameters(operation, device, torch.float32)
    out = call(PUBLIC[operation], operation, tensors)
    (gradient,) = torch.autograd.grad(out.sum(), tensors["x"], create_graph=True)
    with pytest.raises(UnsupportedInputError, match=rf"^{operation}: create_graph .*second derivatives.*eager"):
        gradient.sum().backward()


@pytest.mark.parametrize("operation", PUBLIC)
def test_shapes_without_data(operation):
    tensors = {name: tensor.detach().to("meta") for name, tensor in parameters(operation, "cpu").items()}
    found, expected = (call(f, operation, tensors) for f in (PUBLIC[operation], getattr(reference, operation)))
    assert found.is_meta and found.shape == expected.shape and found.dtype == expected.dtype


def test_linear_without_residual_is_pytorch(device, monkeypatch):
    """Nothing is fused there: cuBLAS adds a bias in its own epilogue."""
    p = {name: tensor.detach() for name, tensor in parameters("linear", device).items()}
    expected = torch.nn.functional.linear(p["x"], p["weight"], p["bias"])
    from siglip_kernels.gemm import kernels

    monkeypatch.setattr(kernels, "gemm", None)
    assert torch.equal(linear(p["x"], p["weight"], p["bias"]), expected)


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


BAD: dict[str, tuple[str, dict[str, object], str]] = {
    "dimensions": ("linear", {"x": half()}, r"x has no dimension; supported: \(\.\.\., width\)"),
    "no tensor": ("linear", {"x": [1.0]}, "x is list; supported: a tensor"),
    "no weight": ("linear", {"weight": None}, "weight is NoneType; supported: a tensor"),
    "no fc2 weight": ("mlp", {"fc2_weight": None}, "fc2_weight is NoneType; supported: a tensor"),
    "no q weight": ("pre_norm_qkv", {"q_weight": None}, "q_weight is NoneType; supported: a tensor"),
    "no norm weight": ("pre_norm_mlp", {"norm_weight": None}, "norm_weight is NoneType; supported: a tensor"),
    "bias of numbers": ("mlp", {"fc1_bias": 0.0}, "fc1_bias is float; supported: a tensor"),
    "residual of numbers": ("linear", {"residual": 0.0}, "residual is float; supported: a tensor"),
    "integers": (
        "linear",
        {"x": torch.zeros(2, 5, 24, dtype=torch.int32)},
        "x has dtype torch.int32; supported: float32",
    ),
    "fp64": ("mlp", {"x": torch.zeros(2, 5, 24, dtype=torch.float64)}, "x has dtype torch.float64; supported: float32"),
    "width": ("linear", {"x": half(2, 5, 23)}, r"weight has shape \(40, 24\); supported: \(any, 23\)"),
    "weight dimensions": ("linear", {"weight": half(24)}, r"weight has shape \(24,\); supported: \(any, 24\)"),
    "weight dtype": (
        "linear",
        {"weight": torch.zeros(40, 24)},
        "weight has dtype torch.float32 while x has torch.float16",
    ),
    "weight device": ("linear", {"weight": half(40, 24).to("meta")}, "weight is on meta while"),
    "bias": ("linear", {"bias": half(24)}, r"bias has shape \(24,\); supported: \(40,\)"),
    "bias dimensions": ("linear", {"bias": half(1, 40)}, r"bias has shape \(1, 40\); supported: \(40,\)"),
    "residual": (
        "linear",
        {"residual": half(1, 5, 40)},
        r"residual has shape \(1, 5, 40\); supported: \(2, 5, 40\)",
    ),
    "broadcast residual": (
        "mlp",
        {"residual": half(24)},
        r"residual has shape \(24,\); supported: \(2, 5, 24\)",
    ),
    "residual dtype": ("mlp", {"residual": torch.zeros(2, 5, 24, dtype=torch.int32)}, "residual has dtype torch.int32"),
    "residual device": ("mlp", {"residual": torch.zeros(2, 5, 24, device="meta")}, "residual is on meta while"),
    "hidden": ("mlp", {"fc2_weight": half(24, 41)}, r"fc2_weight has shape \(24, 41\); supported: \(any, 40\)"),
    "fc1 bias": ("mlp", {"fc1_bias": half(24)}, r"fc1_bias has shape \(24,\); supported: \(40,\)"),
    "fc2 width": (
        "pre_norm_mlp",
        {"fc2_weight": half(23, 40)},
        r"fc2_weight has shape \(23, 40\); supported: \(24, 40\)",
    ),
    "norm weight": ("pre_norm_mlp", {"norm_weight": half(23)}, r"norm_weight has shape \(23,\); supported: \(24,\)"),
    "norm dtypes": ("pre_norm_mlp", {"norm_bias": torch.zeros(24)}, "norm_bias has dtype torch.float32"),
    "eps": ("pre_norm_mlp", {"eps": -1.0}, "eps is -1.0; supported: finite numbers from 0 on"),
    "qkv dimensions": ("pre_norm_qkv", {"x": half(5, 24)}, r"x has 2 dimensions; supported: 3: \(B, S, width\)"),
    "k weight": ("pre_norm_qkv", {"k_weight": half(8, 24)}, r"k_weight has shape \(8, 24\); supported: \(24, 24\)"),
    "v bias": ("pre_norm_qkv", {"v_bias": half(8)}, r"v_bias has shape \(8,\); supported: \(24,\)"),
    "heads": (
        "pre_norm_qkv",
        {"num_heads": 5},
        "num_heads is 5 while the weights have 24 rows; supported: positive divisors",
    ),
    "no heads": ("pre_norm_qkv", {"num_heads": 0}, "num_heads is 0 while"),
    "attention heads": ("pre_norm_attention", {"num_heads": 5}, "num_heads is 5 while the weights have 24 rows"),
    "head dim": (
        "pre_norm_attention",
        {"num_heads": 6},
        "q_weight has head dim 4; supported: multiples of 8 up to 128",
    ),
    "out weight": ("pre_norm_attention", {"out_weight": half(23, 24)}, r"out_weight has shape \(23, 24\); supported"),
    "no out weight": ("pre_norm_attention", {"out_weight": None}, "out_weight is NoneType; supported: a tensor"),
    "scale": ("pre_norm_attention", {"scale": float("inf")}, "scale is inf; supported: finite numbers"),
    "lengths": ("pre_norm_attention", {"lengths": torch.ones(2)}, "lengths has dtype torch.float32; supported: int32"),
}


def bad_call(operation: str, change: dict[str, object]) -> dict[str, object]:
    tensors = {name: tensor.detach() for name, tensor in parameters(operation, "cpu").items()}
    return {**tensors, **OPTIONS.get(operation, {}), **change}


@pytest.mark.parametrize(("operation", "change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(operation, change, message):
    with pytest.raises(UnsupportedInputError, match=f"^{operation}: {message}"):
        PUBLIC[operation](**bad_call(operation, change))


@pytest.mark.parametrize("name", ["width", "residual", "hidden", "heads"])
def test_bad_input_is_named_by_compiled_code(name):
    operation, change, message = BAD[name]
    torch._dynamo.reset()
    with pytest.raises(UnsupportedInputError, match=f"^{operation}: {message}"):
        torch.compile(PUBLIC[operation], backend="eager")(**bad_call(operation, change))
