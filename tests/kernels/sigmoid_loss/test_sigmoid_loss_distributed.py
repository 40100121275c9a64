"""The loss of the global batch over processes (gloo), against one process in fp64 and open_clip, and its errors."""

import importlib.util
import os
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels import SigLipLoss, SigLIPPlusLoss, UnsupportedInputError

WIDTH = 16
SCALE, BIAS = 5.0, -3.0


def batch(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    x, y = (F.normalize(torch.randn(sum(sizes), WIDTH, generator=generator), dim=-1) for _ in range(2))
    return x, y


def own(values: Tensor, rank: int, sizes: tuple[int, ...]) -> Tensor:
    return values.split(list(sizes))[rank]


def open_clip_loss():
    """Only open_clip's module of losses: the package itself imports torchvision."""
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        return None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(found.origin).parent / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SigLipLoss


def loss_and_gradients(loss_function, rank: int, sizes: tuple[int, ...], weight: float) -> list[Tensor]:
    inputs = [own(v, rank, sizes).clone().requires_grad_() for v in batch(sizes)]
    inputs += [torch.tensor(v, requires_grad=True) for v in (SCALE, BIAS)]
    loss = loss_function(*inputs)
    (loss * weight).backward()
    return [loss.detach(), *(v.grad for v in inputs)]


def truth(sizes: tuple[int, ...], weights: list[float]) -> list[list[Tensor]]:
    """The expected results of every rank, from all pairs at once in fp64."""
    x, y = (v.double().requires_grad_() for v in batch(sizes))
    scales = [torch.tensor(SCALE, dtype=torch.float64, requires_grad=True) for _ in sizes]
    biases = [torch.tensor(BIAS, dtype=torch.float64, requires_grad=True) for _ in sizes]
    per_image = torch.cat([torch.full((n, 1), 0.0) + s for n, s in zip(sizes, scales, strict=True)])
    logits = x @ y.T * per_image + torch.cat([b.expand(n, 1) for n, b in zip(sizes, biases, strict=True)])
    rows = -F.logsigmoid((2 * torch.eye(len(x), dtype=torch.float64) - 1) * logits).sum(1)
    losses = [own(rows, rank, sizes).sum() * len(sizes) / len(x) for rank in range(len(sizes))]
    torch.stack([loss * weight for loss, weight in zip(losses, weights, strict=True)]).sum().backward()
    return [
        [
            losses[rank].detach(),
            own(x.grad, rank, sizes),
            own(y.grad, rank, sizes),
            scales[rank].grad,
            biases[rank].grad,
        ]
        for rank in range(len(sizes))
    ]


def _cases(rank: int, sizes: tuple[int, ...]) -> dict:
    found = {}
    for weights in ("same", "different"):
        weight = 1.5 if weights == "same" else 1.0 + rank
        for implementation in ("ring", "gather"):
            for backend in ("chunked", "triton") if len(sizes) == 2 else ("chunked",):
                loss = SigLipLoss(rank=rank, world_size=len(sizes), dist_impl=implementation, backend=backend)
                key = (weights, implementation, backend)
                found[key] = loss_and_gradients(loss, rank, sizes, weight)
    for implementation in ("bidir", "shift", "reduce", "gather"):
        for chunk_size in (0, 2):
            loss = SigLipLoss(False, rank, len(sizes), implementation, chunk_size)
            found["siglip_kernels", implementation, chunk_size] = loss_and_gradients(loss, rank, sizes, 1.0)
        open_clip = open_clip_loss()
        if open_clip is not None and len(set(sizes)) == 1:
            loss = open_clip(rank=rank, world_size=len(sizes), dist_impl=implementation)
            found["open_clip", implementation] = loss_and_gradients(loss, rank, sizes, 1.0)
    found["overridden"] = _overridden(rank, sizes)
    x, y = (own(v, rank, sizes) for v in batch(sizes))
    loss = SigLipLoss(rank=rank, world_size=len(sizes), average_loss=True)
    found["average"] = loss(x, y, SCALE, BIAS)
    found["dictionary"] = loss(x, y, torch.tensor([SCALE]), None, output_dict=True)
    found["errors"] = []
    bad = [
        (x if rank else x.int(), y),
        (x, y.half() if rank else y),
        (x[:, :8] if rank else x, y[:, :8] if rank else y),
    ]
    for pair in (*bad, (x[:0] if rank == 1 else x, y[:0] if rank == 1 else y)):
        try:
            loss(*pair, SCALE, BIAS)
        except UnsupportedInputError as error:
            found["errors"].append(str(error))
    found["after errors"] = loss(x, y, SCALE, BIAS)
    found["data parallel"] = _data_parallel(rank, sizes)
    return found


def _overridden(rank: int, sizes: tuple[int, ...]) -> dict:
    """Results of subclasses that take half of every label, which change nothing else."""

    def with_half_labels(base):
        class Halved(base):
            def get_ground_truth(self, device, dtype, num_logits, negative_only=False):
                return super().get_ground_truth(device, dtype, num_logits, negative_only=negative_only) / 2

        return Halved

    found = {}
    loss = with_half_labels(SigLipLoss)(rank=rank, world_size=len(sizes), average_loss=True)
    with pytest.raises(UnsupportedInputError) as refused:
        loss(*(own(v, rank, sizes) for v in batch(sizes)), SCALE, BIAS, offset=0 if rank == 1 else None)
    found["refused"] = str(refused.value)
    try:
        found["average"] = loss(*(own(v, rank, sizes) for v in batch(sizes)), SCALE, BIAS)
    except UnsupportedInputError as error:
        return {**found, "error": str(error)}
    found["siglip_kernels"] = loss_and_gradients(
        with_half_labels(SigLipLoss)(rank=rank, world_size=len(sizes)), rank, sizes, 1.0 + rank
    )
    open_clip = open_clip_loss()
    if open_clip is not None:
        loss = with_half_labels(open_clip)(rank=rank, world_size=len(sizes), dist_impl="gather")
        found["open_clip"] = loss_and_gradients(loss, rank, sizes, 1.0 + rank)
    return found


@pytest.fixture(scope="module", params=[(8, 8), (7, 3, 6), (4, 4, 4, 4)], ids=str)
def results(request, tmp_path_factory):
    sizes = request.param
    return sizes, ranks.run(_cases, len(sizes), tmp_path_factory.mktemp("ranks"), sizes)


@pytest.mark.parametrize("weights", ["same", "different"])
@pytest.mark.parametrize("implementation", ["ring", "gather"])
def test_equals_one_process_in_fp64(results, implementation, weights):
    sizes, found = results
    true = truth(sizes, [1.5 if weights == "same" else 1.0 + rank for rank in range(len(sizes))])
    for rank, results in enumerate(found):
        for backend in ("chunked", "triton") if len(sizes) == 2 else ("chunked",):
            for result, expected in zip(results[weights, implementation, backend], true[rank], strict=True):
                assert (result - expected).norm() <= 1e-5 * expected.norm()


def test_mean_over_ranks_is_the_loss_of_the_whole_batch(results):
    sizes, found = results
    whole = torch.stack([rank[0] for rank in truth(sizes, [1.0] * len(sizes))]).mean()
    averages = [results["average"] for results in found]
    assert all(torch.equal(average, averages[0]) for average in averages)
    assert torch.allclose(averages[0].double(), whole, rtol=1e-6)
    assert torch.equal(found[0]["after errors"], averages[0])
    assert found[0]["dictionary"].keys() == {"contrastive_loss"}


@pytest.mark.parametrize("implementation", ["bidir", "shift", "reduce", "gather"])
def test_equals_open_clip(results, implementation):
    sizes, found = results
    if len(set(sizes)) > 1:
        true = truth(sizes, [1.0] * len(sizes))  # open_clip requires equal batches
    elif ("open_clip", implementation) not in found[0]:
        pytest.skip("open_clip is not installed")
    for rank, results in enumerate(found):
        expected = true[rank] if len(set(sizes)) > 1 else results["open_clip", implementation]
        for chunk_size in (0, 2):
            for result, other in zip(results["siglip_kernels", implementation, chunk_size], expected, strict=True):
                assert (result - other).norm() <= 1e-5 * other.norm()


def test_overridden_methods_see_the_texts_of_all_ranks(results):
    sizes, found = results
    mine = [results["overridden"] for results in found]
    for rank, results in enumerate(mine):
        assert ("offset is given, but get_ground_truth" if rank == 1 else "refused by rank 1") in results["refused"]
    if len(set(sizes)) > 1:
        assert all("differ between ranks in number" in results["error"] for results in mine)
        return
    losses = [results["siglip_kernels"][0] for results in mine]
    assert all(torch.allclose(results["average"], torch.stack(losses).mean()) for results in mine)
    if "open_clip" not in mine[0]:
        pytest.skip("open_clip is not installed")
    for results in mine:
        for result, other in zip(results["siglip_kernels"], results["open_clip"], strict=True):
            assert (result - other).norm() <= 1e-5 * other.norm()


def test_bad_input_of_one_rank_ends_all_of_them(results):
    _, found = results
    for rank, results in enumerate(found):
        integer, half, width, empty = results["errors"]
        assert ("has dtype torch.int32" if rank == 0 else "refused by rank 0") in integer
        assert ("refused by rank 1" if rank == 0 else "has dtype torch.float16") in half
        assert "differ between ranks in width: [16, 8" in width
        assert ("at least one pair" if rank == 1 else "refused by rank 1") in empty


def _data_parallel(rank: int, sizes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(_Towers())
    loss = SigLipLoss(rank=rank, world_size=len(sizes))
    model.zero_grad()
    for _ in range(2):  # a second step: an exchange leaves no state behind
        model.zero_grad()
        loss(*model(*(own(v, rank, sizes) for v in batch(sizes)))).backward()
    return [parameter.grad for parameter in model.parameters()]


class _Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image = torch.nn.Linear(WIDTH, 8)
        self.text = torch.nn.Linear(WIDTH, 8)
        self.log_scale = torch.nn.Parameter(torch.tensor(1.0))
        self.bias = torch.nn.Parameter(torch.tensor(-2.0))

    def forward(self, x, y):
        return F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1), self.log_scale.exp(), self.bias


def test_data_parallel_gradients_are_those_of_the_whole_batch(results):
    sizes, found = results
    torch.manual_seed(0)
    model = _Towers().double()
    SigLipLoss()(*model(*(v.double() for v in batch(sizes)))).backward()
    for results in found:
        for result, parameter in zip(results["data parallel"], model.parameters(), strict=True):
            assert (result - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


def _dies(rank: int, sizes: tuple[int, ...]) -> str:
    dist.barrier()  # both have connected
    if rank == 1:
        os._exit(0)
    try:
        SigLipLoss(rank=rank, world_size=2)(*(own(v, rank, sizes) for v in batch(sizes)), SCALE, BIAS)
    except RuntimeError as error:  # torch.distributed's
        return str(error)
    return "no error"


def test_a_dead_rank_ends_the_others(tmp_path):
    context = ranks.start(_dies, 2, tmp_path, (2, 2))
    for process in context.processes:
        process.join(50)
    assert not any(process.is_alive() for process in context.processes)
    message = ranks.result(tmp_path, 0)
    assert message != "no error"


def test_world_of_one_is_the_local_loss():
    x, y = batch((9,))
    assert torch.equal(SigLipLoss()(x, y, SCALE, BIAS), SigLipLoss(chunk_size=100)(x, y, SCALE, BIAS))


def test_without_a_process_group():
    x, y = batch((4,))
    with pytest.raises(RuntimeError, match="init_process_group"):
        SigLipLoss(rank=0, world_size=2)(x, y, SCALE, BIAS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_horovod": True}, "use_horovod"),
        ({"dist_impl": "star"}, "dist_impl is 'star'"),
        ({"dist_impl": "ring", "bidir": True}, "bidir is True"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"chunk_size": -1}, "chunk_size is -1"),
        ({"cache_labels": 1024}, "cache_labels is 1024; supported: True or False, or chunk_size by name"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(UnsupportedInputError, match=message):
        SigLipLoss(**arguments)


def test_scale_that_is_not_a_scalar():
    x, y = batch((4,))
    with pytest.raises(UnsupportedInputError, match="logit_scale has shape"):
        SigLipLoss()(x, y, torch.ones(2), BIAS)


@pytest.mark.parametrize("kind", [SigLipLoss, SigLIPPlusLoss])
def test_errors_name_the_class(kind):
    x = torch.ones(2, 8)
    for call in (
        lambda: kind(backend="cuda"),
        lambda: kind()(x, x[:, :4], SCALE, BIAS),
        lambda: kind(rank=0, world_size=2)(x, x, SCALE, BIAS),
        lambda: torch.compile(kind(), backend="eager")(x, x[:, :4], SCALE, BIAS),
    ):
        with pytest.raises((ValueError, RuntimeError), match=rf"^{kind.__name__}: "):
            call()
