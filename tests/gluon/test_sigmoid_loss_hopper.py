"""The loss's kernels for Hopper, emulated: sums and gradients, ragged shapes, interleavings, dispatch."""

import functools

import pytest
import torch
import torch.nn.functional as F
from error_budget import check_error
from hopper_emulator.faults import Fault
from hopper_emulator.gpu import on_hopper
from torch import Tensor

from siglip_kernels import UnsupportedInputError, reference, sigmoid_loss
from siglip_kernels.sigmoid_loss import api, blocks, hopper_engine, hopper_kernels
from siglip_kernels.sigmoid_loss.pairs import NO_POSITIVES, Pairs

pytestmark = pytest.mark.usefixtures("hopper_selected")


@pytest.fixture
def small_blocks(monkeypatch):
    """A function that sets the size of blocks of G, so that few pairs span several."""

    def shrink(size: int) -> None:
        class SmallBlocks(hopper_engine.HopperEngine):
            def __init__(self, embeds: Tensor, chunk_size: int = 0) -> None:
                super().__init__(embeds, chunk_size)
                self.rows = self.columns = size

        monkeypatch.setattr(hopper_engine, "HopperEngine", SmallBlocks)

    return shrink


def embeddings(pairs: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(pairs + width)
    x, y = (F.normalize(torch.randn(pairs, width, generator=generator), dim=-1).to(dtype) for _ in range(2))
    return x, y


def results(function, x: Tensor, y: Tensor, t: float, b: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and the four gradients, from inputs in this dtype."""
    inputs = [v.detach().to(dtype).requires_grad_() for v in (x, y)]
    inputs += [torch.tensor(v, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True) for v in (t, b)]
    loss = function(*inputs)
    gradients = torch.autograd.grad(loss, inputs)
    return dict(zip(("loss", "image", "text", "scale", "bias"), (loss.detach(), *gradients), strict=True))


def check(x: Tensor, y: Tensor, t: float, b: float, seed: int = 0) -> dict[str, Tensor]:
    """The error budget of the loss and its gradients."""
    with on_hopper(seed):
        found = results(sigmoid_loss, x, y, t, b, x.dtype)
    truth = results(reference.sigmoid_loss, x, y, t, b, torch.float64)
    eager = results(reference.sigmoid_loss, x, y, t, b, x.dtype)
    # dt and db are sums of N² terms of either sign: one rounding is relative to the sum of their magnitudes.
    products = x.double() @ y.double().T
    probability = torch.sigmoid(products * t + b)
    probability.diagonal().sub_(1).abs_()
    sizes = {"scale": (probability * products.abs()).sum() / len(x), "bias": probability.sum() / len(x)}
    for name, value in found.items():
        assert value.isfinite().all(), name
        check_error(
            value, eager[name], truth[name], name, size=sizes.get(name, 0.0), slack=torch.finfo(value.dtype).tiny
        )
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("pairs", "width"), [(1, 8), (63, 72), (64, 264), (65, 256), (290, 136)])
def test_within_the_error_budget(pairs, width, dtype):
    check(*embeddings(pairs, width, dtype), 10.0, -10.0, seed=pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_several_blocks(dtype, small_blocks):
    """Sums over several launches, blocks at the edge, blocks without positives."""
    small_blocks(256)
    check(*embeddings(600, 72, dtype), 10.0, -10.0)


@pytest.mark.parametrize(("t", "b"), [(1.0, -15.0), (0.0, -1.0), (-3.0, 2.0), (100.0, 15.0), (1e4, 0.0), (80.0, -80.0)])
def test_scales_and_biases(t, b):
    check(*embeddings(70, 24, torch.bfloat16), t, b)


def test_adversarial_inputs():
    x, y = embeddings(66, 40, torch.float16)
    check(x[:1].expand_as(x), x[:1].expand_as(x), 10.0, -10.0)
    check(5 * x, 7 * y, 2.0, -3.0)
    check(x, x, 80.0, 0.0)
    check(x, -x, 80.0, 0.0)
    outlier = x.clone()
    outlier[3, 5] = 100.0
    check(outlier, y, 1.0, -5.0)


def test_exact_where_the_answer_is():
    """At t = b = 0 every probability is 1/2: the loss is N log 2, dL/db = (N - 2) / 2, and products are integers."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-3, 4, (130, 16), generator=generator).bfloat16() for _ in range(2))
    with on_hopper():
        found = results(sigmoid_loss, x, y, 0.0, 0.0, torch.bfloat16)
    assert torch.allclose(found["loss"], 130 * torch.tensor(2.0).log(), rtol=1e-6)
    assert found["bias"] == 64.0 and not found["image"].any() and not found["text"].any()
    products = x.float() @ y.float().T
    assert torch.allclose(found["scale"], (products.sum() - 2 * products.trace()) / 260, rtol=1e-6)


def test_many_small_terms_keep_their_sum():
    """2 million pairs whose loss is e^-15 each, which is small beside the 1 in log(1 + e^-15)."""
    x = torch.zeros(1500, 8, dtype=torch.bfloat16)
    with on_hopper(), torch.no_grad():
        found = sigmoid_loss(x, x, 1.0, -15.0)
    truth = reference.sigmoid_loss(x.double(), x.double(), torch.tensor(1.0).double(), torch.tensor(-15.0).double())
    assert abs(found.double() / truth - 1) < 1e-6


def test_every_interleaving_gives_the_same(small_blocks):
    """Bitwise, because the order of every sum is fixed."""
    small_blocks(256)
    x, y = embeddings(330, 72, torch.bfloat16)

    def run(seed: int) -> dict[str, Tensor]:
        with on_hopper(seed):
            return results(sigmoid_loss, x, y, 10.0, -10.0, torch.bfloat16)

    first = run(100)
    for seed in range(4):
        assert all(torch.equal(one, first[name]) for name, one in run(seed).items())


@pytest.mark.parametrize("wanted", ["image", "text", "scalars", "nothing"])
def test_only_the_required_gradients(wanted):
    x, y = embeddings(70, 24, torch.bfloat16)
    t, b = torch.tensor(10.0), torch.tensor(-5.0)
    with on_hopper():
        everything = results(sigmoid_loss, x, y, 10.0, -5.0, torch.bfloat16)
        leaves = {"image": [x], "text": [y], "scalars": [t, b], "nothing": []}[wanted]
        loss = sigmoid_loss(*(v.requires_grad_(any(v is leaf for leaf in leaves)) for v in (x, y, t, b)))
        gradients = torch.autograd.grad(loss, leaves) if leaves else ()
    assert torch.equal(loss.detach(), everything["loss"])
    names = {"image": ["image"], "text": ["text"], "scalars": ["scale", "bias"], "nothing": []}[wanted]
    for name, gradient in zip(names, gradients, strict=True):
        assert torch.equal(gradient, everything[name])


def test_negatives_of_another_rank():
    """A block without positives, and more texts than images, as on the ring."""
    x, y = embeddings(300, 24, torch.bfloat16)
    x = x[:90]
    with on_hopper():
        engine = api.make_engine("triton", x)
        negatives = Pairs(NO_POSITIVES)
        totals = engine.totals(x.device, negatives)
        logit_grad = blocks.workspace(engine, 90, 300, x.device)
        engine.logit_grad(x, y, torch.tensor(10.0), torch.tensor(-5.0), negatives, totals, True, logit_grad[:90, :300])
        products = torch.zeros(300, 24)
        engine.product(logit_grad[:90, :300], x, True, None, products, None, 1.0)
    dots = x.double() @ y.double().T
    g = torch.sigmoid(10 * dots - 5)
    truth = torch.stack([F.softplus(10 * dots - 5).sum(), (g * dots).sum(), g.sum()])
    assert ((totals.sum(1) - truth).abs() <= 1e-6 * torch.stack([truth[0], (g * dots.abs()).sum(), g.sum()])).all()
    assert (products.double() - g.T @ x.double()).norm() <= 2**-8 * (g.T @ x.double()).norm()
    assert (logit_grad[:90, :300].double() - g).norm() <= 2**-8 * g.norm()


def test_more_texts_than_images_and_an_offset():
    x, y = embeddings(300, 24, torch.bfloat16)
    with on_hopper():
        found = results(functools.partial(sigmoid_loss, offset=150), x[:90], y, 10.0, -10.0, torch.bfloat16)
    truth = results(functools.partial(reference.sigmoid_loss, offset=150), x[:90], y, 10.0, -10.0, torch.float64)
    assert all((found[name].double() - true).norm() <= 2**-7 * true.norm() for name, true in truth.items())


@pytest.mark.parametrize("reduction", ["images", "none"])
def test_groups_and_weights_take_g_from_the_portable_kernel(reduction):
    """And its products from the kernels here."""
    x, y = embeddings(150, 24, torch.bfloat16)
    options = dict(image_groups=torch.arange(70) % 9, text_groups=torch.arange(150) % 11, reduction=reduction)
    options["text_weight"] = torch.linspace(0, 2, 150)

    def total(*inputs: Tensor, loss=sigmoid_loss) -> Tensor:
        return loss(*inputs, **options).sum()

    with on_hopper():
        found = results(total, x[:70], y, 10.0, -10.0, torch.bfloat16)
    truth = results(functools.partial(total, loss=reference.sigmoid_loss), x[:70], y, 10.0, -10.0, torch.float64)
    assert all((found[name].double() - true).norm() <= 2**-7 * true.norm() for name, true in truth.items())


def test_nothing_falls_back():
    x, y = embeddings(70, 24, torch.bfloat16)
    with pytest.raises(UnsupportedInputError, match=r"sigmoid_loss: image_embeds is on interpreter; supported: Hopper"):
        sigmoid_loss(x, y, 10.0, -10.0)
    with on_hopper(), pytest.raises(UnsupportedInputError, match=r"sigmoid_loss: image_embeds has dtype torch.float32"):
        sigmoid_loss(x.float(), y.float(), 10.0, -10.0)


# Lines of the kernels and their faulty replacements. test_linear_hopper.py plants the main loop's faults.
BROKEN = {
    "G is sent without a fence": ("        fence_async_shared()\n        async_store", "        async_store"),
    "G is written while it is sent": ("        tma.store_wait(pendings=BUFFERS - 1)\n", "        pass\n"),
    "the turns of the buffers are mixed up at the edge": (
        "middle of a turn.\n        tma.store_wait(pendings=0)", "middle of a turn.\n        pass"
    ),
    "the last G is not waited for": ("    if logit_grad_target is not None:\n        tma.store_wait(pendings=0)\n", ""),
    "sums start from zero": ("gl.store(totals, gl.load(totals) + loss_total)", "gl.store(totals, loss_total)"),
    "images past the last count": ("inside = (rows < images)[:, None] & ", "inside = "),
    "texts past the last count": (" | (first_column + BLOCK_N > texts)", ""),
    "positives are not seen": ("if has_positives | at_edge:", "if at_edge:"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_fault_in_the_kernel_is_found(broken, plant, small_blocks):
    """Each of these compiles, and each is found by a fault or by its numbers, under every seed."""
    plant(BROKEN[broken], [hopper_kernels], hopper_engine, "logit_grad_kernel")
    for seed in range(2):
        with pytest.raises((Fault, AssertionError)):
            for size in (256, 512):  # the last tiles are whole, and cut
                small_blocks(size)
                check(*embeddings(520, 24, torch.bfloat16), 1.0, -1.0, seed=seed)
