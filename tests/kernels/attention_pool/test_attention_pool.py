"""Pooling by attention: error budget, shapes, lengths, adversarial values, registration, and what bad input gets."""

import functools
import itertools

import pytest
import torch
from error_budget import check_budget, run
from torch import Tensor

from siglip_kernels import UnsupportedInputError, attention_pool, reference
from siglip_kernels.attention_pool import folded_attention_pool
from siglip_kernels.attention_pool.config import fits
from siglip_kernels.attention_pool.kernels import attention_pool_forward
from siglip_kernels.device import Facts, pretend

pytestmark = pytest.mark.usefixtures("poisoned_empty", "seed")

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
OPERATORS = torch.ops.siglip_kernels
H200 = Facts("NVIDIA H200", (9, 0), 132, 232_448, 50 * 2**20)


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def random_inputs(
    batch: int, tokens: int, width: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], Tensor]:
    shapes = {
        "x": (batch, tokens, width),
        "probe": (1, 1, width),
        "in_proj_weight": (3 * width, width),
        "in_proj_bias": (3 * width,),
        "out_proj_weight": (width, width),
        "out_proj_bias": (width,),
    }
    inputs = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    for name in ("in_proj_weight", "out_proj_weight"):
        inputs[name] /= width**0.5
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}, torch.randn(batch, width, device=device).to(
        dtype
    )


def check(
    inputs: dict[str, Tensor], out_grad: Tensor, num_heads: int, lengths: Tensor | None = None, **slack: float
) -> dict[str, Tensor]:
    kernel, definition = (
        functools.partial(function, num_heads=num_heads, lengths=lengths)
        for function in (attention_pool, reference.attention_pool)
    )
    found = check_budget(kernel, definition, inputs, out_grad, slack)
    width = inputs["x"].shape[2]
    assert not found["in_proj_bias"][width : 2 * width].any()  # the keys' bias changes no softmax
    return found


@pytest.mark.parametrize("tokens", [2, 17, 63, 64, 65, 196, 257])
def test_lengths_of_sequences(tokens, device):
    check(*random_inputs(2, tokens, 48, torch.bfloat16, device), 3)
    check(*random_inputs(1, tokens, 64, torch.float16, device), 1)


@pytest.mark.parametrize(("width", "heads"), [(8, 8), (17, 1), (72, 1), (128, 2), (136, 17), (300, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_and_heads(width, heads, dtype, device):
    check(*random_inputs(2, 70, width, dtype, device), heads)


@pytest.mark.parametrize(
    ("tokens", "width", "heads", "dtype"),
    [(50, 768, 12, torch.bfloat16), (40, 1152, 16, torch.float16), (20, 1664, 16, torch.bfloat16)],
    ids=str,
)
def test_heads_of_models(tokens, width, heads, dtype, device):
    """The last is too wide for the kernels, and is made of PyTorch's products."""
    inputs, out_grad = random_inputs(1, tokens, width, dtype, device)
    assert fits(inputs["x"], heads) == (width < 1664)
    check(inputs, out_grad, heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_token(dtype, device):
    """Its weight is 1 whatever the scores are: nothing but rounding reaches the probe."""
    inputs, out_grad = random_inputs(2, 1, 48, dtype, device)
    rounding = 48 * torch.finfo(dtype).eps * out_grad.float().norm().item()
    check(inputs, out_grad, 3, probe=rounding, x=rounding, in_proj_weight=rounding, in_proj_bias=rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [20, 130])
def test_lengths(tokens, dtype, device):
    inputs, out_grad = random_inputs(5, tokens, 48, dtype, device)
    lengths = torch.tensor([0, 2, tokens - 1, tokens, 17], dtype=torch.int32, device=device)
    found = check(inputs, out_grad, 3, lengths)
    assert torch.equal(found["out"][0], inputs["out_proj_bias"])
    for sample, length in enumerate(lengths.tolist()):
        assert not found["x"][sample, length:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_is_never_read(dtype, device):
    inputs, out_grad = random_inputs(2, 70, 48, dtype, device)
    lengths = torch.tensor([5, 66], dtype=torch.int32, device=device)
    function = functools.partial(attention_pool, num_heads=3, lengths=lengths)
    clean = run(function, inputs, out_grad, dtype)
    for sample, length in enumerate((5, 66)):
        inputs["x"][sample, length:] = float("nan")
    for name, found in run(function, inputs, out_grad, dtype).items():
        assert torch.equal(found, clean[name]), name


def test_lengths_are_taken_into_range(device):
    inputs, out_grad = random_inputs(2, 20, 48, torch.float16, device)
    results = []
    for lengths in ((-3, 1000), (0, 20)):
        valid = torch.tensor(lengths, dtype=torch.int32, device=device)
        results.append(
            run(functools.partial(attention_pool, num_heads=3, lengths=valid), inputs, out_grad, torch.float16)
        )
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_are_split_over_a_large_gpu(padded, dtype, device, monkeypatch):
    """Few samples: several programs share one, and what each made is combined."""
    inputs, out_grad = random_inputs(2, 300, 48, dtype, device)
    lengths = torch.tensor([0, 90], dtype=torch.int32, device=device) if padded else None
    with pretend(H200):
        check(inputs, out_grad, 3, lengths)
        monkeypatch.setattr(torch, "empty", lambda *_, empty=torch.empty, **o: calls.append(_) or empty(*_, **o))
        calls: list[tuple] = []
        attention_pool_forward(inputs["x"], inputs["x"][0, :3].contiguous(), 1.0, lengths)
    assert ((5, 2, 3, 48),) in calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [80.0, 1e4])
def test_large_logits(magnitude, dtype, device):
    inputs, out_grad = random_inputs(2, 70, 64, dtype, device)
    inputs["probe"] *= magnitude / 10
    inputs["in_proj_bias"].zero_()
    # Where one token has all of the weight, eager's gradient of the probe is 0, and this one 0 up to rounding.
    rounding = torch.finfo(dtype).eps * out_grad.float().norm().item()
    check(inputs, out_grad, 2, probe=rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tokens(dtype, device):
    inputs, out_grad = random_inputs(2, 70, 48, dtype, device)
    inputs["x"] = inputs["x"][:, :1].expand(-1, 70, -1).contiguous()
    rounding = 70 * torch.finfo(dtype).eps * out_grad.float().norm().item()
    check(inputs, out_grad, 3, probe=rounding, x=rounding, in_proj_weight=rounding, in_proj_bias=rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_mean(dtype, device):
    inputs, out_grad = random_inputs(2, 70, 48, dtype, device)
    inputs["x"] = inputs["x"] + 30
    check(inputs, out_grad, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_huge_outlier(dtype, device):
    inputs, out_grad = random_inputs(2, 70, 64, dtype, device)
    inputs["x"][1, 40, 3] = 1e3
    check(inputs, out_grad, 2)


def test_integers_whose_answer_is_exact(device):
    """No query: the average of all tokens, a power of two of them."""
    x = torch.randint(-8, 8, (2, 64, 48), device=device).half()
    eye, zeros = torch.eye(48, device=device).half(), torch.zeros(48, device=device).half()
    weights = torch.cat([torch.zeros_like(eye), torch.zeros_like(eye), eye])
    found = attention_pool(x, zeros.view(1, 1, 48), weights, torch.zeros(144, device=device).half(), eye, zeros, 3)
    assert torch.equal(found, x.float().mean(1).half())


def test_not_a_number_stays_in_its_sample(device):
    inputs, _ = random_inputs(3, 70, 48, torch.float16, device)
    inputs["x"][1, 3, 1] = float("nan")
    out = attention_pool(**inputs, num_heads=3)
    assert out[1].isnan().all() and out.isnan().sum() == 48


@pytest.mark.parametrize(
    "kind", ["sliced tokens", "sliced columns", "tokens first", "transposed", "expanded", "unaligned"]
)
def test_views_equal_their_contiguous_copies(kind, device):
    make = lambda *shape: torch.randn(shape, device=device).bfloat16()  # noqa: E731
    inputs, out_grad = random_inputs(2, 20, 48, torch.bfloat16, device)
    inputs["x"] = {
        "sliced tokens": make(2, 25, 48)[:, 5:],
        "sliced columns": make(2, 20, 96)[:, :, 48:],
        "tokens first": make(20, 2, 48).transpose(0, 1),
        "transposed": make(2, 48, 20).transpose(1, 2),
        "expanded": make(1, 20, 48).expand(2, -1, -1),
        "unaligned": make(2, 20, 49)[:, :, 1:],
    }[kind]
    parameters = {name: tensor for name, tensor in inputs.items() if name != "x"}
    transposed = {name: t.mT.contiguous().mT if t.dim() == 2 else t for name, t in parameters.items()}
    function = functools.partial(attention_pool, num_heads=3)
    views = run(function, inputs, out_grad, torch.bfloat16)
    copies = run(function, {**transposed, "x": inputs["x"].contiguous()}, out_grad, torch.bfloat16)
    assert torch.equal(views["x"], copies["x"]) and torch.equal(views["out"], copies["out"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(dtype, device):
    inputs, out_grad = random_inputs(3, 130, 48, dtype, device)
    function = functools.partial(attention_pool, num_heads=3)
    first, second = (run(function, inputs, out_grad, dtype) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_only_the_gradients_asked_for(dtype, device):
    inputs, out_grad = random_inputs(2, 20, 48, dtype, device)
    everything = run(functools.partial(attention_pool, num_heads=3), inputs, out_grad, dtype)
    for needed in (*inputs, None):
        names = inputs if needed is None else (needed,)
        tensors = {name: tensor.detach().requires_grad_(name in names) for name, tensor in inputs.items()}
        attention_pool(**tensors, num_heads=3).backward(out_grad)
        for name, tensor in tensors.items():
            assert torch.equal(tensor.grad, everything[name]) if name in names else tensor.grad is None
    x, folded = inputs["x"], inputs["x"][0, :3]
    pooled, *statistics = OPERATORS.attention_pool(x, folded, 0.3, None)
    for wanted in itertools.product((False, True), repeat=2):
        made = OPERATORS.attention_pool_backward(pooled, x, folded, pooled, *statistics, 0.3, None, *wanted)
        assert [gradient.numel() > 0 for gradient in made] == list(wanted)


def test_nothing_as_large_as_the_tokens_is_kept(device):
    inputs, _ = random_inputs(2, 200, 48, torch.bfloat16, device)
    x, *others = (tensor.requires_grad_() for tensor in inputs.values())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        attention_pool(x, *others, num_heads=3)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *others)}
    fresh = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in known]
    assert fresh and sum(tensor.numel() for tensor in fresh) < x.numel() / 4


@pytest.mark.parametrize("shape", [(0, 5, 48), (2, 0, 48), (0, 0, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nothing_to_do(shape, dtype, device):
    inputs, out_grad = random_inputs(*shape, dtype, device)
    lengths = torch.full(shape[:1], 3, dtype=torch.int32, device=device)
    for valid in (None, lengths):
        results = [
            run(functools.partial(function, num_heads=3, lengths=valid), inputs, out_grad, dtype)
            for function in (attention_pool, reference.attention_pool)
        ]
        for name, expected in results[1].items():
            assert torch.equal(results[0][name], expected), name


def test_folded_attention_pool_is_the_same(device):
    inputs, out_grad = random_inputs(3, 20, 48, torch.float32, device)
    for lengths in (None, torch.tensor([0, 7, 20], dtype=torch.int32, device=device)):
        functions = (
            functools.partial(function, num_heads=3, lengths=lengths)
            for function in (folded_attention_pool, reference.attention_pool)
        )
        check_budget(*functions, inputs, out_grad)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_as_the_reference(dtype, device):
    inputs, _ = random_inputs(2, 20, 48, torch.float32, device)
    inputs["x"] = inputs["x"].bfloat16()
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with torch.autocast(device, dtype):
        out = attention_pool(**tensors, num_heads=3)
        assert out.dtype == reference.attention_pool(**tensors, num_heads=3).dtype == dtype
    assert torch.equal(out, attention_pool(**{name: t.to(dtype) for name, t in tensors.items()}, num_heads=3))
    gradients = torch.autograd.grad(out.sum(), tensors.values())
    for gradient, tensor in zip(gradients, tensors.values(), strict=True):
        assert gradient.dtype == tensor.dtype


@pytest.mark.parametrize("tokens", [20, 0])
def test_backward_inside_autocast(tokens, device):
    """The operator's own products stay in fp32; those of the projections around it are PyTorch's, and autocast."""
    x, folded = (torch.randn(shape, device=device, requires_grad=True) for shape in ((2, tokens, 48), (3, 48)))
    results = []
    for enabled in (False, True):
        pooled = OPERATORS.attention_pool(x, folded, 0.3, None)[0]
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(pooled.square().sum(), (x, folded)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_32_bits(device):
    """The second sample, and the last token, begin after 2^31 elements."""
    step = 2**31 + 8
    if device == "cpu":
        try:
            storage = torch.from_file(_sparse_file(2 * (step + 512)), size=step + 512, dtype=torch.float16)
        except (OSError, RuntimeError) as error:
            pytest.skip(f"no sparse file of 4 GB: {error}")
    else:
        storage = torch.empty(step + 512, dtype=torch.float16, device=device)
    near = torch.randn(2, 3, 64, device=device).half()
    folded = torch.randn(2, 64, device=device).half()
    for samples, strides in ((2, (step, 64, 1)), (1, (64, step // 16 * 8, 1))):
        far = storage.as_strided((samples, 3, 64), strides).copy_(near[:samples])
        expected = OPERATORS.attention_pool(near[:samples], folded, 0.3, None)
        pooled, *statistics = OPERATORS.attention_pool(far, folded, 0.3, None)
        assert all(torch.equal(a, b) for a, b in zip((pooled, *statistics), expected, strict=True))
        both = [
            OPERATORS.attention_pool_backward(pooled, x, folded, pooled, *statistics, 0.3, None, True, True)
            for x in (near[:samples], far)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def _sparse_file(size: int) -> str:
    import tempfile

    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.truncate(size)
    return file.name


def test_operators_check(device):
    x = torch.randn(2, 20, 48, device=device).half().requires_grad_()
    folded = torch.randn(3, 48, device=device).half().requires_grad_()
    lengths = torch.tensor([0, 4], dtype=torch.int32, device=device)
    torch.library.opcheck(OPERATORS.attention_pool.default, (x, folded, 0.3, lengths))
    x, folded = x.detach(), folded.detach()
    pooled, *statistics = OPERATORS.attention_pool(x, folded, 0.3, lengths)
    for dtype in (torch.float16, torch.float32):
        arguments = [tensor.to(dtype) for tensor in (pooled, x, folded, pooled)]
        torch.library.opcheck(
            OPERATORS.attention_pool_backward.default,
            (*arguments, *statistics, 0.3, lengths, True, False),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiles_as_one_graph_forward_and_backward(device):
    def block(*tensors):
        return attention_pool(*tensors, num_heads=3).sin()

    inputs, _ = random_inputs(2, 20, 48, torch.float16, device)
    tensors = [tensor.requires_grad_() for tensor in inputs.values()]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    expected = torch.autograd.grad(block(*tensors).sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiles_for_any_batch_and_length(device):
    compiled = torch.compile(attention_pool, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in ((2, 20), (3, 33)):
        inputs, _ = random_inputs(batch, tokens, 48, torch.float16, device)
        assert torch.equal(compiled(**inputs, num_heads=3), attention_pool(**inputs, num_heads=3))


def test_second_derivatives_are_refused(device):
    x = torch.randn(2, 20, 48, device=device).half().requires_grad_()
    pooled = OPERATORS.attention_pool(x, x[0, :3], 0.3, None)[0]
    (gradient,) = torch.autograd.grad((pooled**2).sum(), x, create_graph=True)
    with pytest.raises(UnsupportedInputError, match=r"second derivatives.*eager"):
        gradient.sum().backward()


def test_shapes_without_data():
    inputs, _ = random_inputs(2, 729, 1152, torch.bfloat16, "meta")
    out = attention_pool(**inputs, num_heads=16)
    assert out.is_meta and out.shape == (2, 1152) and out.dtype == torch.bfloat16


GOOD = dict(random_inputs(2, 5, 24, torch.float32, "cpu")[0], num_heads=3)
BAD = {
    "list": ({"x": [1.0]}, "x is list; supported: a tensor"),
    "no bias": ({"in_proj_bias": None}, "in_proj_bias is NoneType; supported: a tensor"),
    "one sample": ({"x": torch.zeros(5, 24)}, r"x has 2 dimensions; supported: 3: \(B, S, width\)"),
    "fp64": ({"x": torch.zeros(2, 5, 24).double()}, "x has dtype torch.float64; supported: float32, float16, bfloat16"),
    "mixed": ({"probe": torch.zeros(1, 1, 24).half()}, "probe has dtype torch.float16 while x has torch.float32; supp"),
    "probe": (
        {"probe": torch.zeros(1, 24)},
        r"probe has shape \(1, 24\); supported: \(1, 1, 24\)",
    ),
    "projection": (
        {"in_proj_weight": torch.zeros(72, 25)},
        r"in_proj_weight has shape \(72, 25\); supported: \(72, 24\)",
    ),
    "bias": (
        {"out_proj_bias": torch.zeros(1)},
        r"out_proj_bias has shape \(1,\); supported: \(24,\)",
    ),
    "heads": ({"num_heads": 5}, "num_heads is 5 while x has width 24; supported: divisors of it"),
    "no head": ({"num_heads": 0}, "num_heads is 0; supported: positive integers"),
    "half a head": ({"num_heads": 1.5}, "num_heads is 1.5; supported: positive integers"),
    "true heads": ({"num_heads": True}, "num_heads is True; supported: positive integers"),
    "device": ({"probe": torch.zeros(1, 1, 24, device="meta")}, "probe is on meta while x is on cpu; supported: one"),
    "int64 lengths": ({"lengths": torch.tensor([5, 5])}, "lengths has dtype torch.int64; supported: int32"),
    "list of lengths": ({"lengths": [5, 5]}, "lengths is list; supported: a tensor"),
    "lengths": (
        {"lengths": torch.tensor([5], dtype=torch.int32)},
        r"lengths has shape \(1,\) while the batch size is 2",
    ),
    "lengths elsewhere": (
        {"lengths": torch.zeros(2, dtype=torch.int32, device="meta")},
        "lengths is on meta while x is on cpu; supported: one device",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, message):
    with pytest.raises(UnsupportedInputError, match="^attention_pool: " + message):
        attention_pool(**{**GOOD, **change})


@pytest.mark.parametrize("name", ["one sample", "mixed", "projection", "heads", "lengths"])
def test_bad_input_is_named_by_compiled_code(name):
    change, message = BAD[name]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="attention_pool: " + message):
        torch.compile(attention_pool, backend="eager", fullgraph=True)(**{**GOOD, **change})
