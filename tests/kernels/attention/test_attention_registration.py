"""Attention as an operator of PyTorch: registration, compilation, autocast, errors."""

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad

from siglip_kernels import UnsupportedInputError, attention
from siglip_kernels.device import precision

OPERATORS = torch.ops.siglip_kernels


def tensors(tokens: int, device: str, dtype: torch.dtype = torch.float16, grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(2, tokens, 2, 24, device=device, dtype=dtype).requires_grad_(grad) for _ in range(3)]


@pytest.mark.parametrize("tokens", [5, 70])
def test_operators_check(tokens, device):
    q, k, v = tensors(tokens, device)
    lengths = torch.tensor([0, 4], dtype=torch.int32, device=device)
    torch.library.opcheck(OPERATORS.attention.default, (q, k, v, lengths, None, True))
    q, k, v = tensors(tokens, device, grad=False)
    out, kept = OPERATORS.attention(q, k, v, None, 0.2, True)
    arguments = (torch.ones_like(out), q, k, v, out, kept, None, 0.2, True, True)
    torch.library.opcheck(OPERATORS.attention_backward.default, arguments)
    torch.library.opcheck(
        OPERATORS.attention_backward.default,
        (*arguments[:-2], False, True),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("tokens", [5, 70])
def test_compiles_as_one_graph_forward_and_backward(tokens, device):
    def block(q, k, v, lengths):
        return attention(2 * q, k, v, lengths=lengths).sin()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([3, 5], dtype=torch.int32, device=device)
    inputs = tensors(tokens, device)
    found = torch.autograd.grad(compiled(*inputs, lengths).sum(), inputs)
    expected = torch.autograd.grad(block(*inputs, lengths).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(*inputs, lengths), block(*inputs, lengths))


def test_compiles_once_for_all_lengths(device):
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=frames)
    for tokens in (70, 80, 90):
        inputs = tensors(tokens, device, grad=False)
        assert torch.equal(compiled(*inputs), attention(*inputs))
    assert frames.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_as_scaled_dot_product_attention(dtype, device):
    q, k, v = tensors(5, device, torch.float32)
    mixed = [q, k.detach().bfloat16(), v]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with torch.autocast(device, dtype):
        out = attention(*mixed)
        assert out.dtype == sdpa(*(tensor.transpose(1, 2) for tensor in (q, k, v))).dtype == dtype
    assert torch.equal(out, attention(*(tensor.to(dtype) for tensor in mixed)))
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.dtype == torch.float32
    with torch.autocast(device, dtype, enabled=False):
        assert attention(q, k.float(), v).dtype == torch.float32


@pytest.mark.parametrize("tokens", [5, 70])
def test_second_derivatives_are_refused(tokens, device):
    q, k, v = tensors(tokens, device, torch.float32)
    (gradient,) = torch.autograd.grad((attention(q, k, v) ** 2).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedInputError, match=r"second derivatives.*eager"):
        gradient.sum().backward()


def test_forward_mode_is_refused(device):
    q, k, v = tensors(5, device, torch.float32, grad=False)
    message = "^attention: {} has a tangent .forward-mode differentiation.; supported: reverse mode"
    with pytest.raises(UnsupportedInputError, match=message.format("q")):
        torch.func.jvp(lambda q: attention(q, k, v), (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(UnsupportedInputError, match=message.format("v")):
        attention(q, k, forward_ad.make_dual(v, v))
    (out, _), (tangent, _) = torch.func.jvp(lambda x: (attention(q, k, v), x), (v,), (v,))
    assert torch.equal(out, attention(q, k, v)) and (tangent == 0).all()


def test_a_forward_that_kept_nothing_has_no_backward(device):
    q, k, v = tensors(70, device)
    out, _ = OPERATORS.attention(q, k, v, None, None, False)
    with pytest.raises(UnsupportedInputError, match="keep_for_backward was False"):
        out.sum().backward()


@pytest.mark.parametrize(("asked", "expected"), [("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")])
def test_products_of_fp32_follow_the_newer_setting(asked, expected, device):
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = asked
    try:
        assert precision(torch.float32) == expected
        assert precision(torch.bfloat16) == "ieee"
        assert attention(*tensors(5, device, torch.float32)).isfinite().all()
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize("allowed", [True, False])
def test_products_of_fp32_follow_the_older_setting(allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        assert precision(torch.float32) == ("tf32" if allowed else "ieee")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_shapes_without_data():
    q, k, v = (torch.empty(2, 70, 2, 72, device="meta", dtype=torch.bfloat16) for _ in range(3))
    out = attention(q, k, v)
    assert out.is_meta and out.shape == q.shape and out.dtype == q.dtype


def good() -> dict[str, object]:
    return {name: torch.zeros(2, 5, 2, 24, dtype=torch.float16) for name in ("q", "k", "v")}


def with_head_dim(head_dim: int) -> dict[str, object]:
    return {name: torch.zeros(2, 5, 2, head_dim) for name in ("q", "k", "v")}


HALF = torch.float16
BAD = {
    "rank of q": ({"q": torch.zeros(2, 5, 24, dtype=HALF)}, "q has 3 dimensions; supported: 4"),
    "rank of v": ({"v": torch.zeros(1, 2, 5, 2, 24, dtype=HALF)}, "v has 5 dimensions; supported: 4"),
    "batch": ({"k": torch.zeros(3, 5, 2, 24, dtype=HALF)}, "k has batch size 3 while q has 2; supported: the same"),
    "broadcast batch": ({"v": torch.zeros(1, 5, 2, 24, dtype=HALF)}, "v has batch size 1 while q has 2"),
    "heads": ({"k": torch.zeros(2, 5, 1, 24, dtype=HALF)}, "k has number of heads 1 while q has 2"),
    "head dim": ({"v": torch.zeros(2, 5, 2, 16, dtype=HALF)}, "v has head dim 16 while q has 24"),
    "keys and values": ({"v": torch.zeros(2, 6, 2, 24, dtype=HALF)}, "v has 6 tokens while k has 5"),
    "head dim 20": (with_head_dim(20), "q has head dim 20; supported: multiples of 8 up to 128"),
    "head dim 136": (with_head_dim(136), "q has head dim 136; supported: multiples of 8 up to 128"),
    "head dim 0": (with_head_dim(0), "q has head dim 0; supported: multiples of 8 up to 128"),
    "integers": (
        {name: torch.zeros(2, 5, 2, 24, dtype=torch.int32) for name in ("q", "k", "v")},
        "q has dtype torch.int32; supported: float32, float16, bfloat16",
    ),
    "fp64": ({"v": torch.zeros(2, 5, 2, 24, dtype=torch.float64)}, "v has dtype torch.float64; supported: float32"),
    "mixed": ({"k": torch.zeros(2, 5, 2, 24)}, "k has dtype torch.float32 while q has torch.float16"),
    "device": ({"k": torch.zeros(2, 5, 2, 24, dtype=HALF, device="meta")}, "k is on meta while q is on cpu"),
    "int64 lengths": ({"lengths": torch.tensor([5, 5])}, "lengths has dtype torch.int64; supported: int32"),
    "lengths of other size": (
        {"lengths": torch.tensor([5], dtype=torch.int32)},
        r"lengths has shape \(1,\) while the batch size is 2; supported: \(B,\)",
    ),
    "lengths of two axes": ({"lengths": torch.zeros(2, 1, dtype=torch.int32)}, r"lengths has shape \(2, 1\)"),
    "lengths elsewhere": (
        {"lengths": torch.zeros(2, dtype=torch.int32, device="meta")},
        "lengths is on meta while q is on cpu; supported: one device",
    ),
    "scale": ({"scale": float("nan")}, "scale is nan; supported: finite numbers"),
    "scale beyond fp32": ({"scale": -1e39}, r"scale is -1e\+39; supported: finite numbers, smaller than 2\^127"),
    "scale beyond fp64": ({"scale": 10**400}, "scale is 10000"),
    "scale as a tensor": ({"scale": torch.tensor(0.5)}, "scale is a Tensor; supported: numbers"),
    "no tensor": ({"k": None}, "k is NoneType; supported: a tensor"),
    "lengths as a list": ({"lengths": [5, 5]}, "lengths is list; supported: a tensor"),
    "sparse": ({"v": torch.zeros(2, 5, 2, 24, dtype=HALF).to_sparse()}, "v has layout torch.sparse_coo"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, message):
    with pytest.raises(UnsupportedInputError, match="^attention: " + message):
        attention(**{**good(), **change})
    with pytest.raises(NotImplementedError):
        attention(**{**good(), **change})


@pytest.mark.parametrize(
    "name",
    [
        *("rank of q", "batch", "heads", "head dim", "keys and values", "head dim 20", "head dim 136", "integers"),
        *("mixed", "int64 lengths", "lengths of other size", "lengths as a list", "scale", "scale as a tensor"),
    ],
)
def test_bad_input_is_named_by_compiled_code(name):
    change, message = BAD[name]
    torch._dynamo.reset()
    with pytest.raises(UnsupportedInputError, match="^attention: " + message):
        torch.compile(attention, backend="eager")(**{**good(), **change})
    with pytest.raises(Exception, match="attention: " + message):
        torch.compile(attention, backend="eager", fullgraph=True)(**{**good(), **change})


def test_there_is_no_mask_and_no_dropout():
    for argument in ("mask", "dropout"):
        with pytest.raises(TypeError, match=argument):
            attention(**good(), **{argument: 0.1})


_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, siglip_kernels
x = torch.zeros(1, 2, 1, 8)
assert siglip_kernels.reference.attention(x, x, x).shape == x.shape
assert siglip_kernels.attention(x.to("meta"), x.to("meta"), x.to("meta")).shape == x.shape
try:
    siglip_kernels.attention(x, x, x)
except siglip_kernels.MissingBackendError:
    print("refused")
"""


def test_importing_needs_no_triton(run_python):
    done = run_python(_WITHOUT_TRITON)
    assert done.stdout == "refused\n", done.stderr


def test_importing_loads_no_triton(run_python):
    done = run_python("import sys, siglip_kernels; print('triton' in sys.modules)")
    assert done.stdout == "False\n", done.stderr
