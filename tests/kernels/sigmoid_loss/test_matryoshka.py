"""The loss of normalised prefixes of the embeddings, against the definition in fp64."""

import dataclasses
import functools
from typing import Any

import machines
import pytest
import torch
from error_budget import check_error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from siglip_kernels import (
    MissingBackendError,
    SigLipLoss,
    SigLIPPlusLoss,
    UnsupportedInputError,
    chunked_sigmoid_loss,
    matryoshka_sigmoid_loss,
    plain_sigmoid_loss,
    reference,
    sigmoid_loss,
)
from siglip_kernels.sigmoid_loss import torch_engine
from siglip_kernels.sigmoid_loss.config import Config, Folding
from siglip_kernels.sigmoid_loss.matryoshka import api
from siglip_kernels.sigmoid_loss.matryoshka.blocks import Segments
from siglip_kernels.sigmoid_loss.matryoshka.config import column_tiles, prefix_config
from siglip_kernels.sigmoid_loss.matryoshka.torch_engine import TorchPrefixEngine

WIDTHS = (5, 8, 24)
SCALES, BIASES = (4.0, 8.0, 10.0), (-3.0, -6.0, -8.0)
LOSSES = [sigmoid_loss, chunked_sigmoid_loss, plain_sigmoid_loss]


def embeddings(images: int, texts: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (3 * torch.randn(n, 24, generator=generator).to(device) for n in (images, texts))
    return x, y


def results(
    loss,
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    widths: tuple[int, ...] = WIDTHS,
    upstream: tuple[float, ...] = (1.0, 0.5, 2.0),
    **options: Any,
) -> list[Tensor]:
    """The losses, and the gradients of their weighted sum."""
    at_least, count = torch.promote_types(dtype, torch.float32), len(widths)
    inputs = [v.detach().to(dtype).requires_grad_() for v in (x, y)]
    for values in (SCALES, BIASES):
        inputs.append(torch.tensor(values[:count], dtype=at_least, device=x.device, requires_grad=True))
    losses = matryoshka_sigmoid_loss(*inputs, widths, loss=loss, **options)
    return [losses.detach(), *torch.autograd.grad(losses, inputs, torch.tensor(upstream[:count]).to(losses))]


def sizes(x: Tensor, y: Tensor, widths: tuple[int, ...], upstream: tuple[float, ...], options: dict) -> list[float]:
    """Of both gradients the sizes of the terms, which normalisation projects: of a cosine of 1 nothing is left."""
    found = [0.0, 0.0]
    for width, scale, bias, factor in zip(widths, SCALES, BIASES, upstream, strict=False):
        norms = [v[:, :width].norm(dim=1, keepdim=True).clamp_min(1e-12) for v in (x, y)]
        unit = [(v[:, :width] / norm).requires_grad_() for v, norm in zip((x, y), norms, strict=True)]
        gradients = torch.autograd.grad(reference.sigmoid_loss(*unit, scale, bias, **options), unit)
        for side in (0, 1):
            found[side] += abs(factor) * (gradients[side] / norms[side]).norm().item()
    return found


def check(
    loss,
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    widths: tuple[int, ...] = WIDTHS,
    upstream: tuple[float, ...] = (1.0, 0.5, 2.0),
    **options: Any,
) -> None:
    x, y = x.to(dtype), y.to(dtype)
    exact_options = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    exact = results(reference.sigmoid_loss, x, y, torch.float64, widths, upstream, **exact_options)
    eager = results(reference.sigmoid_loss, x, y, dtype, widths, upstream, **options)
    found = results(loss, x, y, dtype, widths, upstream, **options)
    image, text = sizes(x.double(), y.double(), widths, upstream, exact_options)
    names, of_terms = ("losses", "image", "text", "scales", "biases"), (0.0, image, text, 0.0, 0.0)
    for name, value, one, true, size in zip(names, found, eager, exact, of_terms, strict=True):
        # The normalised prefixes are rounded, and each prefix's part in H.
        slack = 1e-6 * (float(true.norm()) + size)
        check_error(value, one, true, name, dtype=dtype, roundings=4 if size else 2, size=size, slack=slack)


@pytest.mark.parametrize(
    ("dtype", "upstream"),
    [(torch.float32, (1.0, 1.0, 1.0)), (torch.bfloat16, (1.0, 0.5, 2.0)), (torch.float16, (1.0, 1.0, 1.0))],
    ids=["fp32 sum", "bf16 weighted", "fp16 sum"],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_within_the_error_budget(loss, dtype, upstream, device, poisoned_empty):
    check(loss, *embeddings(30, 30, device), dtype, WIDTHS, upstream)


@st.composite
def problems(draw) -> dict[str, Any]:
    """Sizes, widths, groups, weights and a reduction."""
    images, texts, seed = (draw(st.integers(1, most)) for most in (70, 80, 99))
    columns = draw(st.integers(1, 150))
    widths = sorted(draw(st.sets(st.integers(1, columns), min_size=1, max_size=3)))
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["images", "pairs", "sum"]))}
    if draw(st.booleans()):
        for name, count in (("image_groups", images), ("text_groups", texts)):
            options[name] = torch.randint(-1, draw(st.integers(1, 50)), (count,), generator=generator)
        options["ignore"] = draw(st.sampled_from([None, -1, 0]))
    else:
        options["offset"] = draw(st.integers(-images - 2, texts + 2))
    if draw(st.booleans()):
        options["image_weight"] = torch.rand(images, generator=generator)
        options["text_weight"] = 3 * torch.rand(texts, generator=generator)
        options["positive_weight"] = draw(st.sampled_from([0.3, 5.0]))
    # Prefixes of very different norms.
    x, y = (torch.randn(n, columns, generator=generator) for n in (images, texts))
    x *= torch.logspace(0, draw(st.integers(-2, 2)), columns)
    upstream = draw(st.sampled_from([(1.0, 1.0, 1.0), (0.5, -1.0, 2.0)]))
    return {"x": x, "y": y, "widths": tuple(widths), "upstream": upstream, "options": options}


ANY = dict(deadline=None, derandomize=True, phases=[Phase.generate])  # no shrinking, which would take minutes


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@given(problem=problems())
@settings(max_examples=2, **ANY)
def test_any_options_are_within_the_error_budget(dtype, device, problem):
    check_problem(sigmoid_loss, dtype, device, problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@given(problem=problems())
@settings(max_examples=25, **ANY)
def test_any_options_chunked(dtype, device, problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "_CPU_BLOCK", (48, 40))  # so that most sizes span several blocks
        check_problem(chunked_sigmoid_loss, dtype, device, problem)


def check_problem(loss, dtype: torch.dtype, device: str, problem: dict[str, Any]) -> None:
    options = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in problem["options"].items()
    }
    x, y = problem["x"].to(device), problem["y"].to(device)
    check(loss, x, y, dtype, problem["widths"], problem["upstream"], **options)


@pytest.mark.parametrize("sizes", [(260, 10), (10, 260)])
def test_several_blocks_in_triton(sizes, device):
    """Two blocks of images or of texts, the second of which is not full."""
    check(sigmoid_loss, *embeddings(*sizes, device), torch.bfloat16, (8, 24), (1.0, 1.0), offset=3)


@pytest.mark.parametrize("folding", [Folding(16, 4), Folding(8, 2), Folding(8, 1)], ids=str)
def test_every_way_to_sum_a_tile(folding, device, monkeypatch):
    """GPUs differ in it: the other tests take that of this device."""
    from siglip_kernels.sigmoid_loss.matryoshka import triton_engine

    monkeypatch.setattr(
        triton_engine, "prefix_config", lambda *given: dataclasses.replace(prefix_config(*given), folding=folding)
    )
    check(sigmoid_loss, *embeddings(20, 20, device), torch.float32, (8, 24), (1.0, 1.0))


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("widths", [(8, 24), (8, 140)], ids=["half tiles", "both"])
def test_tiles_of_half_the_columns(widths, descriptors, device, monkeypatch):
    from siglip_kernels.sigmoid_loss.matryoshka import triton_engine

    def with_wide_tiles(*arguments: Any) -> Config:
        config = prefix_config(*arguments)
        product = dataclasses.replace(config.product, columns=128)
        return dataclasses.replace(config, product=product, descriptors=descriptors)

    monkeypatch.setattr(triton_engine, "prefix_config", with_wide_tiles)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, widths[-1], generator=generator).to(device) for n in (70, 20))
    check(sigmoid_loss, x, y, torch.float32, widths, (1.0, 1.0), offset=3)


@pytest.mark.parametrize("loss", LOSSES[:2])
def test_runs_are_bitwise_equal(loss, device):
    x, y = embeddings(40, 40, device)
    first, second = (results(loss, x, y, torch.float32, upstream=(2.0, 2.0, 2.0)) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("loss", LOSSES[:2])
def test_weights_of_the_widths_are_those_of_the_sum(loss, device):
    x, y = embeddings(20, 20, device)
    weighted = results(loss, x, y, torch.float32, upstream=(1.0, 1.0, 1.0), width_weights=(1.0, 0.5, 2.0))
    afterwards = results(loss, x, y, torch.float32, upstream=(1.0, 0.5, 2.0))
    afterwards[0] *= torch.tensor([1.0, 0.5, 2.0], device=device)
    for found, expected in zip(weighted, afterwards, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_equal_upstream_gradients_need_no_second_pass(device, monkeypatch):
    x, y = (v.requires_grad_() for v in embeddings(9, 9, device))
    losses = matryoshka_sigmoid_loss(x, y, SCALES, BIASES, WIDTHS, loss=chunked_sigmoid_loss)
    products = []
    monkeypatch.setattr(TorchPrefixEngine, "prefix_product", lambda *_, **named: products.append(named))
    losses.mean().backward(retain_graph=True)
    assert not products
    losses[1].backward()
    assert len(products) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [(0.0, 1.0), (1.0, 0.0)])
def test_a_width_without_weight_in_triton(dtype, upstream, device):
    """Its share of the stored gradients is zero, by which nothing may be divided."""
    x, y = embeddings(8, 8, device)
    check(sigmoid_loss, x, y, dtype, (8, 24), upstream)


def test_a_temperature_of_zero_in_triton(device):
    x, y = (v.requires_grad_() for v in embeddings(8, 8, device))
    scales, exact = torch.zeros(2, device=device, requires_grad=True), torch.zeros(2).double().requires_grad_()
    matryoshka_sigmoid_loss(x, y, scales, BIASES[:2], (8, 24), loss=sigmoid_loss).sum().backward()
    embeds = (v.detach().cpu().double() for v in (x, y))
    matryoshka_sigmoid_loss(*embeds, exact, BIASES[:2], (8, 24), loss=reference.sigmoid_loss).sum().backward()
    assert torch.allclose(scales.grad.cpu().double(), exact.grad, rtol=1e-5)
    assert x.grad.abs().max() < 1e-15 and y.grad.abs().max() < 1e-15


def test_gradients_of_one_side_and_of_columns_past_the_last_width(device):
    x, y = embeddings(12, 12, device)
    for loss in LOSSES[:2]:
        both = results(loss, x, y, torch.float32, (5, 8), (1.0, 1.0))
        assert not both[1][:, 8:].any() and not both[2][:, 8:].any()
        for side in (0, 1):
            inputs = [x.clone(), y.clone()]
            inputs[side].requires_grad_()
            matryoshka_sigmoid_loss(*inputs, SCALES[:2], BIASES[:2], (5, 8), loss=loss).sum().backward()
            assert torch.allclose(inputs[side].grad, both[1 + side], rtol=1e-6, atol=1e-7)


def test_an_embedding_of_zeros(device):
    x, y = embeddings(8, 8, device)
    x[2] = 0
    y[3, :5] = 0
    for loss in LOSSES[:2]:
        found = results(loss, x, y, torch.float64 if loss is chunked_sigmoid_loss else torch.float32)
        exact = results(reference.sigmoid_loss, x, y, torch.float64)
        for value, true in zip(found, exact, strict=True):
            assert torch.allclose(value.double(), true, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES[:2])
def test_a_prefix_whose_squares_overflow_is_zeros(loss, dtype, device):
    """As in the definition: all prefixes of an image, one of its prefixes, and one of a text."""
    x, y = (v.to(dtype) for v in embeddings(8, 8, device))
    x[2] *= 1e20
    x[4, 8:] *= 1e20
    y[3, 5:] *= 1e25
    found, expected = (results(each, x, y, dtype) for each in (loss, plain_sigmoid_loss))
    for value, true in zip(found, expected, strict=True):
        assert (value - true).norm() < max(1e-5, 2 * torch.finfo(dtype).eps) * true.norm()
    assert not found[1][2].any() and not found[1][4, 8:].any() and not found[2][3, 5:].any()


@pytest.mark.parametrize("engine", ["triton", "chunked"])
def test_opcheck_and_compiled(engine, device):
    x, y = (v.requires_grad_() for v in embeddings(9, 9, device))
    t, b = (torch.tensor(v, device=device, requires_grad=True) for v in (SCALES, BIASES))
    ones, pairs = torch.ones(3, device=device), (9, 0, *(None,) * 5)
    if engine == "chunked":  # what is checked is the registration, which engines share
        torch.library.opcheck(api.forward_op, (x, y, t, b, [5, 8, 24], ones, engine, 0, True, True, True, *pairs))
    loss = LOSSES[("triton", "chunked").index(engine)]

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return matryoshka_sigmoid_loss(x, y, t, b, WIDTHS, loss=loss)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for weights in (1.0, torch.tensor([1.0, 2.0, 3.0], device=device))[: 1 if engine == "triton" else 2]:
        found, expected = (
            torch.autograd.grad((function(x, y) * weights).sum(), (x, y, t, b)) for function in (compiled, losses)
        )
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("loss", LOSSES[:2])
def test_autocast(loss, device):
    x, y = (v.requires_grad_() for v in embeddings(9, 9, device))
    with torch.autocast(device, dtype=torch.bfloat16):
        losses = matryoshka_sigmoid_loss(x, y, SCALES, BIASES, WIDTHS, loss=loss)
    expected = matryoshka_sigmoid_loss(x.bfloat16(), y.bfloat16(), SCALES, BIASES, WIDTHS, loss=loss)
    assert losses.dtype == torch.float32 and torch.equal(losses, expected)
    losses.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES[:2])
def test_grad_scaler_keeps_gradients_that_underflow_in_fp16(loss, device):
    x, y = (v.half() for v in embeddings(9, 9, device))
    weight = torch.full((9,), 2.0**-20, device=device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    found, plain, exact = [], [], []
    for dtype, scale, into in ((x.dtype, scaler.scale, found), (x.dtype, None, plain), (torch.float64, None, exact)):
        leaves = [v.to(dtype).requires_grad_() for v in (x, y)]
        definition = reference.sigmoid_loss if into is exact else loss
        losses = matryoshka_sigmoid_loss(*leaves, SCALES, BIASES, WIDTHS, loss=definition, image_weight=weight)
        into += torch.autograd.grad(losses.sum() if scale is None else scale(losses.sum()), leaves)
    for scaled, small, true in zip(found, plain, exact, strict=True):
        assert (scaled.double() / 2**16 - true).norm() < 1e-2 * true.norm()
        assert (small.double() - true).norm() > 0.1 * true.norm()


def test_within_activation_checkpointing():
    x, y = (v.requires_grad_() for v in embeddings(9, 9, "cpu"))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return matryoshka_sigmoid_loss(x, y, SCALES, BIASES, WIDTHS).sum()

    found = torch.autograd.grad(checkpoint(loss, x, y, use_reentrant=False), (x, y))
    assert all(map(torch.equal, found, torch.autograd.grad(loss(x, y), (x, y))))


def test_the_default_on_a_cpu_is_chunked(monkeypatch):
    x, y = embeddings(9, 9, "cpu")
    expected = matryoshka_sigmoid_loss(x, y, SCALES, BIASES, WIDTHS, loss=chunked_sigmoid_loss)
    machines.report(monkeypatch)
    assert torch.equal(matryoshka_sigmoid_loss(x, y, SCALES, BIASES, WIDTHS), expected)
    with pytest.raises(MissingBackendError, match="loss=siglip_kernels.chunked_sigmoid_loss"):
        matryoshka_sigmoid_loss(x, y, SCALES, BIASES, WIDTHS, loss=sigmoid_loss)


def test_within_torch_func():
    x, y = embeddings(5, 5, "cpu")

    def total(x: Tensor) -> Tensor:
        return matryoshka_sigmoid_loss(x, y, SCALES, BIASES, WIDTHS).sum()

    leaf = x.clone().requires_grad_()
    assert torch.allclose(torch.func.grad(total)(x), torch.autograd.grad(total(leaf), leaf)[0], atol=1e-6)


def test_segments_and_tiles():
    segments = Segments((5, 70, 134), 64)
    assert segments.ends == (64, 192, 256)
    assert segments.slices() == [
        (slice(0, 5), slice(0, 5)), (slice(5, 70), slice(64, 129)), (slice(70, 134), slice(192, 256))
    ]  # fmt: skip
    assert column_tiles((64, 320, 512), 128) == ((1, 1, 2, 0, 2), (64, 192, 320, 0, 448), (320, 320, 512, 64, 512), 3)


def test_a_module_is_the_loss_with_its_options():
    x, y = embeddings(9, 7, "cpu")
    groups = dict(image_groups=torch.arange(9) % 4, text_groups=torch.arange(7) % 4)
    module = SigLipLoss(positive_weight=2.0, negative_weight=0.5, ignore=3, reduction="pairs")
    chosen = dict(positive_weight=2.0, negative_weight=0.5, ignore=3, reduction="pairs")
    expected = results(chunked_sigmoid_loss, x, y, torch.float32, **groups, **chosen)
    assert all(map(torch.equal, results(module, x, y, torch.float32, **groups), expected))
    plus = results(SigLIPPlusLoss(), x, y, torch.float32, **groups)
    each = results(functools.partial(SigLIPPlusLoss()), x, y, torch.float32, **groups)  # a call for each width
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(plus, each, strict=True))


@pytest.mark.parametrize("changed", ["method", "hook", "backward hook", "call"])
def test_a_module_that_was_changed_is_called_for_each_width(changed):
    calls: list[int] = []

    class Counting(SigLipLoss):
        def __call__(self, *arguments, **options):
            calls.append(0)
            return super().__call__(*arguments, **options)

    x, y = (each.requires_grad_() for each in embeddings(5, 5, "cpu"))
    module = Counting() if changed == "call" else SigLipLoss()
    if changed == "method":
        module._loss = lambda *arguments: calls.append(0) or arguments[0].sum()
    elif changed == "hook":
        module.register_forward_hook(lambda *_: calls.append(0))
    elif changed == "backward hook":
        module.register_full_backward_hook(lambda *_: calls.append(0))
    matryoshka_sigmoid_loss(x, y, SCALES, BIASES, WIDTHS, loss=module).sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"widths": (8, 8)}, r"widths is \[8, 8\]; supported: ascending numbers from 1 to 24"),
        ({"widths": (8, 25)}, r"widths is \[8, 25\]"),
        ({"widths": (0, 8)}, r"widths is \[0, 8\]"),
        ({"widths": ()}, r"widths is \[\]"),
        ({"widths": (4.0, 8)}, r"widths is \[4.0, 8\]"),
        ({"widths": 8}, "widths is 8; supported: a sequence"),
        ({"loss": 3}, "loss is 3; supported: None, a function or a module"),
        ({"loss": SigLipLoss(reduction="none")}, "loss has reduction='none'"),
        ({"loss": functools.partial(plain_sigmoid_loss, reduction="none")}, r"loss returns shape \(3,\)"),
        ({"logit_scales": (1.0, 2.0, 3.0)}, "logit_scales has length 3; supported: one number for all widths, or"),
        ({"logit_scales": "12"}, "logit_scales is '12'"),
        ({"logit_biases": torch.ones(3)}, r"logit_biases has shape \(3,\)"),
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"reduction": "mean"}, "reduction is 'mean'"),
        ({"width_weights": (1.0, -1.0)}, "width_weights contains -1.0; supported: finite numbers from 0 on"),
        ({"width_weights": torch.ones(2)}, "width_weights contains an element of type Tensor; supported: Python num"),
        ({"width_weights": (1.0,)}, "width_weights has length 1; supported: one number for all widths, or one for"),
        ({"chunk_size": -1}, "chunk_size is -1"),
        ({"text_embeds": torch.ones(4, 24)}, "text_embeds has shape"),
    ],
)
def test_bad_input_is_named(changed, message):
    x, y = embeddings(3, 3, "cpu")
    arguments = dict(image_embeds=x, text_embeds=y, logit_scales=1.0, logit_biases=0.0, widths=(8, 24))
    with pytest.raises(UnsupportedInputError, match=f"matryoshka_sigmoid_loss: {message}"):
        matryoshka_sigmoid_loss(**{**arguments, **changed})


@pytest.mark.parametrize("option", ["label_smoothing", "engine"])
def test_an_unknown_option_is_named_with_the_function(option):
    x, y = embeddings(3, 3, "cpu")
    with pytest.raises(TypeError, match=rf"^matryoshka_sigmoid_loss\(\) got an unexpected keyword argument '{option}'"):
        matryoshka_sigmoid_loss(x, y, 1.0, 0.0, WIDTHS, **{option: 0.1})
