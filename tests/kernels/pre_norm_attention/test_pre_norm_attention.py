"""pre_norm_attention: error budget, padding, gradients of biases, what is kept, repeatability."""

import functools
import math

import pytest
import torch
from error_budget import check_budget, run
from torch import Tensor

from siglip_kernels import attention, linear, pre_norm_attention, pre_norm_qkv, reference
from siglip_kernels.attention.dispatch import launch_backward, launch_forward

pytestmark = pytest.mark.usefixtures("poisoned_empty", "seed")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS, HEAD_DIM, WIDTH = 3, 8, 40
SHORT, LONG = 7, 70  # tokens of the two kinds of attention kernels


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def random_inputs(
    tokens: int, dtype: torch.dtype, device: str, *, batch: int = 2, columns: int = HEADS * HEAD_DIM
) -> tuple[dict[str, Tensor], Tensor]:
    """The operation's tensors, and the gradient of its result."""
    inputs = {
        "x": torch.randn(batch, tokens, WIDTH) + 0.5,
        "norm_weight": torch.rand(WIDTH) + 0.5,
        "norm_bias": torch.randn(WIDTH),
    }
    for name, shape in [*dict.fromkeys("qkv", (columns, WIDTH)).items(), ("out", (WIDTH, columns))]:  # in one order
        inputs[f"{name}_weight"] = torch.randn(shape) / math.sqrt(shape[1])
        inputs[f"{name}_bias"] = torch.randn(shape[0])
    inputs = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    return inputs, torch.randn(batch, tokens, WIDTH).to(device, dtype)


def functions(**options: object) -> tuple[functools.partial, functools.partial]:
    """The operation and its definition."""
    options = {"eps": 1e-6, "num_heads": HEADS, **options}
    return functools.partial(pre_norm_attention, **options), functools.partial(reference.pre_norm_attention, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [SHORT, LONG])
@pytest.mark.parametrize("padded", [False, True])
def test_budget(tokens, padded, dtype, device):
    """With padding, one sample has no valid key."""
    lengths = torch.tensor([tokens - 2, 0], dtype=torch.int32, device=device) if padded else None
    found = check_budget(*functions(lengths=lengths), *random_inputs(tokens, dtype, device))
    assert not found["k_bias"].any()


def test_scale_and_head_dims(device):
    inputs, out_grad = random_inputs(5, torch.bfloat16, device, columns=144)
    check_budget(*functions(num_heads=2, scale=0.3), inputs, out_grad)


@pytest.mark.parametrize("without", [("k_bias",), ("q_bias", "k_bias", "v_bias", "out_bias")], ids=str)
def test_without_some_biases(without, device):
    inputs, out_grad = random_inputs(LONG, torch.bfloat16, device)
    given = {name: tensor for name, tensor in inputs.items() if name not in without}
    check_budget(*functions(**dict.fromkeys(without)), given, out_grad)


def test_the_result_is_that_of_the_parts(device):
    inputs, _ = random_inputs(LONG, torch.bfloat16, device)
    projected = {name: tensor for name, tensor in inputs.items() if not name.startswith("out")}
    q, k, v = pre_norm_qkv(**projected, eps=1e-6, num_heads=HEADS)
    out = linear(attention(q, k, v).flatten(2), inputs["out_weight"], inputs["out_bias"], inputs["x"])
    assert torch.equal(functions()[0](**inputs), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_in_fp32_beside_half_precision(dtype, device):
    inputs, out_grad = random_inputs(SHORT, dtype, device)
    inputs |= {name: inputs[name].float() for name in ("norm_weight", "norm_bias")}
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    kernel, definition = functions()
    out = kernel(**tensors)
    exact = run(definition, inputs, out_grad, torch.float64)
    gradients = torch.autograd.grad(out, list(tensors.values()), out_grad)
    for name, found in {"out": out, **dict(zip(tensors, gradients, strict=True))}.items():
        assert found.dtype == (torch.float32 if name.startswith("norm") else dtype), name
        assert (found.double() - exact[name]).norm() <= 3 * torch.finfo(dtype).eps * exact[name].norm() + 1e-12, name


@pytest.mark.parametrize("tokens", [SHORT, pytest.param(LONG, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("padded", [False, True])
def test_only_the_gradients_asked_for(tokens, padded, device):
    inputs, out_grad = random_inputs(tokens, torch.bfloat16, device)
    lengths = torch.tensor([3, tokens], dtype=torch.int32, device=device) if padded else None
    kernel, _ = functions(lengths=lengths)
    everything = run(kernel, inputs, out_grad, torch.bfloat16)
    pairs = (("x", "v_bias"), ("norm_bias", "out_bias"), ("q_weight", "k_bias"), ("k_weight", "v_weight", "q_bias"))
    for wanted in (*((name,) for name in inputs), *pairs):
        tensors = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
        gradients = torch.autograd.grad(kernel(**tensors), [tensors[name] for name in wanted], out_grad)
        for name, gradient in zip(wanted, gradients, strict=True):
            torch.testing.assert_close(gradient, everything[name], msg=f"{name} of {wanted}")


@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced"])
def test_views_of_x_and_of_the_gradient(kind, device):
    inputs, out_grad = random_inputs(SHORT, torch.float16, device)

    def view(x: Tensor) -> Tensor:
        if kind == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return x[:1].expand(x.shape) if kind == "expanded" else torch.cat([x, x], 2)[..., WIDTH:]

    kernel, _ = functions()
    inputs["x"], out_grad = view(inputs["x"]), view(out_grad)
    found = run(kernel, inputs, out_grad, torch.float16)
    copies = {name: tensor.contiguous() for name, tensor in inputs.items()}
    for name, expected in run(kernel, copies, out_grad.contiguous(), torch.float16).items():
        torch.testing.assert_close(found[name], expected, msg=name)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 7), (2, 0)])
def test_nothing_to_do(batch, tokens, device):
    inputs, out_grad = random_inputs(tokens, torch.float16, device, batch=batch)
    found, expected = (run(function, inputs, out_grad, torch.float16) for function in functions())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("tokens", [SHORT, LONG])
def test_bitwise_repeatable(tokens, device):
    inputs, out_grad = random_inputs(tokens, torch.bfloat16, device)
    first, second = (run(functions()[0], inputs, out_grad, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tokens", [SHORT, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_gradients_are_those_of_separate_tensors(tokens, dtype, device):
    """Bit for bit, and parts that are not needed are left as they were."""
    packed, out_grad = (torch.randn(2, tokens, n, HEADS, HEAD_DIM, device=device).to(dtype) for n in (3, 1))
    q, k, v = packed.unbind(2)
    out, log_sum_exp = launch_forward(q, k, v, None, None, True)
    arguments = (out_grad.squeeze(2), q, k, v, out, log_sum_exp, None, None)
    separate = launch_backward(*arguments, True, True)
    for needs in ((True, True), (True, False), (False, True)):
        packed_grad = torch.full_like(packed, 7)
        launch_backward(*arguments, *needs, packed_grad)
        for part, expected, needed in zip(packed_grad.unbind(2), separate, (needs[0], *needs[1:] * 2), strict=True):
            assert torch.equal(part, expected if needed else torch.full_like(expected, 7))


def kept_bytes(tokens: int, wanted: tuple[str, ...], device: str) -> int:
    """What autograd keeps for the backward, without the parameters."""
    inputs, _ = random_inputs(tokens, torch.bfloat16, device)
    tensors = {name: tensor.requires_grad_(name in wanted) for name, tensor in inputs.items()}
    skip = {tensor.data_ptr() for name, tensor in tensors.items() if name != "x"}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in skip:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = functions()[0](**tensors)
    del out
    return sum(kept.values())


def test_what_is_kept(device):
    everything = tuple(random_inputs(1, torch.bfloat16, device)[0])
    statistics = 2 * LONG * (2 + HEADS) * 4
    assert kept_bytes(LONG, everything, device) == 2 * LONG * (WIDTH + 4 * HEADS * HEAD_DIM) * 2 + statistics
    assert kept_bytes(LONG, (), device) == 0
