"""Groups, weights, SigLIP+ and reductions of the global batch over processes (gloo), against one process in fp64."""

import dataclasses
import functools
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from lonely_rank import Alone
from torch import Tensor

from siglip_kernels import SigLipLoss, SigLIPPlusLoss, UnsupportedInputError, reference, sigmoid_loss
from siglip_kernels.sigmoid_loss import triton_engine
from siglip_kernels.sigmoid_loss.distributed import Pass, Wanted, ring
from siglip_kernels.sigmoid_loss.engines import make_engine
from siglip_kernels.sigmoid_loss.pairs import Pairs, matches, plus_weights

WIDTH = 12
Sizes = tuple[tuple[int, ...], tuple[int, ...]]  # images and texts of each rank
OFFSETS = (0, 4, -7)  # also of images and texts on different ranks
REDUCTIONS = ("images", "pairs", "positives", "sum")


def batch(sizes: Sizes) -> dict[str, Tensor]:
    """Groups of all ranks, some without a text or an image, and weights that differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(1)
    images, texts = map(sum, sizes)
    return {
        "image_features": F.normalize(torch.randn(images, WIDTH, generator=generator), dim=-1),
        "text_features": F.normalize(torch.randn(texts, WIDTH, generator=generator), dim=-1),
        "image_groups": torch.randint(-1, 6, (images,), generator=generator),
        "text_groups": torch.randint(-1, 6, (texts,), generator=generator),
        "image_weight": torch.rand(images, generator=generator),
        "text_weight": 10 ** (4 * torch.rand(texts, generator=generator)),
    }


def positive_weights(sizes: Sizes) -> Tensor:
    return torch.linspace(0.5, 3.0, sum(sizes[0]))


def own(values: Tensor, name: str, rank: int, sizes: Sizes) -> Tensor:
    return values.split(list(sizes[name.startswith("text")]))[rank].clone()


def results(loss, rank: int, sizes: Sizes, weight: float, without: tuple[str, ...] = ()) -> list[Tensor]:
    """This rank's loss and gradients."""
    inputs = {name: own(values, name, rank, sizes) for name, values in batch(sizes).items() if name not in without}
    leaves = [inputs.pop(f"{side}_features").requires_grad_() for side in ("image", "text")]
    leaves += [torch.tensor([value], requires_grad=True) for value in (5.0, -3.0)]
    value = loss(*leaves, **inputs)
    (value * weight).backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def work(rank: int, sizes: Sizes, backend: str) -> dict:
    found: dict[Any, Any] = {}
    for dist_impl in ("ring", "gather"):
        here = dict(rank=rank, world_size=len(sizes[0]), dist_impl=dist_impl, backend=backend)
        for weights in ("same", "different"):
            upstream = 1.5 if weights == "same" else 1.0 + rank
            loss = SigLipLoss(**here, positive_weight=2.0, negative_weight=0.5, ignore=3)
            found["groups", dist_impl, weights] = results(loss, rank, sizes, upstream)
        for symmetric in (True, False):
            loss = SigLIPPlusLoss(**here, symmetric=symmetric)
            found["plus", dist_impl, symmetric] = results(loss, rank, sizes, 1.0)
        groups = ("image_groups", "text_groups")
        for offset in OFFSETS:
            loss = functools.partial(SigLipLoss(**here, reduction="positives"), offset=offset)
            found["offset", dist_impl, offset] = results(loss, rank, sizes, 1.0, (*groups, "text_weight"))
        loss = functools.partial(SigLipLoss(**here), positive_weight=own(positive_weights(sizes), "image", rank, sizes))
        found["positive_weight", dist_impl] = results(loss, rank, sizes, 1.0)
        no_weights = ("image_weight", "text_weight")
        for reduction in REDUCTIONS:
            loss = SigLipLoss(**here, reduction=reduction)
            found["reduction", dist_impl, reduction] = results(loss, rank, sizes, 1.0, no_weights)
    loss = SigLipLoss(rank=rank, world_size=len(sizes[0]), backend=backend)
    found["errors"] = []
    for name in ("image_groups", "text_weight"):
        inputs = {key: own(values, key, rank, sizes) for key, values in batch(sizes).items()}
        if rank == 1:
            inputs[name] = inputs[name][1:]
        for case in (inputs, {**inputs, **({"text_weight": None, "image_weight": None} if rank else {})}):
            try:
                loss(**case, logit_scale=1.0, logit_bias=0.0)
            except UnsupportedInputError as error:
                found["errors"].append(str(error))
    inputs = {key: own(values, key, rank, sizes) for key, values in batch(sizes).items() if "features" in key}
    for options in ({"offset": rank}, {"offset": 0, "positive_weight": "heavy" if rank == 1 else 1.0}):
        with pytest.raises(UnsupportedInputError) as refused:
            loss(**inputs, **options, logit_scale=1.0, logit_bias=0.0)
        found["errors"].append(str(refused.value))
    return found


@pytest.fixture(scope="module", params=[((7, 3, 6), (5, 9, 2), "chunked"), ((5, 4), (3, 8), "triton")], ids=str)
def outcome(request, tmp_path_factory):
    images, texts, backend = request.param
    return (images, texts), ranks.run(work, len(images), tmp_path_factory.mktemp("ranks"), (images, texts), backend)


def truth(sizes: Sizes, upstreams: list[float], divisor: float, **options: Any) -> list[list[Tensor]]:
    """The results of every rank, whose loss is the sum over its images divided by `divisor`, in fp64."""
    values = {name: v.double() if v.is_floating_point() else v for name, v in batch(sizes).items()}
    x, y = (values.pop(f"{side}_features").requires_grad_() for side in ("image", "text"))
    scales, biases = ([torch.tensor(v).double().requires_grad_() for _ in sizes[0]] for v in (5.0, -3.0))
    # The definition takes a scale and a bias of each image.
    of_images = [torch.cat([v.expand(n) for v, n in zip(vs, sizes[0], strict=True)]) for vs in (scales, biases)]
    values = {name: value for name, value in {**values, **options}.items() if value is not None}
    losses = reference.sigmoid_loss(x, y, *of_images, reduction="none", **values) / divisor
    mine = [part.sum() for part in losses.split(list(sizes[0]))]
    torch.stack([loss * upstream for loss, upstream in zip(mine, upstreams, strict=True)]).sum().backward()
    gradients = [(own(x.grad, "image", rank, sizes), own(y.grad, "text", rank, sizes)) for rank in range(len(mine))]
    return [[loss.detach(), *gradients[rank], scales[rank].grad, biases[rank].grad] for rank, loss in enumerate(mine)]


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    for result, exact in zip(found, expected, strict=True):
        assert (result.reshape(exact.shape) - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("weights", ["same", "different"])
@pytest.mark.parametrize("dist_impl", ["ring", "gather"])
def test_groups_and_weights_equal_one_process(outcome, dist_impl, weights):
    sizes, found = outcome
    upstreams = [1.5 if weights == "same" else 1.0 + rank for rank in range(len(found))]
    divisor = sum(sizes[0]) / len(found)
    true = truth(sizes, upstreams, divisor, positive_weight=2.0, negative_weight=0.5, ignore=3)
    for rank, results in enumerate(found):
        check(results["groups", dist_impl, weights], true[rank])


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dist_impl", ["ring", "gather"])
def test_an_offset_counts_the_images_and_texts_of_all_ranks(outcome, dist_impl, offset):
    sizes, found = outcome
    images, texts = map(sum, sizes)
    positives = sum(0 <= image + offset < texts for image in range(images))
    options = dict(offset=offset, image_groups=None, text_groups=None, text_weight=None)
    true = truth(sizes, [1.0] * len(found), positives / len(found), **options)
    for rank, results in enumerate(found):
        check(results["offset", dist_impl, offset], true[rank])


@pytest.mark.parametrize("dist_impl", ["ring", "gather"])
def test_a_weight_of_the_positives_of_each_image(outcome, dist_impl):
    sizes, found = outcome
    divisor = sum(sizes[0]) / len(found)
    true = truth(sizes, [1.0] * len(found), divisor, positive_weight=positive_weights(sizes).double())
    for rank, results in enumerate(found):
        check(results["positive_weight", dist_impl], true[rank])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dist_impl", ["ring", "gather"])
def test_plus_counts_the_groups_of_all_ranks(outcome, dist_impl, symmetric):
    sizes, found = outcome
    images, texts = (batch(sizes)[f"{side}_groups"] for side in ("image", "text"))
    weight = plus_weights(matches(images, texts), matches(images, images), symmetric).double()
    divisor = len(images) * len(texts) / len(found)
    true = truth(sizes, [1.0] * len(found), divisor, positive_weight=weight)
    for rank, results in enumerate(found):
        check(results["plus", dist_impl, symmetric], true[rank])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dist_impl", ["ring", "gather"])
def test_reductions_are_those_of_the_global_batch(outcome, dist_impl, reduction):
    sizes, found = outcome
    values = batch(sizes)
    groups = {name: values[name] for name in ("image_groups", "text_groups")}
    embeds = values["image_features"].double(), values["text_features"].double()
    whole, total = (
        reference.sigmoid_loss(*embeds, 5.0, -3.0, reduction=name, **groups).item() for name in (reduction, "sum")
    )
    mean = torch.stack([results["reduction", dist_impl, reduction][0] for results in found]).mean().item()
    assert mean == pytest.approx(whole, rel=1e-6)
    divisor = total / whole / len(found)
    true = truth(sizes, [1.0] * len(found), divisor, image_weight=None, text_weight=None)
    for rank, results in enumerate(found):
        check(results["reduction", dist_impl, reduction], true[rank])


def test_bad_options_of_one_rank_end_all_of_them(outcome):
    _, found = outcome
    for rank, results in enumerate(found):
        groups, _, weights, kinds, offsets, positive = results["errors"]
        assert ("image_groups has shape" if rank == 1 else "refused by rank 1") in groups
        assert ("text_weight has shape" if rank == 1 else "refused by rank 1") in weights
        assert "differ between ranks in whether there are weights: [1, 0" in kinds
        assert "differ between ranks in offset: [0, 1" in offsets
        assert ("positive_weight is 'heavy'" if rank == 1 else "refused by rank 1") in positive


def test_what_the_modules_refuse():
    with pytest.raises(UnsupportedInputError, match="reduction is 'none' with several ranks"):
        SigLipLoss(rank=0, world_size=2, reduction="none")
    with pytest.raises(UnsupportedInputError, match="reduction is 'mean'"):
        SigLIPPlusLoss(reduction="mean")

    class Own(SigLipLoss):
        def get_ground_truth(self, *arguments, **named):
            return super().get_ground_truth(*arguments, **named)

    x, groups = torch.ones(2, 8), torch.tensor([0, 1])
    with pytest.raises(UnsupportedInputError, match="image_groups is given, but get_ground_truth is overridden"):
        Own()(x, x, 1.0, 0.0, image_groups=groups, text_groups=groups)
    with pytest.raises(UnsupportedInputError, match="negative_weight is given, but get_ground_truth is overridden"):
        Own(negative_weight=0.5)(x, x, 1.0, 0.0)


def test_chunks_in_triton(device):
    """chunk_size selects the images of a block, rounded up to whole tiles."""
    x, y = (F.normalize(torch.randn(300, 16, device=device), dim=-1) for _ in range(2))
    shapes, config = [], dataclasses.replace(triton_engine.config_for(x), block=512)

    def logit_grad(self, x, y, **arguments):
        shapes.append((len(x), len(y)))
        launch(self, x=x, y=y, **arguments)

    launch = triton_engine.TritonEngine.logit_grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_engine, "config_for", lambda embeds: config)
        patch.setattr(triton_engine.TritonEngine, "logit_grad", logit_grad)
        for chunk_size in (0, 100):
            loss = SigLipLoss(backend="triton", chunk_size=chunk_size)(x, y, 5.0, -3.0)
            assert torch.allclose(loss, reference.sigmoid_loss(x, y, 5.0, -3.0))
    assert shapes == [(300, 300), (256, 300), (44, 300)]
    with pytest.raises(UnsupportedInputError, match="sigmoid_loss: chunk_size is -1"):
        sigmoid_loss(x, y, 5.0, -3.0, chunk_size=-1)


@pytest.mark.parametrize("loss", [SigLipLoss(), SigLIPPlusLoss()], ids=["SigLipLoss", "SigLIPPlusLoss"])
def test_without_options_modules_are_the_plain_loss(loss):
    values = batch(((9,), (9,)))
    x, y = values["image_features"], values["text_features"]
    divisor = 9 if isinstance(loss, SigLIPPlusLoss) else 1
    assert torch.allclose(loss(x, y, 5.0, -3.0), reference.sigmoid_loss(x, y, 5.0, -3.0) / divisor)


def test_the_ring_takes_the_same_memory_for_any_number_of_ranks():
    """Groups and weights included; all its buffers take part in an exchange."""
    x, y = torch.ones(5, 16), torch.ones(5, 16)
    pairs = Pairs(text_groups=torch.arange(5), image_groups=torch.arange(5))
    pairs = pairs.weighted(torch.ones(5), torch.ones(5), 5)

    def memory(world: int) -> int:
        peers = Alone(None, 0, (5,) * world, (5,) * world)
        scalars, wanted = (torch.ones(()), torch.zeros(())), Wanted(True, True, True)
        work = Pass(make_engine("chunked", x), peers, x, y, *scalars, pairs, 5.0, wanted)
        ring(work, [torch.ones(())])
        return sum(peers.memory.values())

    # This rank's texts and two blocks of them with groups and weights, and three blocks of sums.
    assert memory(3) == memory(8) == 3 * 5 * (16 * 4 + 8 + 4) + 3 * 5 * 16 * 4
