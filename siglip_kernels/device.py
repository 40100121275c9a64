"""Which devices run the kernels, and cached GPU properties that select configurations; no query at import."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
    def interpreted(self) -> bool:
        """Whether this is INTERPRETER, whose time is per operation and not per element."""
        return self.capability == (0, 0)

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


# Where the kernels run ------------------------------------------------------------------------------------------------

_LEAST_CAPABILITY = (8, 0)
_NO_TRITON = "the kernels need Triton, which is not installed"
_OTHER_GPUS = {"xpu": "Intel GPUs (XPU)", "mps": "Apple GPUs (MPS)"}

_INSTEAD = (
    "siglip_kernels.reference, or a model's backend 'sdpa' or 'eager' (in transformers attn_implementation='sdpa')"
)

_accepted: set[torch.device] = set()  # GPUs that `why_not` accepted once


def _constant_while_tracing(function: Any) -> Any:
    """As torch.compiler.assume_constant_result, which imports torch._dynamo and with it Triton."""
    function._dynamo_marked_constant = True
    return function


@_constant_while_tracing
def kernels_run_on(device: torch.device) -> bool:
    """Whether kernels run on tensors of this device; asked at every call, also while torch.compile traces."""
    if device in _accepted or _pretended is not None:
        return True
    if why_not(device) is not None:
        return False
    if device.type == "cuda" and torch.cuda.is_initialized():  # before that, answers about GPUs may change
        _accepted.add(device)
    return True


@_constant_while_tracing
def why_not(device: torch.device) -> str | None:
    """Why no kernel runs on tensors of this device: CUDA, or the CPU in the interpreter. None: kernels run."""
    if _pretended is not None:
        return None
    if importlib.util.find_spec("triton") is None:
        return _NO_TRITON
    if device.type == "cuda":
        return _why_not_gpu(device)
    if device.type == "cpu" and interpreting():
        return None
    if torch.version.hip is not None:
        return _why_not_rocm()
    if device.type != "cpu":
        return f"the kernels do not support {_OTHER_GPUS.get(device.type, f'{device.type} devices')}, only NVIDIA GPUs"
    return "the Triton kernels need a CUDA device (or CPU tensors and TRITON_INTERPRET=1 set before Triton is imported)"


def why_not_here() -> str | None:
    """Why no kernel runs on any device of this machine, or None. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return f"{_NO_TRITON} (pip install triton; Linux only)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if torch.version.hip is not None or torch.cuda.is_available():
        return why_no_gpu()
    found = torch.accelerator.current_accelerator()
    other = "" if found is None else f", and the kernels do not support {_OTHER_GPUS.get(found.type, found.type)}"
    return f"there is no CUDA device{other} (TRITON_INTERPRET=1 runs the kernels slowly on the CPU, for tests)"


def why_no_gpu() -> str | None:
    """Why none of this machine's GPUs runs the kernels. None: one does, or PyTorch finds none."""
    if torch.version.hip is not None:
        return _why_not_rocm()
    if not torch.cuda.is_available():
        return None
    reasons = [_why_not_gpu(torch.device("cuda", index)) for index in range(torch.cuda.device_count() or 1)]
    return None if None in reasons else reasons[0]


def _why_not_gpu(device: torch.device) -> str | None:
    if torch.version.hip is not None:  # an MI300 has the capability (9, 4), which is not Hopper's
        return _why_not_rocm(device)
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:  # PyTorch's, for a GPU that it lacks
        return f"PyTorch cannot use that device: {error}"
    if (major, minor) >= _LEAST_CAPABILITY:
        return None
    return f"{gpu_name(device)} has compute capability {major}.{minor}; the kernels need 8.0 or later"


def _why_not_rocm(device: torch.device | None = None) -> str:
    what = "this PyTorch is built for AMD GPUs"
    if torch.cuda.is_available():
        what = f"{gpu_name(torch.device('cuda', 0) if device is None else device)} is an AMD GPU"
    return f"{what} (ROCm {torch.version.hip}), which the kernels do not support; they run on NVIDIA GPUs"


def gpu_name(device: torch.device) -> str:
    """A GPU's name, with its architecture if it is AMD's: "AMD Instinct MI300X (gfx942)"; "cuda:0" if it has none."""
    try:
        properties = torch.cuda.get_device_properties(device)
    except (AssertionError, RuntimeError):  # an error that names the GPU must not become this one
        return str(device)
    architecture = getattr(properties, "gcnArchName", "")
    return f"{properties.name} ({architecture.partition(':')[0]})" if architecture else properties.name


def require_kernels(operation: str, argument: str, tensor: torch.Tensor, instead: str = _INSTEAD) -> None:
    """Raises MissingBackendError, which says what to use instead, unless kernels run on the tensor's device."""
    if not kernels_run_on(tensor.device):
        reason = why_not(tensor.device)
        raise MissingBackendError(f"{operation}: {argument} is on {tensor.device}, and {reason}; use {instead}")


def on_device(tensor: torch.Tensor) -> torch.cuda.device_of:
    """A context in which the tensor's GPU is current: Triton launches on the current GPU, wherever the tensors are."""
    return torch.cuda.device_of(tensor)


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
    attention over short or packed sequences, normalisation, and GEMMs without a fused epilogue.

    Raises MissingBackendError for any value but 1, 0 and the empty string, and where both families are selected.
    """
    return _selected() == "SIGLIP_KERNELS_HOPPER"


def blackwell_kernels_enabled() -> bool:
    """Whether SIGLIP_KERNELS_BLACKWELL=1 selects the kernels for data-centre Blackwell (sm_100), with the same rules.

    They also leave the backward of attention, attention with lengths, products of fp8 and the loss to the portable
    kernels.
    """
    return _selected() == "SIGLIP_KERNELS_BLACKWELL"


_FAMILIES = {"SIGLIP_KERNELS_HOPPER": "Hopper's kernels", "SIGLIP_KERNELS_BLACKWELL": "Blackwell's kernels"}


def _selected() -> str:
    """The environment variable that selects a family of kernels; "" for the portable ones."""
    chosen = []
    for variable, family in _FAMILIES.items():
        value = os.environ.get(variable, "")
        if value not in ("", "0", "1"):
            raise MissingBackendError(f"{variable} is {value!r}; supported: 1 ({family}), 0 or unset")
        if value == "1":
            chosen.append(variable)
    if len(chosen) > 1:
        raise MissingBackendError(f"{' and '.join(chosen)} are both 1; supported: one of them")
    return chosen[0] if chosen else ""
