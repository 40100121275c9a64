"""Every kernel is launched while the GPU of its tensors is current: Triton launches on the current GPU.

No GPU is needed: launchers, operators and derivatives are the real ones and get CPU tensors, but torch.cuda.device_of,
which makes a tensor's GPU current, and the launches themselves are recorded instead of carried out.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import siglip_kernels
from bench.compiled.launch import GPUS
from siglip_kernels.device import pretend
from siglip_kernels.sigmoid_loss import distributed, module
from siglip_kernels.sigmoid_loss.matryoshka.distributed import GlobalPrefixLosses
from siglip_kernels.sigmoid_loss.pairs import Pairs

triton = pytest.importorskip("triton")


class Launches:
    """The names of the kernels that were started, and of those started without making their tensors' device current."""

    def __init__(self) -> None:
        self.current: list[torch.device] = []
        self.started: set[str] = set()
        self.misplaced: set[str] = set()

    @contextmanager
    def device_of(self, tensor: Tensor) -> Iterator[None]:
        self.current.append(tensor.device)
        try:
            yield
        finally:
            self.current.pop()

    def start(self, kernel: Callable, grid: object) -> Callable[..., None]:
        def record(*arguments: object, **named: object) -> None:
            sources = [getattr(value, "base", value) for value in (*arguments, *named.values())]  # of descriptors
            devices = [value.device for value in sources if isinstance(value, Tensor)]
            assert devices
            self.started.add(full_name(kernel))
            if any(self.current[-1:] != [device] for device in devices):
                self.misplaced.add(full_name(kernel))

        return record


def full_name(kernel: Callable) -> str:
    function = kernel.fn  # type: ignore[attr-defined]
    return f"{function.__module__}.{function.__name__}"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    found = Launches()
    monkeypatch.setattr(torch.cuda, "device_of", found.device_of)
    monkeypatch.setattr(triton.runtime.jit.KernelInterface, "__getitem__", lambda self, grid: found.start(self, grid))
    yield found


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    """Of one process, so that collectives copy."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def attention(tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return siglip_kernels.attention(*(tensor(2, tokens, 2, 64, dtype=dtype) for _ in "qkv"))


def packed_attention() -> Tensor:
    boundaries = torch.tensor([0, 30, 100], dtype=torch.int32)
    return siglip_kernels.attention(*(tensor(100, 2, 64) for _ in "qkv"), cu_seqlens=boundaries)


def linear(depth: int = 64) -> Tensor:
    return siglip_kernels.linear(tensor(3, depth), tensor(64, depth), tensor(64), tensor(3, 64))


def mlp() -> Tensor:
    return siglip_kernels.mlp(tensor(3, 64), tensor(128, 64), tensor(128), tensor(64, 128), tensor(64))


def layer_norm(width: int = 64) -> Tensor:
    return siglip_kernels.layer_norm(tensor(3, width), tensor(width), tensor(width))


def pre_norm_mlp() -> Tensor:
    return siglip_kernels.pre_norm_mlp(
        tensor(3, 64), tensor(64), tensor(64), 1e-6, tensor(128, 64), tensor(128), tensor(64, 128), tensor(64)
    )


def pre_norm_qkv() -> Tensor:
    projections = [tensor(*shape) for _ in "qkv" for shape in ((64, 64), (64,))]
    q, k, v = siglip_kernels.pre_norm_qkv(tensor(2, 3, 64), tensor(64), tensor(64), 1e-6, *projections, 2)
    return q + k + v


def pre_norm_attention(tokens: int) -> Tensor:
    projections = [tensor(*shape) for _ in "qkvo" for shape in ((64, 64), (64,))]
    return siglip_kernels.pre_norm_attention(tensor(2, tokens, 64), tensor(64), tensor(64), 1e-6, *projections, 1)


def fp8_mlp() -> Tensor:
    parameters = (tensor(128, 64), tensor(128), tensor(64, 128), tensor(64))
    return siglip_kernels.fp8.mlp(tensor(3, 64), *parameters).detach().requires_grad_()


def fp8_pre_norm_attention() -> Tensor:
    projections = [tensor(*shape) for _ in "qkvo" for shape in ((64, 64), (64,))]
    out = siglip_kernels.fp8.pre_norm_attention(tensor(2, 16, 64), tensor(64), tensor(64), 1e-6, *projections, 1)
    return out.detach().requires_grad_()


def attention_pool() -> Tensor:
    parameters = (tensor(1, 1, 64), tensor(192, 64), tensor(192), tensor(64, 64), tensor(64))
    return siglip_kernels.attention_pool(tensor(2, 300, 64), *parameters, 1)


def patch_embed() -> Tensor:
    return siglip_kernels.patch_embed(tensor(2, 3, 32, 32), tensor(64, 3, 16, 16), tensor(64), tensor(4, 64))


def resize_normalize() -> Tensor:
    image, scale = torch.zeros(3, 9, 8, dtype=torch.uint8), torch.ones(3)
    values = siglip_kernels.resize_normalize([image], scale, scale, (4, 4), "bicubic", torch.bfloat16)
    return values + tensor(1)  # it has no gradient itself


def scalars() -> tuple[Tensor, Tensor]:
    return tensor(dtype=torch.float32), tensor(dtype=torch.float32)


def matryoshka_sigmoid_loss() -> Tensor:
    embeds, loss = (tensor(300, 64), tensor(300, 64)), siglip_kernels.sigmoid_loss
    return siglip_kernels.matryoshka_sigmoid_loss(*embeds, *scalars(), (32, 64), loss=loss)


def sigmoid_loss(**options: Any) -> Tensor:
    return siglip_kernels.sigmoid_loss(tensor(300, 64), tensor(300, 64), *scalars(), **options)


class OnlyRank(distributed.Peers):
    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor], tag: int = 0) -> list:
        for sent, received in zip(send, receive, strict=True):
            received.copy_(sent)
        return []


def only_rank(route: Callable, chunk_size: int = 0) -> distributed.GlobalBatch:
    peers = OnlyRank(torch.distributed.group.WORLD, 0, (300,), (300,))
    wanted = distributed.Wanted(image=True, text=True, scalars=True)
    return distributed.GlobalBatch("triton", chunk_size, peers, route, Pairs(), 300, wanted, average=False)


def global_loss(route: Callable, chunk_size: int = 0) -> Tensor:
    """The loss of the only rank."""
    batch = only_rank(route, chunk_size)
    return distributed.GlobalLoss.apply(tensor(300, 64), tensor(300, 64), *scalars(), batch)


def global_prefix_losses() -> Tensor:
    ones, batch = torch.ones(2), only_rank(distributed.ring)
    return GlobalPrefixLosses.apply(tensor(300, 64), tensor(300, 64), ones, ones, (32, 64), ones, batch)


CALLS: dict[str, Callable[[], Tensor]] = {
    "attention": lambda: attention(100),
    "attention of few tokens": lambda: attention(16),
    "attention in fp32": lambda: attention(100, torch.float32),
    "attention over packed sequences": packed_attention,
    "linear": linear,
    "linear of a long sum": lambda: linear(depth=4096),
    "mlp": mlp,
    "layer_norm": layer_norm,
    "layer_norm of wide rows": lambda: layer_norm(2**17),
    "pre_norm_mlp": pre_norm_mlp,
    "pre_norm_qkv": pre_norm_qkv,
    "pre_norm_attention": lambda: pre_norm_attention(100),
    "pre_norm_attention of few tokens": lambda: pre_norm_attention(16),
    "fp8.mlp": fp8_mlp,
    "fp8.pre_norm_attention": fp8_pre_norm_attention,
    "attention_pool": attention_pool,
    "patch_embed": patch_embed,
    "resize_normalize": resize_normalize,
    "matryoshka_sigmoid_loss": matryoshka_sigmoid_loss,
    "sigmoid_loss": sigmoid_loss,
    "sigmoid_loss with weights": lambda: sigmoid_loss(positive_weight=2.0),
    "sigmoid_loss of each image": lambda: sigmoid_loss(reduction="none").sum(),
    "sigmoid_loss around a ring": lambda: global_loss(distributed.ring),
    "sigmoid_loss in chunks": lambda: global_loss(distributed.ring, chunk_size=256),
    "sigmoid_loss whose texts are weighted": lambda: global_loss(distributed.ring) * torch.nan,  # equal to no other
    "sigmoid_loss of gathered texts": lambda: global_loss(distributed.gather),
    "matryoshka_sigmoid_loss around a ring": global_prefix_losses,
    "matryoshka_sigmoid_loss whose widths are weighted": lambda: global_prefix_losses() * torch.nan,
}


def every_kernel() -> set[str]:
    """By the ladder of names, what is launched ends in _kernel; other functions of Triton are called by kernels."""
    found = set()
    for found_module in pkgutil.walk_packages(siglip_kernels.__path__, "siglip_kernels."):
        if ".integrations" not in found_module.name:
            for value in vars(importlib.import_module(found_module.name)).values():
                if isinstance(value, triton.runtime.jit.KernelInterface) and full_name(value).endswith("_kernel"):
                    found.add(full_name(value))
    return found


def run(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, with the portable kernels and, where they support the call, Hopper's and Blackwell's."""
    for gpu, hopper, blackwell in (("h200", "0", "0"), ("h200", "1", "0"), ("b200", "0", "1")):
        monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", hopper)
        monkeypatch.setenv("SIGLIP_KERNELS_BLACKWELL", blackwell)
        portable = hopper == blackwell
        with pretend(GPUS[gpu]), nullcontext() if portable else suppress(siglip_kernels.UnsupportedInputError):
            CALLS[call]().float().sum().backward()


def test_every_kernel_is_launched_on_the_gpu_of_its_tensors(launches, process_group, monkeypatch):
    for call in CALLS:
        run(call, monkeypatch)
    assert launches.misplaced == set()
    assert launches.started == every_kernel()
    assert launches.current == []


@pytest.mark.parametrize("call", CALLS)
def test_a_launch_elsewhere_is_noticed(call, launches, process_group, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    run(call, monkeypatch)
    assert launches.started and launches.misplaced == launches.started


@pytest.mark.parametrize(("backends", "expected"), [("cuda:nccl", "cuda:1"), ("cpu:gloo,cuda:nccl", "cpu")])
def test_ranks_agree_on_the_gpu_of_the_features(backends, expected, monkeypatch):
    """NCCL communicates between the GPUs of its tensors."""
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode():
        features = torch.empty(2, 8, device="cuda:1")
    assert module._exchange_device(None, features) == torch.device(expected)
    if "cpu" not in backends:
        assert module._exchange_device(None, "no tensor") == torch.device("cuda", 0)
