"""Cached GPU properties that select kernel configurations; nothing is queried at import."""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from siglip_kernels.errors import MissingBackendError


@dataclass(frozen=True)
class Facts:
    """The properties of a GPU that a configuration depends on."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # the most bytes that one program may use
    l2_bytes: int

    @property
    def matrix_unit(self) -> str:
        """The matrix instructions that Triton compiles products to: "wgmma" (Hopper), "tcgen05" (data-centre Blackwell)
        or "mma" (Ampere, Ada, and consumer Blackwell, sm_12x, which has neither of the others).
        """
        return {9: "wgmma", 10: "tcgen05"}.get(self.capability[0], "mma")

    @property
    def has_tma(self) -> bool:
        """Whether tensor descriptors are copied by the Tensor Memory Accelerator."""
        return self.capability >= (9, 0)


# For kernels that are interpreted on the CPU. One multiprocessor, so that a persistent kernel loops over its tiles.
INTERPRETER = Facts("interpreter", (0, 0), 1, 232_448, 50 * 2**20)

_pretended: Facts | None = None


def facts(device: torch.device) -> Facts:
    """The facts of a CUDA device, or INTERPRETER for any other."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda":
        return INTERPRETER
    return _query(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _query(index: int) -> Facts:
    properties = torch.cuda.get_device_properties(index)
    return Facts(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        properties.L2_cache_size,
    )


@contextlib.contextmanager
def pretend(facts: Facts) -> Iterator[None]:
    """Report `facts` for every device and accept tensors on any, to compile kernels for a GPU that is not present."""
    global _pretended
    before, _pretended = _pretended, facts
    try:
        yield
    finally:
        _pretended = before


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when Triton was imported."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def require_kernels(operation: str, argument: str, tensor: torch.Tensor) -> None:
    """Raises MissingBackendError unless kernels run on the tensor's device: CUDA, or the CPU in the interpreter."""
    if tensor.device.type == "cuda" or _pretended is not None:
        return
    if not (tensor.device.type == "cpu" and interpreting()):
        raise MissingBackendError(
            f"{operation}: {argument} is on {tensor.device}, and the Triton kernels need a CUDA device (or CPU tensors "
            "and TRITON_INTERPRET=1 set before Triton is imported); elsewhere use the backend 'sdpa' or 'eager'"
        )


def precision(dtype: torch.dtype) -> str:
    """ "tf32" if products of fp32 inputs may use it, as torch.backends.cuda.matmul says, else "ieee"; for other dtypes
    "ieee", which has no effect on them.

    `fp32_precision` follows the older `allow_tf32`, which PyTorch refuses to read once the newer has been set.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def hopper_kernels_enabled() -> bool:
    """Whether SIGLIP_KERNELS_HOPPER=1 selects the kernels that are written for Hopper (sm_90).

    They have not been run on a GPU yet and are off by default: the portable kernels run everywhere. When they are
    selected, a call that they do not support raises UnsupportedInputError. What they do not cover runs as without them:
    attention over short sequences, normalisation, and GEMMs without a fused epilogue.

    Raises MissingBackendError for any value but 1, 0 and the empty string.
    """
    value = os.environ.get("SIGLIP_KERNELS_HOPPER", "")
    if value not in ("", "0", "1"):
        raise MissingBackendError(f"SIGLIP_KERNELS_HOPPER is {value!r}; supported: 1 (Hopper's kernels), 0 or unset")
    return value == "1"
