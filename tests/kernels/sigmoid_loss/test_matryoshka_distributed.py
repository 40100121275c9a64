"""The losses of prefixes of the global batch over processes (gloo), against one process in fp64."""

from typing import Any

import pytest
import ranks
import torch
from lonely_rank import Alone
from torch import Tensor

from siglip_kernels import SigLipLoss, SigLIPPlusLoss, UnsupportedInputError, matryoshka_sigmoid_loss, reference
from siglip_kernels.sigmoid_loss.distributed import Wanted, ring
from siglip_kernels.sigmoid_loss.matryoshka.blocks import Walk
from siglip_kernels.sigmoid_loss.matryoshka.distributed import PrefixPass
from siglip_kernels.sigmoid_loss.matryoshka.engines import make_prefix_engine
from siglip_kernels.sigmoid_loss.pairs import Pairs, matches, plus_weights

COLUMNS, WIDTHS = 26, (5, 8, 24)
SCALES, BIASES, WIDTH_WEIGHTS = (4.0, 8.0, 10.0), (-3.0, -6.0, -8.0), (1.0, 0.5, 2.0)
ROUTES = ("ring", "gather")
Sizes = tuple[tuple[int, ...], tuple[int, ...]]  # images and texts of each rank


def batch(sizes: Sizes, dtype: torch.dtype) -> dict[str, Tensor]:
    """Embeddings whose prefixes differ in norm, groups without a text or an image, weights of several magnitudes."""
    generator = torch.Generator().manual_seed(3)
    images, texts = map(sum, sizes)
    columns = torch.logspace(0, -1, COLUMNS)
    return {
        "image_embeds": (columns * torch.randn(images, COLUMNS, generator=generator)).to(dtype),
        "text_embeds": (columns * torch.randn(texts, COLUMNS, generator=generator)).to(dtype),
        "image_groups": torch.randint(-1, 6, (images,), generator=generator),
        "text_groups": torch.randint(-1, 6, (texts,), generator=generator),
        "image_weight": torch.rand(images, generator=generator),
        "text_weight": 10 ** (4 * torch.rand(texts, generator=generator)),
    }


def own(values: Tensor, name: str, rank: int, sizes: Sizes) -> Tensor:
    return values.split(list(sizes[name.startswith("text")]))[rank].clone()


def results(loss, rank: int, sizes: Sizes, dtype: torch.dtype, upstream: tuple[float, ...], **options: Any) -> list:
    """This rank's losses and gradients. options: those that are None are left out, with the batch's."""
    inputs = {name: own(v, name, rank, sizes) for name, v in batch(sizes, dtype).items()}
    leaves = [inputs.pop(f"{side}_embeds").requires_grad_() for side in ("image", "text")]
    at_least = torch.promote_types(dtype, torch.float32)
    leaves += [torch.tensor(values, dtype=at_least, requires_grad=True) for values in (SCALES, BIASES)]
    chosen = {name: value for name, value in {**inputs, **options}.items() if value is not None}
    losses = matryoshka_sigmoid_loss(*leaves, WIDTHS, loss=loss, width_weights=WIDTH_WEIGHTS, **chosen)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, torch.tensor(upstream, dtype=losses.dtype))]


CASES: dict[str, dict[str, Any]] = {
    "groups": dict(positive_weight=2.0, negative_weight=0.5, ignore=3),
    "positives": dict(reduction="positives"),
    "pairs": dict(reduction="pairs"),
}
NO_GROUPS: dict[str, Any] = dict(image_groups=None, text_groups=None, image_weight=None, text_weight=None)
UPSTREAMS = {"equal": (1.5, 1.5, 1.5), "of widths": (1.0, -0.5, 2.0)}


def upstream_of(rank: int, kind: str) -> tuple[float, ...]:
    return (1.0 + rank, 1.0, 0.5 * rank) if kind == "of ranks" else UPSTREAMS[kind]


def work(rank: int, sizes: Sizes, backend: str, dtype: torch.dtype) -> dict:
    found: dict[Any, Any] = {}
    for route in ROUTES:
        here = dict(rank=rank, world_size=len(sizes[0]), dist_impl=route, backend=backend, chunk_size=4)
        for kind in (*UPSTREAMS, "of ranks"):
            loss = SigLipLoss(**here, **CASES["groups"])
            found["groups", route, kind] = results(loss, rank, sizes, dtype, upstream_of(rank, kind))
        found["offset", route] = results(
            SigLipLoss(**here), rank, sizes, dtype, UPSTREAMS["equal"], **NO_GROUPS, offset=4
        )
        if backend == "triton":
            continue
        for case in ("positives", "pairs"):
            loss = SigLipLoss(**here, **CASES[case])
            found[case, route] = results(loss, rank, sizes, dtype, UPSTREAMS["equal"])
        found["plus", route] = results(SigLIPPlusLoss(**here), rank, sizes, dtype, UPSTREAMS["equal"])
        loss = SigLipLoss(**here, average_loss=True)
        found["average", route] = results(loss, rank, sizes, dtype, UPSTREAMS["equal"])
        found["repeated", route] = results(loss, rank, sizes, dtype, UPSTREAMS["equal"])
        found["images of a rank", route] = _images_of_a_rank(loss, rank, sizes, dtype)
        found["one side", route] = _one_side(loss, rank, sizes, dtype)
    if backend == "chunked":
        found["errors"] = _errors(rank, sizes)
        found["products"] = _products(rank, sizes)
    return found


def _one_side(loss, rank: int, sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of images and of texts where the other, and the scalars, require none."""
    found = []
    for side in ("image", "text"):
        values = {name: own(v, name, rank, sizes) for name, v in batch(sizes, dtype).items()}
        leaf = values[f"{side}_embeds"].requires_grad_()
        scalars = dict(logit_scales=SCALES, logit_biases=BIASES, widths=WIDTHS, width_weights=WIDTH_WEIGHTS)
        (1.5 * matryoshka_sigmoid_loss(**values, **scalars, loss=loss).sum()).backward()
        found.append(leaf.grad)
    return found


def _images_of_a_rank(loss, rank: int, sizes: Sizes, dtype: torch.dtype) -> Tensor | None:
    """Gradients of rank 0's images, where the other ranks' embeddings require none, under losses of several weights."""
    values = {name: own(v, name, rank, sizes) for name, v in batch(sizes, dtype).items()}
    scales = torch.tensor(SCALES, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    leaf = values["image_embeds"].requires_grad_(rank == 0)
    losses = matryoshka_sigmoid_loss(**values, logit_scales=scales, logit_biases=BIASES, widths=WIDTHS, loss=loss)
    losses.backward(torch.tensor(UPSTREAMS["equal"]).to(losses) * torch.tensor(WIDTH_WEIGHTS).to(losses))
    return leaf.grad


def _errors(rank: int, sizes: Sizes) -> list[str]:
    loss, found = SigLipLoss(rank=rank, world_size=len(sizes[0])), []
    values = {name: own(v, name, rank, sizes) for name, v in batch(sizes, torch.float32).items()}
    for changed in (
        {"widths": (5, 8) if rank else WIDTHS},
        {"widths": (8, 5) if rank == 1 else WIDTHS},
        {"text_groups": values["text_groups"][1:] if rank == 1 else values["text_groups"]},
        {"offsets": 1} if rank == 1 else {},
    ):
        arguments = dict(logit_scales=4.0, logit_biases=-3.0, widths=WIDTHS, loss=loss, **values)
        with pytest.raises((UnsupportedInputError, TypeError)) as refused:
            matryoshka_sigmoid_loss(**{**arguments, **changed})
        found.append(str(refused.value))
    return found


def _products(rank: int, sizes: Sizes) -> int:
    """How many blocks of pairs a forward and a backward pass compute, whatever the number of widths."""
    calls, add = [], Walk.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "add", lambda *arguments: calls.append(0) or add(*arguments))
        loss = SigLipLoss(rank=rank, world_size=len(sizes[0]))
        results(loss, rank, sizes, torch.float32, UPSTREAMS["equal"])
    return len(calls)


@pytest.fixture(
    scope="module",
    params=[
        (((7, 3), (5, 9)), "chunked", torch.float64),
        (((7, 3, 6), (5, 9, 2)), "chunked", torch.float32),
        (((2, 5, 1, 4), (3, 1, 6, 2)), "chunked", torch.float32),
        (((5, 4), (3, 8)), "triton", torch.float32),
    ],
    ids=["2 ranks fp64", "3 ranks", "4 ranks", "2 ranks triton"],
)
def outcome(request, tmp_path_factory):
    sizes, backend, dtype = request.param
    found = ranks.run(work, len(sizes[0]), tmp_path_factory.mktemp("ranks"), sizes, backend, dtype)
    return sizes, dtype, found


def truth(sizes: Sizes, dtype: torch.dtype, upstreams: list, divisor: float, **options: Any) -> list[list[Tensor]]:
    """The results of every rank, whose losses are sums over its images divided by `divisor`, in fp64."""
    values = {name: v.double() if v.is_floating_point() else v for name, v in batch(sizes, dtype).items()}
    x, y = (values.pop(f"{side}_embeds").requires_grad_() for side in ("image", "text"))
    values = {name: value for name, value in {**values, **options}.items() if value is not None}
    scales, biases = ([torch.tensor(each).double().requires_grad_() for _ in sizes[0]] for each in (SCALES, BIASES))
    each = []
    for number, (width, weight) in enumerate(zip(WIDTHS, WIDTH_WEIGHTS, strict=True)):
        # The definition takes a scale and a bias of each image.
        of_images = [
            torch.cat([v[number].expand(n) for v, n in zip(vs, sizes[0], strict=True)]) for vs in (scales, biases)
        ]
        unit = (torch.nn.functional.normalize(v[:, :width], dim=1) for v in (x, y))
        losses = reference.sigmoid_loss(*unit, *of_images, reduction="none", **values) * weight / divisor
        each.append(torch.stack([part.sum() for part in losses.split(list(sizes[0]))]))
    losses = torch.stack(each, 1)  # (ranks, widths)
    (losses * torch.tensor(upstreams, dtype=torch.float64)).sum().backward()
    return [
        [
            losses[rank].detach(),
            own(x.grad, "image", rank, sizes),
            own(y.grad, "text", rank, sizes),
            scales[rank].grad,
            biases[rank].grad,
        ]
        for rank in range(len(sizes[0]))
    ]


def check(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for result, exact in zip(found, expected, strict=True):
        assert (result - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("kind", [*UPSTREAMS, "of ranks"])
@pytest.mark.parametrize("route", ROUTES)
def test_groups_and_weights_equal_one_process(outcome, route, kind):
    sizes, dtype, found = outcome
    upstreams, divisor = [upstream_of(rank, kind) for rank in range(len(found))], sum(sizes[0]) / len(found)
    true = truth(sizes, dtype, upstreams, divisor, **CASES["groups"])
    for rank, results in enumerate(found):
        check(results["groups", route, kind], true[rank], dtype)


@pytest.mark.parametrize("route", ROUTES)
def test_an_offset_counts_the_images_and_texts_of_all_ranks(outcome, route):
    sizes, dtype, found = outcome
    divisor = sum(sizes[0]) / len(found)
    true = truth(sizes, dtype, [UPSTREAMS["equal"]] * len(found), divisor, **NO_GROUPS, offset=4)
    for rank, results in enumerate(found):
        check(results["offset", route], true[rank], dtype)


@pytest.mark.parametrize("case", ["positives", "pairs", "plus"])
@pytest.mark.parametrize("route", ROUTES)
def test_reductions_and_plus_count_in_the_global_batch(outcome, route, case):
    sizes, dtype, found = outcome
    if (case, route) not in found[0]:
        pytest.skip("chunked only")
    values, options = batch(sizes, dtype), {}
    images, texts = values["image_groups"], values["text_groups"]
    divisor = len(images) * len(texts) / len(found)
    if case == "positives":
        same = (images[:, None] == texts) & (images[:, None] >= 0)
        divisor = same.sum().item() / len(found)
    if case == "plus":
        options["positive_weight"] = plus_weights(matches(images, texts), matches(images, images), dtype=torch.float64)
    true = truth(sizes, dtype, [UPSTREAMS["equal"]] * len(found), divisor, **options)
    for rank, results in enumerate(found):
        check(results[case, route], true[rank], dtype)


@pytest.mark.parametrize("route", ROUTES)
def test_the_average_is_that_of_all_ranks_and_runs_are_bitwise_equal(outcome, route):
    sizes, dtype, found = outcome
    if ("average", route) not in found[0]:
        pytest.skip("chunked only")
    true = truth(sizes, dtype, [UPSTREAMS["equal"]] * len(found), sum(sizes[0]) / len(found))
    mean = torch.stack([losses for losses, *_ in true]).mean(0)
    for rank, results in enumerate(found):
        check(results["average", route], [mean, *true[rank][1:]], dtype)
        assert all(map(torch.equal, results["average", route], results["repeated", route]))
        check(results["one side", route], true[rank][1:3], dtype)
        of_images = results["images of a rank", route]
        if rank == 0:
            check([of_images], true[rank][1:2], dtype)
        else:
            assert of_images is None


def test_one_pass_serves_all_widths_and_bad_input_of_a_rank_ends_all(outcome):
    _, _, found = outcome
    if "errors" not in found[0]:
        pytest.skip("chunked only")
    for rank, results in enumerate(found):
        widths, order, groups, unknown = results["errors"]
        assert "differ between ranks in widths of prefixes; supported" in widths
        assert (r"widths is [8, 5]" if rank == 1 else "refused by rank 1") in order
        assert ("text_groups has shape" if rank == 1 else "refused by rank 1") in groups
        assert ("unexpected keyword argument 'offsets'" if rank == 1 else "refused by rank 1") in unknown
        assert results["products"] == len(found)


def test_the_ring_takes_the_same_memory_for_any_number_of_ranks():
    """Groups, weights and ratios of norms included; all its buffers take part in an exchange."""
    x, y = torch.ones(5, 16), torch.ones(5, 16)
    pairs = Pairs(text_groups=torch.arange(5), image_groups=torch.arange(5))
    pairs = pairs.weighted(torch.ones(5), torch.ones(5), 5)

    def memory(world: int) -> int:
        peers, scalars = Alone(None, 0, (5,) * world, (5,) * world), torch.ones(2)
        engine = make_prefix_engine("chunked", x, (8, 16))
        work = PrefixPass(engine, peers, x, y, (8, 16), scalars, scalars, scalars, pairs, 5.0, Wanted(True, True, True))
        ring(work, work.weights)
        return sum(peers.memory.values())

    # This rank's texts and two blocks of them with ratios, groups and weights, and three blocks of sums.
    assert memory(3) == memory(8) == 3 * 5 * ((16 + 2) * 4 + 8 + 4) + 3 * 5 * (16 + 2) * 4
