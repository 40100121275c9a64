"""Which devices multiply fp8: of those that run the kernels, the GPUs from compute capability 8.9 (Ada) on."""

import torch

from siglip_kernels import device
from siglip_kernels.device import gpu_name
from siglip_kernels.errors import MissingBackendError

_LEAST_CAPABILITY = (8, 9)

_accepted: set[torch.device] = set()  # GPUs that `why_not` accepted once


def why_not(where: torch.device) -> str | None:
    """Why fp8 does not run on tensors of this device, or None."""
    reason = device.why_not(where)
    if reason is not None or where.type != "cuda":
        return reason
    major, minor = torch.cuda.get_device_capability(where)
    if (major, minor) >= _LEAST_CAPABILITY:
        return None
    return f"{gpu_name(where)} has compute capability {major}.{minor}; products of fp8 need 8.9 or later (Ada, Hopper)"


def why_no_gpu() -> str | None:
    """Why none of this machine's GPUs has fp8. None: one has, or PyTorch finds none."""
    reason = device.why_no_gpu()
    if reason is not None or not torch.cuda.is_available():
        return reason
    reasons = [why_not(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def why_not_here() -> str | None:
    """Why fp8 runs on no device of this machine, or None. Does not import Triton."""
    return device.why_not_here() or why_no_gpu()


def require_fp8(operation: str, argument: str, tensor: torch.Tensor) -> None:
    """Raises MissingBackendError unless fp8 runs on the tensor's device."""
    if tensor.device in _accepted:
        return
    reason = why_not(tensor.device)
    if reason is None and tensor.is_cuda:
        _accepted.add(tensor.device)
    if reason is not None:
        where = f"{argument} is on {tensor.device}"
        raise MissingBackendError(
            f"{operation}: {where}, and {reason}; use a model's backend 'triton', 'sdpa' or 'eager'"
        )
