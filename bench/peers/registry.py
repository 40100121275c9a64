"""The registry of contenders: ours and the strongest peers. One entry is one function with a decorator.

    @peer("attention", "flash_attn_3", package="fa3-fwd", directions=("fwd",), dtypes=("bf16",))
    def flash_attention_3(setting: Setting) -> Callable:
        from fa3_fwd_interface import flash_attn_func

        return flash_attn_func

The function is called when its peer is about to be measured, not before, so a package that is not installed costs
nothing; its ImportError becomes a row that says how to install it. It returns a function with the definition's
parameters (`bench.cases.operations`), or a Contender.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from bench.cases.operations import Contender, Setting, ours
from bench.cases.shapes import AttentionShape
from siglip_kernels.attention.config import short_block

MODULES = ("attention", "dense", "loss", "models")


class Missing(Exception):
    """A peer that this machine lacks; the message says how to get it."""


class Unsupported(Exception):
    """A peer that is here and does not do what was asked; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One entry.

    operation: what it does. name: as `--peers` takes it and as `impl` in the results.
    package: the distribution that it comes from, "" for PyTorch alone; install: how to get it.
    directions, dtypes: what it can do; None for anything. cuda: it needs a CUDA device.
    slow: it takes minutes to prepare, so `--quick` leaves it out unless it is named.
    one_size: it is compiled for one size, at such cost that its gradients are not checked on a smaller sample.
    quadratic: it holds `quadratic` values of fp32 for each pair of samples.
    tolerance: the relative error allowed where it is meant to be less exact, such as fp8; None for the usual.
    note: what sets it apart from the others, for the tables.
    truth: another definition than the operation's, for neighbours that compute something else.
    """

    operation: str
    name: str
    load: Callable[[Setting], Any] = field(compare=False)
    package: str = ""
    install: str = ""
    directions: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    cuda: bool = False
    slow: bool = False
    one_size: bool = False
    quadratic: int = 0
    tolerance: float | None = None
    note: str = ""
    truth: Callable[..., Any] | None = field(default=None, compare=False)

    @property
    def ours(self) -> bool:
        return self.name.split(":")[0] == "triton"

    @property
    def kernels(self) -> str:
        """Which of our kernels an entry of ours runs: those for Hopper alone, or "triton" under whatever name."""
        return self.name if self.name == "triton:hopper" else "triton"

    def version(self) -> str | None:
        """Of its package; None where that is not installed."""
        try:
            return metadata.version(self.package or "torch")
        except metadata.PackageNotFoundError:
            return None

    def how_to_install(self) -> str:
        return self.install or f"pip install {self.package}"

    def prepare(self, setting: Setting) -> Contender:
        """The contender. Raises Missing, Unsupported, or whatever goes wrong in the peer's own code."""
        dtype = str(setting.dtype).removeprefix("torch.")
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)
        if self.cuda and setting.device != "cuda":
            raise Unsupported("needs a CUDA device")
        if self.dtypes is not None and short not in self.dtypes:
            raise Unsupported(f"has no {short}; supported: {', '.join(self.dtypes)}")
        if self.directions is not None and setting.direction not in self.directions:
            raise Unsupported(f"has no {setting.direction}; supported: {', '.join(self.directions)}")
        try:
            loaded = self.load(setting)
        except ImportError as error:
            if self.package and self.version() is None:
                raise Missing(self.how_to_install()) from error
            raise
        return loaded if isinstance(loaded, Contender) else Contender(loaded)


_REGISTRY: dict[tuple[str, str], Peer] = {}


def peer(operations: str | Iterable[str], name: str, **entry: Any) -> Callable[[Callable], Callable]:
    """Registers the decorated loader under `name` for one operation or several."""

    def register(load: Callable[[Setting], Any]) -> Callable[[Setting], Any]:
        for operation in (operations,) if isinstance(operations, str) else operations:
            if (operation, name) in _REGISTRY:
                raise ValueError(f"{operation} has a peer {name!r} already")
            _REGISTRY[operation, name] = Peer(operation, name, load, **entry)
        return load

    return register


def _ours(operation: str) -> Callable[[Setting], Any]:
    def load(setting: Setting) -> Any:
        kernels = ours(operation)
        if kernels is None:
            raise Missing(f"siglip_kernels has no {operation}")
        return kernels

    return load


# Asks the operations for the kernels that are written for Hopper alone.
HOPPER = {"SIGLIP_KERNELS_HOPPER": "1"}


def _ours_for_hopper(operation: str) -> Callable[[Setting], Any]:
    def load(setting: Setting) -> Contender:
        require_hopper()
        shape = setting.shape
        if isinstance(shape, AttentionShape) and shape.tokens <= short_block(setting.dtype.itemsize):
            raise Unsupported("sequences as short as this one have the same kernel on every GPU: triton's row")
        return Contender(_ours(operation)(setting), environment=HOPPER)

    return load


def require_hopper() -> None:
    """Raises Unsupported on any other GPU."""
    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        raise Unsupported(f"needs compute capability 9.0; this GPU has {capability[0]}.{capability[1]}")


@functools.cache
def everyone() -> dict[tuple[str, str], Peer]:
    """Every entry by operation and name, ours first."""
    for operation in (
        "attention", "linear", "pre_norm_qkv", "mlp", "pre_norm_mlp", "layer_norm", "attention_pool", "patch_embed",
        "sigmoid_loss",
    ):  # fmt: skip
        peer(operation, "triton", package="triton", cuda=True)(_ours(operation))
    for operation in ("attention", "linear", "pre_norm_qkv", "mlp", "pre_norm_mlp", "sigmoid_loss"):
        half = dict(cuda=True, dtypes=("fp16", "bf16"), note="ours, written for Hopper alone")
        peer(operation, "triton:hopper", package="triton", **half)(_ours_for_hopper(operation))
    for module in MODULES:
        importlib.import_module(f"bench.peers.{module}")
    return dict(sorted(_REGISTRY.items(), key=lambda item: not item[1].ours))


def peers_of(operation: str) -> dict[str, Peer]:
    """The entries of one operation by name."""
    return {name: entry for (of, name), entry in everyone().items() if of == operation}


def names() -> list[str]:
    """Every name that `--peers` takes."""
    return list(dict.fromkeys(name for _, name in everyone()))
