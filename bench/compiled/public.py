"""Triton kernels of public packages, to compare counts with: liger-kernel's LayerNorm, siglip-kernel's loss.

They are compiled as their packages launch them, and never run.
"""

import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.compiled.launch import Launch

ROWS, WIDTH = 46_656, 1152  # of LayerNorm: 64 images of so400m
PAIRS, CHUNK, EMBEDDING = 12_288, 1024, 768  # of the loss, and of these the images that siglip-kernel takes at a time


class Public(NamedTuple):
    """What a package has to compare with."""

    package: str  # as pip calls it
    launches: Callable[[], Iterator[Launch]]  # raises ImportError without the package


def _liger_layer_norm() -> Iterator[Launch]:
    from liger_kernel.ops.layer_norm import layer_norm_backward, layer_norm_forward  # type: ignore[import-not-found]

    def launch() -> None:
        x, parameter = (torch.empty(*size, dtype=torch.bfloat16, device="meta") for size in ((ROWS, WIDTH), (WIDTH,)))
        _, _, mean, rstd, *_ = layer_norm_forward(x, parameter, parameter, 1e-6)
        layer_norm_backward(x, x, parameter, parameter, mean, rstd)

    yield Launch(f"bf16 {ROWS} x {WIDTH}", launch)


def _siglip_kernel_loss() -> Iterator[Launch]:
    """Every tile that the package tunes, of the kernel with the loss in the epilogue of the logits."""
    kernel = _without_its_package("siglip_kernel", "fused_chunked_epilogue")._gemm_bce_kernel

    def launch(config: Any) -> None:
        images, texts, gradient = (
            torch.empty(*size, dtype=torch.bfloat16, device="meta")
            for size in ((CHUNK, EMBEDDING), (PAIRS, EMBEDDING), (CHUNK, PAIRS))
        )
        sums = [torch.empty(CHUNK * PAIRS // 64**2, device="meta") for _ in range(3)]
        kernel.fn[(1,)](
            images, texts, gradient, *sums, CHUNK, PAIRS, EMBEDDING, 0, 10.0, -10.0,
            **config.kwargs, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    for config in kernel.configs:
        rows, columns, depth = (config.kwargs[f"BLOCK_{name}"] for name in "MNK")
        name = f"bf16 D={EMBEDDING} train, {rows}x{columns}x{depth} {config.num_stages} stages"
        yield Launch(name, functools.partial(launch, config))


def _without_its_package(package: str, name: str) -> Any:
    """A module of a package whose own import asks for the GPU's properties. ImportError without the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.submodule_search_locations is None:
        raise ImportError(f"no package {package}")
    spec = importlib.util.spec_from_file_location(
        f"{package}.{name}", Path(found.submodule_search_locations[0]) / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PUBLIC = {
    "liger_layer_norm": Public("liger-kernel", _liger_layer_norm),
    "siglip_kernel_loss": Public("siglip-kernel", _siglip_kernel_loss),
}


def launches_of_public(name: str, only: str = "") -> Iterator[Launch]:
    """The launches of one of PUBLIC whose names contain the regular expression. ImportError without its package."""
    yield from (launch for launch in PUBLIC[name].launches() if re.search(only, launch.name))
