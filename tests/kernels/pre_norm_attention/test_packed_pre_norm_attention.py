"""pre_norm_attention over packed sequences: error budget, its parts, registration, compilation, bad input."""

import functools
import math

import pytest
import torch
import torch._dynamo.testing
from error_budget import check_budget, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from siglip_kernels import UnsupportedInputError, attention, linear, pre_norm_attention, pre_norm_qkv, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

OPERATORS = torch.ops.siglip_kernels
HEADS, HEAD_DIM, WIDTH = 2, 24, 40


def boundaries(*lengths: int, device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def random_inputs(tokens: int, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """The operation's tensors, and the gradient of its result."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(tokens, WIDTH) + 0.5, "norm_weight": torch.rand(WIDTH) + 0.5}
    inputs["norm_bias"] = torch.randn(WIDTH)
    for name in ("q", "k", "v", "out"):
        shape = (WIDTH, HEADS * HEAD_DIM) if name == "out" else (HEADS * HEAD_DIM, WIDTH)
        inputs[f"{name}_weight"] = torch.randn(shape) / math.sqrt(shape[1])
        inputs[f"{name}_bias"] = torch.randn(shape[0])
    inputs = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    return inputs, torch.randn(tokens, WIDTH).to(device, dtype)


operation, definition = (
    functools.partial(function, eps=1e-6, num_heads=HEADS)
    for function in (pre_norm_attention, reference.pre_norm_attention)
)


def on_boundaries(cu_seqlens: Tensor, **options: object) -> tuple[functools.partial, functools.partial]:
    options["cu_seqlens"] = cu_seqlens
    return functools.partial(operation, **options), functools.partial(definition, **options)


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 150)), min_size=1, max_size=5),
    unused=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    known=st.booleans(),
)
def test_any_lengths(lengths, unused, dtype, known, device):
    inputs, out_grad = random_inputs(sum(lengths) + unused, dtype, device)
    options = {"max_seqlen": max(lengths)} if known else {}
    # A sequence of one key has gradients of the scores that are zero up to rounding.
    slack = dict.fromkeys(("q_weight", "k_weight", "q_bias", "k_bias"), torch.finfo(dtype).eps * (sum(lengths) + 1))
    found = check_budget(*on_boundaries(boundaries(*lengths, device=device), **options), inputs, out_grad, slack)
    assert not found["k_bias"].any()


@pytest.mark.parametrize("lengths", [[], [0, 0], [0]], ids=str)
@pytest.mark.parametrize("tokens", [0, 3])
def test_tokens_of_no_sequence_attend_to_nothing(lengths, tokens, device):
    inputs, out_grad = random_inputs(tokens, torch.float32, device)
    kernel, _ = on_boundaries(boundaries(*lengths, device=device))
    found = run(kernel, inputs, out_grad, torch.float32)
    assert torch.equal(found["out"], inputs["x"] + inputs["out_bias"])
    assert torch.equal(found["x"], out_grad)
    assert not any(found[name].any() for name in ("q_weight", "v_weight", "v_bias", "norm_weight", "out_weight"))


def test_the_result_is_that_of_the_parts(device):
    inputs, out_grad = random_inputs(90, torch.bfloat16, device)
    cu_seqlens = boundaries(20, 0, 65, device=device)

    def parts(out_weight: Tensor, out_bias: Tensor, **projected: Tensor) -> Tensor:
        q, k, v = (part[0] for part in pre_norm_qkv(projected.pop("x")[None], **projected, eps=1e-6, num_heads=HEADS))
        attended = attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=65)
        return linear(attended.flatten(1), out_weight, out_bias, inputs["x"])

    kernel, _ = on_boundaries(cu_seqlens, max_seqlen=65)
    assert torch.equal(kernel(**inputs), parts(**inputs))
    first, second = (run(kernel, inputs, out_grad, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_gradients_asked_for(device):
    inputs, out_grad = random_inputs(40, torch.bfloat16, device)
    kernel, _ = on_boundaries(boundaries(7, 30, device=device))
    everything = run(kernel, inputs, out_grad, torch.bfloat16)
    for wanted in (("v_bias",), ("k_bias", "q_weight"), ("norm_bias", "out_weight")):
        tensors = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
        gradients = torch.autograd.grad(kernel(**tensors), [tensors[name] for name in wanted], out_grad)
        for name, gradient in zip(wanted, gradients, strict=True):
            torch.testing.assert_close(gradient, everything[name], msg=f"{name} of {wanted}")


def test_operators_check(device):
    inputs, out_grad = random_inputs(70, torch.float16, device)
    x, *norm = (inputs.pop(name).requires_grad_() for name in ("x", "norm_weight", "norm_bias"))
    parameters = [tensor.requires_grad_() for tensor in inputs.values()]
    packing = (0.3, None, boundaries(5, 60, device=device), 60)
    arguments = (x, *norm, 1e-6, *parameters, HEADS, *packing)
    torch.library.opcheck(OPERATORS.pre_norm_attention.default, (*arguments, True))
    with torch.no_grad():
        _, *kept = OPERATORS.pre_norm_attention(*arguments, True)
        weights = torch.cat([inputs[f"{name}_weight"] for name in "qkv"]).detach()
        fixed = (out_grad, x, *norm, 1e-6, *kept, *packing[1:], packing[0], weights, inputs["out_weight"], [True] * 11)
        fixed = tuple(value.detach() if isinstance(value, Tensor) else value for value in fixed)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPERATORS.pre_norm_attention_backward.default, fixed, test_utils=tests)


def test_compiles_once_for_any_number_of_tokens_and_sequences(device):
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operation, fullgraph=True, dynamic=True, backend=frames)
    counts = []
    for lengths in ([5, 65], [3, 20, 40, 9], [40, 0, 31]):
        inputs, out_grad = random_inputs(sum(lengths) + 2, torch.float16, device)
        options = {"cu_seqlens": boundaries(*lengths, device=device), "max_seqlen": max(lengths)}
        found, expected = (
            run(functools.partial(function, **options), inputs, out_grad, torch.float16)
            for function in (compiled, operation)
        )
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        counts.append(frames.frame_count)
    # eps, which dynamic=True first takes for a variable, costs a second look at the first batch.
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 5, WIDTH)}, r"x has 3 dimensions; supported: 2: \(T, width\)"),
        ({"lengths": boundaries(2)}, "lengths is given with cu_seqlens; supported: one of them"),
        ({"cu_seqlens": None, "x": torch.zeros(1, 5, WIDTH)}, "max_seqlen is given without cu_seqlens"),
        ({"cu_seqlens": boundaries(6), "max_seqlen": None}, "cu_seqlens ends with 6; supported: 0 to the 5 tokens"),
        ({"cu_seqlens": boundaries(4, -2)}, "cu_seqlens decreases from 4 to 2"),
        ({"cu_seqlens": boundaries(5).double()}, "cu_seqlens has dtype torch.float64; supported: int32, int64"),
        ({"cu_seqlens": boundaries(5).to("meta")}, "cu_seqlens is on meta while x is on cpu"),
        ({"max_seqlen": 4}, "cu_seqlens has a sequence of 5 tokens while max_seqlen is 4"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_bad_input_is_named(change, message):
    inputs, _ = random_inputs(5, torch.float32, "cpu")
    with pytest.raises(UnsupportedInputError, match="^pre_norm_attention: " + message):
        operation(**{**inputs, "cu_seqlens": boundaries(5), "max_seqlen": 5, **change})
