"""The sigmoid loss, in Triton and chunked, against its definition in fp64, and the uses of its gradients."""

from pathlib import Path

import machines
import pytest
import torch
import torch.nn.functional as F
from error_budget import check_error
from torch import Tensor

from siglip_kernels import (
    MissingBackendError,
    UnsupportedInputError,
    chunked_sigmoid_loss,
    plain_sigmoid_loss,
    reference,
    sigmoid_loss,
)
from siglip_kernels.sigmoid_loss import api, blocks, config, torch_engine, triton_engine
from siglip_kernels.sigmoid_loss.pairs import NO_POSITIVES, Pairs

LOSSES = {"triton": sigmoid_loss, "chunked": chunked_sigmoid_loss}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=LOSSES)
def loss_function(request, monkeypatch):
    # Small blocks, so that every size below spans several of them.
    monkeypatch.setattr(torch_engine, "_CPU_BLOCK", (48, 40))
    return LOSSES[request.param]


def embeddings(pairs: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(pairs + width)
    x, y = (F.normalize(torch.randn(pairs, width, generator=generator), dim=-1).to(device) for _ in range(2))
    return x, y


def results(function, x: Tensor, y: Tensor, t: float, b: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and the four gradients, from inputs in this dtype."""
    inputs = [v.detach().to(dtype).requires_grad_() for v in (x, y)]
    for value in (t, b):
        scalar = torch.tensor(value, dtype=torch.promote_types(dtype, torch.float32), device=x.device)
        inputs.append(scalar.requires_grad_())
    loss = function(*inputs)
    gradients = torch.autograd.grad(loss, inputs)
    return dict(zip(("loss", "image", "text", "scale", "bias"), (loss.detach(), *gradients), strict=True))


def check_budget(function, x: Tensor, y: Tensor, t: float, b: float, dtype: torch.dtype) -> None:
    """The error budget, with two roundings, of the loss and its gradients."""
    x, y = x.to(dtype), y.to(dtype)
    true = results(reference.sigmoid_loss, x, y, t, b, torch.float64)
    eager = results(reference.sigmoid_loss, x, y, t, b, dtype)
    found = results(function, x, y, t, b, dtype)
    pairs = len(x)
    # dt and db are sums of N² terms of either sign: one rounding is relative to the sum of their magnitudes.
    probability = torch.sigmoid(x.double() @ y.double().T * t + b)
    probability.diagonal().sub_(1).abs_()
    sizes = {
        "scale": (probability * (x.double() @ y.double().T).abs()).sum() / pairs,
        "bias": probability.sum() / pairs,
    }
    for name, value in found.items():
        assert value.isfinite().all(), name
        size, slack = sizes.get(name, 0.0), torch.finfo(value.dtype).tiny
        check_error(value, eager[name], true[name], name, roundings=2, size=size, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("pairs", "width"),
    [(1, 8), (2, 72), (17, 2048), (63, 72), (64, 768), (65, 8), (127, 72), (128, 8), (129, 1152), (300, 72)],
)
def test_within_the_error_budget(loss_function, pairs, width, dtype, device):
    check_budget(loss_function, *embeddings(pairs, width, device), 10.0, -10.0, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("t", "b"), [(1.0, -15.0), (0.0, -1.0), (-3.0, 2.0), (100.0, 15.0), (1e4, 0.0), (80.0, -80.0)])
def test_scales_and_biases(loss_function, t, b, dtype, device):
    check_budget(loss_function, *embeddings(70, 24, device), t, b, dtype)


@pytest.mark.parametrize("t", [80.0, 1e4])
def test_logits_far_on_either_side(loss_function, t, device):
    x, _ = embeddings(70, 24, device)
    for y in (x, -x, x.flip(0)):
        check_budget(loss_function, x, y, t, 0.0, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_inputs(loss_function, dtype, device):
    x, y = embeddings(66, 40, device)
    same = x[:1].expand_as(x)
    check_budget(loss_function, same, same, 10.0, -10.0, dtype)
    check_budget(loss_function, 5 * x, 7 * y, 2.0, -3.0, dtype)
    outlier = x.clone()
    outlier[3, 5] = 100.0
    check_budget(loss_function, outlier, y, 1.0, -5.0, dtype)


def test_exact_where_the_answer_is(loss_function, device):
    """At t = b = 0 every probability is 1/2: the loss is N log 2, dL/db = (N - 2) / 2, and products are integers."""
    x = torch.randint(-3, 4, (130, 16), device=device).float()
    y = torch.randint(-3, 4, (130, 16), device=device).float()
    found = results(loss_function, x, y, 0.0, 0.0, torch.float32)
    assert torch.allclose(found["loss"], 130 * torch.tensor(2.0).log(), rtol=1e-6)
    assert found["bias"] == 64.0
    assert not found["image"].any()
    assert not found["text"].any()
    products = x @ y.T
    assert torch.allclose(found["scale"], (products.sum() - 2 * products.trace()) / 260, rtol=1e-6)


@pytest.mark.parametrize("engine", LOSSES)
def test_fp16_gradients_at_the_scale_of_65536_pairs(engine, device):
    """A slice of a large batch, where g/N = 4.5e-5 / 65536 underflows in fp16 before a GradScaler's 2^16."""
    pairs, share = 65_536, 96
    x, y = (v.half() for v in embeddings(share, 64, device))
    scale, bias = torch.tensor(10.0, device=device), torch.tensor(-10.0, device=device)
    made = api.make_engine(engine, x)
    negatives = Pairs(NO_POSITIVES)
    totals, factor = made.totals(x.device, negatives), 1 / (pairs * made.logit_grad_scale)
    image = blocks.GradientSum(torch.zeros(x.shape, dtype=made.sum_dtype, device=device))
    text = blocks.GradientSum(torch.zeros(y.shape, dtype=made.sum_dtype, device=device))
    workspace = blocks.workspace(made, share, share, x.device)
    blocks.accumulate(made, x, y, scale, bias, negatives, totals, True, workspace, image, text, scale, factor)
    g = torch.sigmoid(10 * x.double() @ y.double().T - 10)
    assert (g / pairs).half().eq(0).any()
    saved = made.scale(image.total, scale, factor, torch.empty(x.shape, dtype=made.saved_dtype, device=device))
    scaled = made.scale(saved, torch.tensor(2.0**16, device=device), 1.0, torch.empty_like(x))
    assert (scaled.double() - 10 * g @ y.double()).norm() < 1e-3 * (10 * g @ y.double()).norm()
    scaled = made.scale(text.total, scale, factor * 2**16, torch.empty_like(y))
    assert (scaled.double() - 10 * g.T @ x.double()).norm() < 1e-3 * (10 * g.T @ x.double()).norm()


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_of_loading_tiles(descriptors, dtype, device, monkeypatch):
    small = config.Tile(32, 64, 16, num_warps=4, num_stages=1)
    chosen = config.Config(small, small, config.Tile(64, 32, 16, 4, 1), 256, descriptors, "ieee", config.Folding(8, 1))
    monkeypatch.setattr(triton_engine, "choose", lambda *_: chosen)
    check_budget(sigmoid_loss, *embeddings(270, 24, device), 10.0, -5.0, dtype)


@pytest.mark.usefixtures("poisoned_empty")
def test_every_element_is_written(loss_function, device):
    x, y = embeddings(261, 24, device)
    found = results(loss_function, x, y, 3.0, -1.0, torch.float32)
    assert all(value.isfinite().all() for value in found.values())


def test_bitwise_reproducible(loss_function, device):
    x, y = embeddings(300, 72, device)
    first, second = (results(loss_function, x, y, 10.0, -10.0, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_wanted_gradients_are_made(loss_function, device, monkeypatch):
    made = []
    accumulate = blocks.accumulate

    def spy(**arguments):
        image, text = arguments["image"], arguments["text"]
        made.append((arguments["scalar_gradients"], image is not None, text is not None))
        return accumulate(**arguments)

    monkeypatch.setattr(blocks, "accumulate", spy)
    x, y = embeddings(20, 8, device)
    true = results(reference.sigmoid_loss, x, y, 2.0, -1.0, torch.float64)
    leaves = {
        "image": x,
        "text": y,
        "scale": torch.tensor(2.0, device=device),
        "bias": torch.tensor(-1.0, device=device),
    }
    for names in (("image",), ("text",), ("scale",), ("bias",), ("text", "bias")):
        made.clear()
        inputs = {name: value.clone().requires_grad_(name in names) for name, value in leaves.items()}
        loss_function(*inputs.values()).backward()
        assert set(made) == {("scale" in names or "bias" in names, "image" in names, "text" in names)}
        for name, value in inputs.items():
            assert (value.grad is not None) == (name in names)
            assert value.grad is None or torch.allclose(value.grad.double(), true[name], rtol=1e-4, atol=1e-6)
    made.clear()
    with torch.no_grad():
        loss = loss_function(*inputs.values())
    assert not loss.requires_grad
    assert set(made) == {(False, False, False)}


def test_numbers_and_tensors_of_any_float_dtype_as_scalars(loss_function, device):
    x, y = embeddings(20, 8, device)
    expected = reference.sigmoid_loss(x, y, 4.0, -2.0)
    assert torch.allclose(loss_function(x, y, 4.0, -2), expected)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        t = torch.tensor(4.0, dtype=dtype, device=device, requires_grad=True)
        loss = loss_function(x, y, t, torch.tensor(-2.0))
        assert torch.allclose(loss, expected)
        loss.backward()
        assert t.grad.dtype == dtype


def test_graph_used_twice_scaled_and_accumulated(loss_function, device):
    x, y = (v.requires_grad_() for v in embeddings(30, 16, device))
    loss = loss_function(x, y, 10.0, -5.0)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss * 3, x, retain_graph=True)
    assert torch.allclose(again, 3 * once)
    loss.backward(retain_graph=True)
    loss.backward(torch.tensor(0.5, device=device))
    assert torch.allclose(x.grad, 1.5 * once)
    assert torch.equal(torch.autograd.grad(loss_function(x, y, 10.0, -5.0), x)[0], once)


def test_double_backward_is_refused(loss_function, device):
    x, y = (v.requires_grad_() for v in embeddings(5, 8, device))
    (gradient,) = torch.autograd.grad(loss_function(x, y, 2.0, 0.0), x, create_graph=True)
    with pytest.raises(UnsupportedInputError, match="sigmoid_loss: create_graph asks for second derivatives"):
        gradient.sum().backward()


def test_autocast_and_grad_scaler(loss_function, device):
    x, y = (v.requires_grad_() for v in embeddings(33, 16, device))
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = loss_function(x, y, 10.0, -10.0)
    assert loss.dtype == torch.float32
    expected = loss_function(x.bfloat16(), y.bfloat16(), 10.0, -10.0)
    assert torch.equal(loss, expected)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**14)
    scaler.scale(loss).backward()
    assert x.grad.dtype == torch.float32
    (unscaled,) = torch.autograd.grad(expected, x)
    assert torch.allclose(x.grad / 2**14, unscaled, rtol=1e-2, atol=1e-6)


def test_views_that_are_not_contiguous_or_aligned(loss_function, device):
    storage = torch.randn(2 * 40 * 24 + 1, device=device)
    x = storage[1 : 1 + 40 * 24].view(24, 40).T
    y = storage[-40 * 24 :].view(40, 24)
    check_budget(loss_function, x, y, 1.0, 0.0, torch.float32)


def test_torch_compile_and_opcheck(loss_function, device):
    engine = next(name for name, function in LOSSES.items() if function is loss_function)
    x, y = (v.requires_grad_() for v in embeddings(12, 8, device))
    t, b = (torch.tensor(v, device=device, requires_grad=True) for v in (3.0, -1.0))
    torch.library.opcheck(api.forward_op, (x, y, t, b, engine, 0, True, True, True, 12, 0, *(None,) * 5))
    some = x.detach(), y, t.detach(), b.detach(), engine, 0, False, True, False, 12, 0, *(None,) * 5
    torch.library.opcheck(api.forward_op, some)
    compiled = torch.compile(
        lambda x, y, t, b: loss_function(x, y, t.exp(), b) * 2, fullgraph=True, backend="aot_eager"
    )
    for pairs in (12, 9):
        inputs = [v[:pairs].detach().requires_grad_() for v in (x, y)] + [t, b]
        eager = torch.autograd.grad(loss_function(*inputs[:2], t.exp(), b) * 2, inputs)
        assert all(map(torch.equal, torch.autograd.grad(compiled(*inputs), inputs), eager))


@pytest.mark.parametrize("function", [*LOSSES.values(), plain_sigmoid_loss])
@pytest.mark.parametrize(
    ("x", "y", "t", "b", "message"),
    [
        (torch.ones(2, 8), torch.ones(3, 8), 1.0, 0.0, "text_embeds has shape"),
        (torch.ones(2, 8), torch.ones(2, 16), 1.0, 0.0, "text_embeds has shape"),
        (torch.ones(0, 8), torch.ones(0, 8), 1.0, 0.0, "at least one pair"),
        (torch.ones(8), torch.ones(8), 1.0, 0.0, r"\(N, D\)"),
        (torch.ones(2, 8, dtype=torch.int32), torch.ones(2, 8), 1.0, 0.0, "image_embeds has dtype torch.int32"),
        (torch.ones(2, 8), torch.ones(2, 8).half(), 1.0, 0.0, "text_embeds has dtype torch.float16 while"),
        (torch.ones(2, 8), torch.ones(2, 8), torch.ones(2), 0.0, "logit_scale has shape"),
        (torch.ones(2, 8), torch.ones(2, 8), torch.ones(1, 1), 0.0, "logit_scale has shape"),
        (torch.ones(2, 8), torch.ones(2, 8), 1.0, torch.tensor(1), "logit_bias has dtype"),
        (torch.ones(2, 8), torch.ones(2, 8), "1", 0.0, "logit_scale is str"),
        ([[1.0]], torch.ones(2, 8), 1.0, 0.0, "image_embeds is list"),
    ],
)
def test_bad_input_is_named(function, x, y, t, b, message):
    with pytest.raises(UnsupportedInputError, match=message):
        function(x, y, t, b)


def test_what_only_the_kernels_refuse(device):
    for width, dtype in ((4097, torch.float32), (8, torch.float64)):
        x = torch.ones(2, width, dtype=dtype, device=device)
        with pytest.raises(UnsupportedInputError, match="image_embeds has"):
            sigmoid_loss(x, x, 1.0, 0.0)
        check_budget(chunked_sigmoid_loss, x, x, 1.0, 0.0, dtype)
    with pytest.raises(UnsupportedInputError, match="chunk_size is -1"):
        chunked_sigmoid_loss(x, x, 1.0, 0.0, chunk_size=-1)


def test_the_error_for_cpu_tensors_names_an_alternative(monkeypatch):
    machines.report(monkeypatch)
    x = torch.ones(2, 8)
    with pytest.raises(MissingBackendError, match="chunked_sigmoid_loss"):
        sigmoid_loss(x, x, 1.0, 0.0)


def test_package_works_without_triton(run_python):
    code = """
import sys
sys.modules["triton"] = None
import torch, siglip_kernels
x = torch.ones(2, 8, requires_grad=True)
siglip_kernels.chunked_sigmoid_loss(x, x, 1.0, 0.0).backward()
try:
    siglip_kernels.sigmoid_loss(x, x, 1.0, 0.0)
except siglip_kernels.MissingBackendError:
    print("refused")
"""
    done = run_python(code)
    assert done.stdout.split() == ["refused"], done.stderr


def test_plain_loss_chunks_large_batches(monkeypatch):
    x, y = embeddings(1500, 8, "cpu")
    expected = reference.sigmoid_loss(x, y, 10.0, -10.0)
    monkeypatch.setattr(reference, "sigmoid_loss", None)
    assert torch.allclose(plain_sigmoid_loss(x, y, 10.0, -10.0), expected)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunk_size_changes_nothing_but_memory(chunk_size):
    x, y = embeddings(100, 8, "cpu")

    def chunks(x, y, t, b):
        return chunked_sigmoid_loss(x, y, t, b, chunk_size)

    check_budget(chunks, x, y, 10.0, -10.0, torch.float32)


def test_training_saves_no_logits(loss_function, device):
    saved = []
    x, y = (v.requires_grad_() for v in embeddings(200, 8, device))
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.numel()) or v, lambda v: v):
        loss = loss_function(x, y, 10.0, -10.0)
    loss.backward()
    assert x.numel() <= sum(saved) <= 2 * (x.numel() + y.numel()) + 10


_PEAK = """
import torch
from bench.measure.timing import peak_resident_bytes
from siglip_kernels import chunked_sigmoid_loss, reference
def train(pairs):
    x = torch.nn.functional.normalize(torch.randn(pairs, 32), dim=-1).requires_grad_()
    y = torch.nn.functional.normalize(torch.randn(pairs, 32), dim=-1).requires_grad_()
    LOSS.backward()
train(256)
before = peak_resident_bytes()
train(4096)
print(peak_resident_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_chunked_training_holds_no_array_of_logits(run_python):
    """All logits take 67 MB; a block and its temporaries 12 MB, embeddings and gradients 2 MB."""
    peaks = {}
    calls = {
        "chunked": "chunked_sigmoid_loss(x, y, 10.0, -10.0, chunk_size=256)",
        "eager": "reference.sigmoid_loss(x, y, 10.0, -10.0)",
    }
    for loss, call in calls.items():
        done = run_python(_PEAK.replace("LOSS", call))
        assert done.returncode == 0, done.stderr
        peaks[loss] = int(done.stdout)
    assert peaks["chunked"] < 50e6
    assert peaks["eager"] > 134e6  # the measurement sees arrays of logits
