"""The options of the sigmoid loss: groups, offsets, weights, reductions, any width; against the definition in fp64."""

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from error_budget import check_error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from siglip_kernels import (
    SigLIPPlusLoss,
    UnsupportedInputError,
    chunked_sigmoid_loss,
    plain_sigmoid_loss,
    reference,
    sigmoid_loss,
)
from siglip_kernels.integrations import siglip_kernel
from siglip_kernels.sigmoid_loss import api, torch_engine
from siglip_kernels.sigmoid_loss.pairs import make_pairs, matches, plus_weights

LOSSES = {"triton": sigmoid_loss, "chunked": chunked_sigmoid_loss}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=LOSSES)
def loss_function(request, monkeypatch):
    # Small blocks, so that most sizes below span several of them.
    monkeypatch.setattr(torch_engine, "_CPU_BLOCK", (48, 40))
    return LOSSES[request.param]


def embeddings(images: int, texts: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(images + texts + width)
    x, y = (F.normalize(torch.randn(n, width, generator=generator), dim=-1).to(device) for n in (images, texts))
    return x, y


def upstream(loss: Tensor) -> Tensor:
    """An upstream gradient of either sign."""
    return torch.linspace(-1, 2, loss.numel(), device=loss.device).reshape(loss.shape).to(loss.dtype)


def results(function, x: Tensor, y: Tensor, dtype: torch.dtype, t: float, b: float, **options: Any) -> dict:
    """Loss and the four gradients, from inputs in this dtype; of losses of images, the gradients of a weighted sum."""
    inputs = [v.detach().to(dtype).requires_grad_() for v in (x, y)]
    for value in (t, b):
        scalar = torch.tensor([value], dtype=torch.promote_types(dtype, torch.float32), device=x.device)
        inputs.append(scalar.requires_grad_())
    loss = function(*inputs, **options)
    gradients = torch.autograd.grad(loss, inputs, upstream(loss))
    return dict(zip(("loss", "image", "text", "scale", "bias"), (loss.detach(), *gradients), strict=True))


def check_budget(
    function, x: Tensor, y: Tensor, dtype: torch.dtype, t: float = 10.0, b: float = -8.0, **options: Any
) -> dict:
    """The error budget, with two roundings, of the loss and its gradients."""
    x, y = x.to(dtype), y.to(dtype)
    exact = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    true = results(reference.sigmoid_loss, x, y, torch.float64, t, b, **exact)
    eager = results(reference.sigmoid_loss, x, y, dtype, t, b, **options)
    found = results(function, x, y, dtype, t, b, **options)
    # Gradients are sums of terms of either sign: a rounding is relative to the sum of their magnitudes. The definition
    # takes a bias for every pair, whose gradients are the terms.
    x, y, biases = x.double(), y.double(), torch.full((len(y), len(x)), b, dtype=torch.float64, device=x.device)
    loss = reference.sigmoid_loss(x, y, t, biases.requires_grad_(), **exact)
    g = torch.autograd.grad(loss, biases, upstream(loss), retain_graph=True)[0].abs().T

    def sizes(g: Tensor) -> dict[str, Tensor]:
        return {
            "scale": (g * (x @ y.T).abs()).sum(),
            "bias": g.sum(),
            "image": t * (g @ y.abs()).norm(),
            "text": t * (g.T @ x.abs()).norm(),
        }

    # A rounding of a logit s, which is fp32 in any case, changes e^s by |s| roundings; of few pairs, all one way.
    logits = (t * x @ y.T + b).abs()
    of_terms, of_logits = sizes(g), sizes(g * logits)
    of_pairs = torch.autograd.grad(loss, biases, torch.ones_like(loss))[0].abs().T
    of_logits["loss"] = (of_pairs * logits).sum()
    for name, value in found.items():
        assert value.isfinite().all(), name
        slack = torch.finfo(value.dtype).tiny + float(of_logits.get(name, 0.0)) * torch.finfo(torch.float32).eps
        size = of_terms.get(name, 0.0)
        check_error(value, eager[name], true[name], name, roundings=2, size=size, slack=slack)
    return found


@st.composite
def problems(draw) -> dict[str, Any]:
    """Sizes, groups with and without positives, weights with zeros, and a reduction."""
    images, texts, width = (draw(st.integers(1, most)) for most in (80, 90, 40))
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["images", "pairs", "sum", "none"]))}
    kind = draw(st.sampled_from(["groups", "offset", "diagonal"]))
    if kind == "groups":
        groups = draw(st.integers(1, 100))
        for name, count in (("image_groups", images), ("text_groups", texts)):
            options[name] = torch.randint(-1, groups, (count,), generator=generator)
        options["ignore"] = draw(st.sampled_from([None, -1, 0]))
    elif kind == "offset":
        options["offset"] = draw(st.integers(-images - 2, texts + 2))
    else:
        texts = images
    for name, count in (("image_weight", images), ("text_weight", texts)):
        if draw(st.booleans()):
            weight = torch.rand(count, generator=generator) * draw(
                st.sampled_from([1e-3, 0.1, 3.0])
            )  # more would exceed fp16
            options[name] = weight * (torch.rand(count, generator=generator) < 0.8)
    if draw(st.booleans()):
        options["positive_weight"] = draw(st.sampled_from([0.0, 0.3, 5.0]))
        options["negative_weight"] = draw(st.sampled_from([0.0, 0.7, 3.0]))
    return {"images": images, "texts": texts, "width": width, "options": options}


ANY = dict(deadline=None, derandomize=True, phases=[Phase.generate])  # no shrinking, which would take minutes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems())
@settings(max_examples=5, **ANY)
def test_any_options_are_within_the_error_budget(dtype, device, problem):
    _check_problem(sigmoid_loss, dtype, device, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems())
@settings(max_examples=25, **ANY)
def test_any_options_chunked(dtype, device, problem):
    _check_problem(functools.partial(chunked_sigmoid_loss, chunk_size=29), dtype, device, problem)


def _check_problem(function, dtype: torch.dtype, device: str, problem: dict[str, Any]) -> None:
    x, y = embeddings(problem["images"], problem["texts"], problem["width"], device)
    options = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in problem["options"].items()
    }
    check_budget(function, x, y, dtype, **options)


@pytest.fixture
def some(device) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """70 images and 90 texts in 20 groups, with every kind of weight and a group that is ignored."""
    generator = torch.Generator().manual_seed(0)
    options = {
        "image_groups": torch.randint(-1, 20, (70,), generator=generator).to(device),
        "text_groups": torch.randint(-1, 20, (90,), generator=generator).to(device),
        "image_weight": torch.rand(70, generator=generator).to(device),
        "text_weight": torch.rand(90, generator=generator).to(device),
        "positive_weight": torch.rand(70, generator=generator).to(device),
        "negative_weight": 0.5,
        "ignore": 3,
    }
    return *embeddings(70, 90, 24, device), options


@pytest.mark.parametrize("reduction", ["images", "pairs", "positives", "sum", "none"])
def test_every_reduction(loss_function, some, reduction):
    x, y, options = some
    check_budget(loss_function, x, y, torch.float32, reduction=reduction, **options)
    check_budget(loss_function, x, y[:70], torch.float32, reduction=reduction)
    check_budget(loss_function, x, y, torch.float32, reduction=reduction, offset=15)


def test_spelled_out(loss_function, device):
    """Two images and three texts, by hand: all logits are 0, and a pair's loss is log 2, its gradient by b ∓1/2."""
    x, y = torch.ones(2, 8, device=device), torch.ones(3, 8, device=device)
    groups = {"image_groups": torch.tensor([5, -1]), "text_groups": torch.tensor([5, -1, 5])}
    groups = {name: value.to(device) for name, value in groups.items()}
    log2 = torch.tensor(2.0).log()

    def loss(**options: Any) -> tuple[float, float]:
        bias = torch.zeros((), device=device, requires_grad=True)
        value = loss_function(x, y, 0.0, bias, reduction="sum", **options)
        value.backward()
        return value.item() / log2.item(), bias.grad.item()

    assert loss(**groups) == pytest.approx((6, (-1 + 1 - 1 + 1 + 1 + 1) / 2))  # -1 beside -1 is negative
    assert loss(**groups, ignore=-1) == pytest.approx((2, -1))  # the pairs of image 0 with texts 0 and 2
    assert loss(**groups, positive_weight=3.0, negative_weight=2.0) == pytest.approx((14, (-3 + 2 - 3 + 6) / 2))
    assert loss(offset=1) == pytest.approx((6, (1 - 1 + 1 + 1 + 1 - 1) / 2))
    assert loss(offset=-1) == pytest.approx((6, 2)) == loss(offset=-1)  # image 1 with text 0
    assert loss(offset=3) == pytest.approx((6, 3))  # no positive
    weights = {"image_weight": torch.tensor([1.0, 0.5]), "text_weight": torch.tensor([1.0, 0.0, 4.0])}
    assert loss(offset=0, **{name: value.to(device) for name, value in weights.items()}) == pytest.approx(
        (1 + 4 + 0.5 + 2, (-1 + 4 + 0.5 + 2) / 2)
    )


def test_groups_of_one_pair_and_an_offset_of_zero_are_the_plain_loss(loss_function, device):
    x, y = embeddings(70, 70, 24, device)
    groups = torch.randperm(70, device=device)
    plain = results(loss_function, x, y, torch.float32, 10.0, -10.0)
    for options in ({"offset": 0}, {"image_groups": groups, "text_groups": groups}, {"image_weight": x.new_ones(70)}):
        found = results(loss_function, x, y, torch.float32, 10.0, -10.0, **options)
        assert all(torch.allclose(found[name], plain[name], rtol=1e-5, atol=1e-7) for name in plain)
    assert all(torch.equal(value, plain[name]) for name, value in results(
        loss_function, x, y, torch.float32, 10.0, -10.0, offset=0, positive_weight=1, negative_weight=1.0
    ).items())  # fmt: skip


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("reduction", ["images", "none"])
def test_bitwise_reproducible_and_every_element_written(loss_function, some, reduction):
    x, y, options = some
    first, second = (
        results(loss_function, x, y, torch.bfloat16, 10.0, -10.0, reduction=reduction, **options) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)


@pytest.mark.parametrize("width", [1, 7, 12, 4096])
def test_widths(loss_function, width, device):
    check_budget(loss_function, *embeddings(9, 9, width, device), torch.float32)


def test_a_width_that_is_a_multiple_of_8_is_not_copied(device):
    x = torch.ones(3, 16, device=device)
    assert api.padded(x) is x and api.aligned(x) is x


def test_large_weights_in_half_precision_under_a_grad_scaler(loss_function, some):
    """G times these weights and a scale of 2^16 would exceed fp16 by far."""
    x, y, options = some
    options = {**options, "image_weight": 1e4 * options["image_weight"], "positive_weight": 100.0}
    inputs = [v.half().requires_grad_() for v in (x, y)]
    scaler = torch.amp.GradScaler(x.device.type, init_scale=2.0**16)
    with torch.autocast(x.device.type, dtype=torch.float16):
        loss = loss_function(*(v.float() for v in inputs), 10.0, -10.0, reduction="pairs", **options)
    assert loss.dtype == torch.float32
    scaler.scale(loss * 1e-6).backward()
    true = results(reference.sigmoid_loss, *inputs, torch.float64, 10.0, -10.0, reduction="pairs", **options)
    for value, name in zip(inputs, ("image", "text"), strict=True):
        expected = -true[name] * 2**16 * 1e-6  # its upstream gradient is -1
        assert (value.grad.double() - expected).norm() <= 4e-3 * expected.norm()


def test_compile_and_opcheck(loss_function, some):
    x, y, options = some
    x, y = x[:9, :8], y[:11, :8]
    options = {
        name: value[: 11 if name.startswith("text") else 9] if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    options["image_groups"] = options["image_groups"].masked_fill(options["image_weight"] > 0.5, 2)
    options["text_groups"] = options["text_groups"].masked_fill(options["text_weight"] > 0.5, 2)
    engine = next(name for name, function in LOSSES.items() if function is loss_function)
    x, y, t, b = x.requires_grad_(), y.requires_grad_(), torch.tensor(3.0).to(x), torch.tensor(-1.0).to(x)
    t, b = t.requires_grad_(), b.requires_grad_()
    pairs = (2, options["image_groups"], options["text_groups"], *(x.detach()[:, 0].abs(),) * 2, y.detach()[:, 0].abs())
    torch.library.opcheck(api.forward_op, (x, y, t, b, engine, 0, True, True, True, 9, *pairs))
    if engine == "chunked":  # what is checked is the registration, which engines share
        torch.library.opcheck(api.losses_op, (x, y, t, b, engine, 0, *pairs))
        torch.library.opcheck(api.count_positives, (*pairs[1:3], "sigmoid_loss"))

    def loss(x, y, t, b, reduction):
        return (loss_function(x, y, t.exp(), b, reduction=reduction, **options) * 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for reduction in ("images", "positives", "none"):
        eager = torch.autograd.grad(loss(x, y, t, b, reduction), (x, y, t, b))
        found = torch.autograd.grad(compiled(x, y, t, b, reduction), (x, y, t, b))
        assert all(map(torch.equal, found, eager))


def test_second_derivatives_are_refused(loss_function, some):
    x, y, options = some
    for reduction in ("images", "none"):
        x = x.detach().requires_grad_()
        loss = loss_function(x, y, 2.0, 0.0, reduction=reduction, **options).sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(UnsupportedInputError, match="sigmoid_loss: create_graph asks for second derivatives"):
            gradient.sum().backward()


@pytest.mark.parametrize("reduction", ["images", "none"])
def test_within_activation_checkpointing(some, reduction):
    x, y, options = some
    x = x.detach().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return chunked_sigmoid_loss(x, y, 2.0, 0.0, reduction=reduction, **options).sum()

    (found,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
    assert torch.equal(found, torch.autograd.grad(loss(x), x)[0])


def test_the_definition_takes_weights_in_its_own_dtype():
    x = torch.zeros(1, 2, dtype=torch.float64)
    found = [reference.sigmoid_loss(x, x, 1.0, 0.0, positive_weight=w, negative_weight=w).item() for w in (1.0, 0.3)]
    assert found[1] == pytest.approx(0.3 * found[0], rel=1e-15)


def test_in_fp64(some):
    x, y, options = some
    exact = {name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in options.items()}
    for reduction in ("images", "none"):
        found, expected = (
            results(function, x, y, torch.float64, 10.0, -10.0, reduction=reduction, **exact)
            for function in (chunked_sigmoid_loss, reference.sigmoid_loss)
        )
        assert all(torch.allclose(found[name], expected[name], rtol=1e-12, atol=1e-14) for name in found)


def test_the_plain_loss_takes_the_options(some, monkeypatch):
    x, y, options = some
    expected = reference.sigmoid_loss(x, y, 10.0, -10.0, reduction="pairs", **options)
    for few in (1024, 1):
        monkeypatch.setattr(api, "CHUNKED_FROM", few)
        found = plain_sigmoid_loss(x, y, 10.0, -10.0, reduction="pairs", **options)
        assert torch.allclose(found, expected, rtol=1e-5)


def test_matches_and_plus_weights():
    groups, others = torch.tensor([4, -1, 9, 4]), torch.tensor([9, 4, -2, 4, 4])
    assert matches(groups, others).tolist() == [3, 0, 1, 3]
    assert matches(groups[:0], others).tolist() == []
    counts = torch.tensor([2, 0, 1]), torch.tensor([4, 1, 1])
    assert plus_weights(*counts).tolist() == [0.375, 1.0, 1.0]
    assert plus_weights(*counts, symmetric=False).tolist() == [0.5, 1.0, 1.0]


def test_plus_in_fp64_has_weights_in_fp64():
    x, y = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    groups = torch.zeros(3, dtype=torch.int64)  # nine positives, each of which weighs a third
    expected = math.log1p(math.exp(-1)) / 3
    losses = SigLIPPlusLoss(), functools.partial(siglip_kernel.fused_siglip_plus_loss, img_gid=groups, txt_gid=groups)
    found = losses[0](x, y, 1.0, 1.0, image_groups=groups, text_groups=groups), losses[1](x, y, torch.zeros(()), 1.0)
    assert [value.item() for value in found] == pytest.approx([expected] * 2, rel=1e-14)


def test_an_unknown_option_is_named_with_the_function():
    x = torch.ones(2, 8)
    for function in (chunked_sigmoid_loss, plain_sigmoid_loss):
        message = rf"^{function.__name__}\(\) got an unexpected keyword argument 'label_smoothing'"
        with pytest.raises(TypeError, match=message):
            function(x, x, 10.0, -10.0, label_smoothing=0.1)


class Allocations(TorchDispatchMode):
    """Keeps every fp32 tensor of a shape that PyTorch allocates."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.kept = shape, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == self.shape and result.dtype == torch.float32:
            self.kept.append(result)
        return result

    def number(self) -> int:
        return len({tensor.data_ptr() for tensor in self.kept})


@pytest.mark.parametrize("gradients", [False, True])
def test_a_block_with_options_takes_five_matrices(gradients):
    """Products, logits, signs, losses and weights; gradients take their memory."""
    x, y = torch.randn(64, 8), torch.randn(96, 8)
    pairs = make_pairs("", x, y, offset=0, positive_weight=2.0)
    engine = torch_engine.TorchEngine(x.dtype, x.device)
    scale, totals = torch.tensor(10.0), engine.totals(x.device, pairs)
    with Allocations((64, 96)) as allocated:
        engine.logit_grad(x, y, scale, -scale, pairs, totals, gradients, None)
    assert allocated.number() == 5


_NO_POSITIVE = "reduction is 'positives', but there is no positive pair"
_GROUPS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("function", [*LOSSES.values(), plain_sigmoid_loss])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_groups": _GROUPS}, "text_groups is None while image_groups is given"),
        ({"text_groups": _GROUPS}, "image_groups is None while text_groups is given"),
        ({"image_groups": _GROUPS[:1], "text_groups": _GROUPS}, r"image_groups has shape \(1,\); supported: \(2,\)"),
        ({"image_groups": _GROUPS, "text_groups": _GROUPS.int()}, "text_groups has dtype torch.int32; supported: int"),
        ({"image_groups": _GROUPS, "text_groups": _GROUPS.to("meta")}, "text_groups is on meta while image_embeds"),
        ({"image_groups": [0, 1], "text_groups": _GROUPS}, "image_groups is list"),
        ({"image_groups": _GROUPS, "text_groups": _GROUPS, "offset": 0}, "offset is 0 beside groups"),
        ({"offset": 1.0}, "offset is 1.0"),
        ({"ignore": 0}, "ignore is 0 without groups"),
        ({"ignore": 1 << 63, "image_groups": _GROUPS, "text_groups": _GROUPS}, "ignore is 9223372036854775808"),
        ({"positive_weight": -1.0}, "positive_weight is -1.0"),
        ({"negative_weight": float("inf")}, "negative_weight is inf"),
        ({"negative_weight": torch.ones(2)}, "negative_weight is Tensor"),
        ({"image_weight": 2.0}, "image_weight is 2.0"),
        ({"image_weight": torch.ones(3)}, r"image_weight has shape \(3,\)"),
        ({"text_weight": torch.ones(2, dtype=torch.int64)}, "text_weight has dtype torch.int64"),
        ({"text_weight": torch.ones(2, requires_grad=True)}, "text_weight requires a gradient"),
        ({"reduction": "mean"}, "reduction is 'mean'; supported: images, pairs, positives, sum, none"),
        ({"offset": 2, "reduction": "positives"}, _NO_POSITIVE),
        ({"image_groups": _GROUPS, "text_groups": _GROUPS - 1, "reduction": "positives"}, _NO_POSITIVE),
    ],
)
def test_bad_options_are_named(function, options, message):
    x = torch.ones(2, 8)
    with pytest.raises(UnsupportedInputError, match=f"^{function.__name__}: {message}"):
        function(x, x, 1.0, 0.0, **options)


def test_unequal_numbers_need_groups_or_an_offset(loss_function):
    x, y = torch.ones(2, 8), torch.ones(3, 8)
    with pytest.raises(UnsupportedInputError, match=r"text_embeds has shape \(3, 8\) beside image_embeds' \(2, 8\)"):
        loss_function(x, y, 1.0, 0.0)
