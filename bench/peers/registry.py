"""The registry of contenders: this project and the strongest peers. An entry is a decorated function.

    @peer("attention", "flash_attn_3", package="fa3-fwd", directions=("fwd",), dtypes=("bf16",))
    def flash_attention_3(setting: Setting) -> Callable:
        from fa3_fwd_interface import flash_attn_func

        return flash_attn_func

The function is called only when its peer is about to be measured. If its package is not installed, the ImportError
becomes a row that says how to install it. The function returns a callable with the parameters of the operation's
definition (`bench.cases.operations`), or a Contender.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from bench.cases import fp8
from bench.cases.operations import Contender, Setting, kernels_for
from bench.cases.shapes import AttentionShape, SequencesShape
from bench.peers.compiled import MODES
from siglip_kernels.attention.config import short_block

MODULES = ("attention", "cpu", "dense", "embed", "fp8", "loss", "models")


class Missing(Exception):
    """The peer is not installed; the message says how to install it."""


class Unsupported(Exception):
    """The peer does not support the setting; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One entry.

    operation: what it computes. name: what `--peers` takes and `impl` in the results.
    package: the distribution that it comes from, "" for PyTorch alone. install: the command that installs it.
    directions, dtypes: what it supports; None for all.
    cuda: it needs a CUDA device. cpu: it is measured without one.
    precision: what it computes in where that is not the setting's dtype, which its inputs and outputs have.
    slow: it takes minutes to prepare; `--quick` leaves it out unless it is named.
    one_size: it is compiled for one size, too slowly to check its gradients on a smaller sample.
    keeps_memory: its runtime keeps the memory of a call for the next one, so that the first call tells what it needs.
    quadratic: it holds this many fp32 values per pair of an image and a text.
    tolerance: the relative error allowed for reduced precision such as fp8; None for the default.
    note: what distinguishes it, for the tables.
    truth: the definition of a neighbouring function that it computes instead of the operation's.
    """

    operation: str
    name: str
    load: Callable[[Setting], Any] = field(compare=False)
    package: str = ""
    install: str = ""
    directions: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    cuda: bool = False
    cpu: bool = False
    precision: str = ""
    slow: bool = False
    one_size: bool = False
    keeps_memory: bool = False
    quadratic: int = 0
    tolerance: float | None = None
    note: str = ""
    truth: Callable[..., Any] | None = field(default=None, compare=False)

    @property
    def comparable(self) -> bool:
        """Whether it computes the operation rather than a neighbouring function."""
        return self.truth is None

    def runs_on(self, device: str) -> bool:
        """Whether it is measured on "cuda" or on "cpu"."""
        return not (self.cuda if device == "cpu" else self.cpu)

    @property
    def uses_kernels(self) -> bool:
        """Whether it runs this project's kernels."""
        return self.name.split(":")[0] == "triton"

    @property
    def kernels(self) -> str:
        """Which kernels an entry that `uses_kernels` runs: a name of FAMILIES or, under any other name, "triton"."""
        return self.name if self.name in FAMILIES else "triton"

    @property
    def compiles(self) -> bool:
        """Whether its first call compiles code, which other processes find on the disk afterwards."""
        return self.uses_kernels or self.name == "flex" or self.name.rpartition(":")[2] in MODES

    def version(self) -> str | None:
        """The version of its package; None if that is not installed."""
        try:
            return metadata.version(self.package or "torch")
        except metadata.PackageNotFoundError:
            return None

    def how_to_install(self) -> str:
        return self.install or f"pip install {self.package}"

    def prepare(self, setting: Setting) -> Contender:
        """Loads the contender. Raises Missing, Unsupported, or any error of the peer's own code."""
        dtype = str(setting.dtype).removeprefix("torch.")
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)
        if self.cuda and setting.device != "cuda":
            raise Unsupported("needs a CUDA device")
        if self.cpu and setting.device != "cpu":
            raise Unsupported("is measured without a CUDA device")
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
    """Decorator that registers a loader under `name` for one or several operations."""

    def register(load: Callable[[Setting], Any]) -> Callable[[Setting], Any]:
        for operation in (operations,) if isinstance(operations, str) else operations:
            if (operation, name) in _REGISTRY:
                raise ValueError(f"{operation} has a peer {name!r} already")
            _REGISTRY[operation, name] = Peer(operation, name, load, **entry)
        return load

    return register


def require_fp8(setting: Setting) -> None:
    """Raises Unsupported on a GPU that does not multiply fp8."""
    if setting.device == "cuda" and (capability := torch.cuda.get_device_capability()) < (8, 9):
        raise Unsupported(f"needs compute capability 8.9; this GPU has {capability[0]}.{capability[1]}")


def _kernels(operation: str) -> Callable[[Setting], Any]:
    def load(setting: Setting) -> Any:
        kernels = kernels_for(operation)
        if operation in fp8.DEFINITIONS:
            require_fp8(setting)
        if kernels is None:
            raise Missing(f"siglip_kernels has no {operation}")
        return kernels

    return load


@dataclass(frozen=True)
class Family:
    """Kernels for one architecture: the compute capability they need, and the variable by which operations use them."""

    architecture: str
    capability: int  # its first number
    variable: str
    operations: tuple[str, ...]  # in fp16 and bf16

    def require(self) -> None:
        """Raises Unsupported on a GPU of another compute capability."""
        capability = torch.cuda.get_device_capability()
        if capability[0] != self.capability or torch.version.hip is not None:
            raise Unsupported(
                f"needs compute capability {self.capability}.0; this GPU has {capability[0]}.{capability[1]}"
            )


_LAYERS = ("attention", "linear", "pre_norm_qkv", "pre_norm_attention", "mlp", "pre_norm_mlp")
FAMILIES = {
    "triton:hopper": Family(
        "Hopper", 9, "SIGLIP_KERNELS_HOPPER", (*_LAYERS, *fp8.DEFINITIONS, "padded_attention", "sigmoid_loss")
    ),
    "triton:blackwell": Family("Blackwell", 10, "SIGLIP_KERNELS_BLACKWELL", _LAYERS),
}


def selecting(kernels: str) -> dict[str, str]:
    """The environment variables with which operations use the family `kernels` of FAMILIES, or with "triton" none."""
    return {family.variable: "1" if name == kernels else "0" for name, family in FAMILIES.items()}


def selected_family() -> str:
    """The name in FAMILIES that the environment of this process selects; "" for none."""
    return next((name for name, family in FAMILIES.items() if os.environ.get(family.variable) == "1"), "")


def _kernels_of_family(operation: str, name: str) -> Callable[[Setting], Any]:
    def load(setting: Setting) -> Contender:
        FAMILIES[name].require()
        shape = setting.shape
        if isinstance(shape, (AttentionShape, SequencesShape)):
            if (shape.tokens if isinstance(shape, AttentionShape) else shape.longest) <= short_block(
                setting.dtype.itemsize
            ):
                raise Unsupported("sequences this short use the same kernel on every GPU: see the row of triton")
            if name == "triton:blackwell" and setting.direction == "bwd":
                raise Unsupported("has no backward of its own: see the row of triton")
        return Contender(_kernels(operation)(setting), environment=selecting(name))

    return load


def _portable_kernels(operation: str) -> Callable[[Setting], Contender]:
    return lambda setting: Contender(_kernels(operation)(setting), environment=selecting("triton"))


@functools.cache
def everyone() -> dict[tuple[str, str], Peer]:
    """Every entry by operation and name, this project's kernels first."""
    for operation in (
        "attention", "packed_attention", "padded_attention", "linear", "pre_norm_qkv", "pre_norm_attention", "mlp",
        "pre_norm_mlp", "layer_norm", "attention_pool", "patch_embed", "sigmoid_loss", "siglip_plus_loss",
        "image_losses", "matryoshka_sigmoid_loss", "resize_normalize", *fp8.DEFINITIONS,
    ):  # fmt: skip
        peer(operation, "triton", package="triton", cuda=True)(_portable_kernels(operation))
    for name, family in FAMILIES.items():
        half = dict(cuda=True, dtypes=("fp16", "bf16"), note=f"this project's kernels for {family.architecture}")
        for operation in family.operations:
            peer(operation, name, package="triton", **half)(_kernels_of_family(operation, name))
    for module in MODULES:
        importlib.import_module(f"bench.peers.{module}")
    return dict(sorted(_REGISTRY.items(), key=lambda item: not item[1].uses_kernels))


def peers_of(operation: str) -> dict[str, Peer]:
    """The entries of one operation by name."""
    return {name: entry for (of, name), entry in everyone().items() if of == operation}


def names() -> list[str]:
    """All names that `--peers` accepts."""
    return list(dict.fromkeys(name for _, name in everyone()))
