"""Whether an operation may take a module's parameters instead of calling the module. Needs PyTorch alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch.nn.modules.module as _module  # torch keeps the hooks that a process registers for all modules here
from torch import nn
from torch.nn.parameter import Parameter

if TYPE_CHECKING:
    from typing_extensions import TypeIs

ModuleType = TypeVar("ModuleType", bound=nn.Module)

# Forward hooks that transformers leaves on attention and encoder layers once hidden states were requested. They record
# attention weights, which the kernels never return, and a layer's output, which does not change: they block no fusion.
_RECORDING_HOOKS = "transformers.utils.output_capturing"


def is_fusable(module: nn.Module, *kinds: type[ModuleType]) -> TypeIs[ModuleType]:
    """False for modules that were replaced, wrapped or hooked: these have to be called.

    Another class than `kinds` (LoRA, parametrizations, FSDP2, quantised layers), a hook on the module or on all
    modules of the process (nn.utils.prune and weight_norm also hook), a forward set on the instance, a missing weight
    or bias, or a weight that wraps other tensors (quantised, distributed) makes a module unfusable.
    """
    return type(module) in kinds and is_unhooked(module) and has_ordinary_parameters(module)


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    state = module.__dict__
    if state["_forward_pre_hooks"] or state["_backward_pre_hooks"] or state["_backward_hooks"]:
        return False
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return False
    if _module._global_backward_hooks or _module._global_backward_pre_hooks:
        return False
    for hook in state["_forward_hooks"].values():
        if getattr(hook, "__module__", None) != _RECORDING_HOOKS:
            return False
    return not has_own_forward(module)


def has_own_forward(module: Any) -> bool:
    """Whether the instance has a forward other than its class's. Older transformers sets the class's on instances."""
    state = module.__dict__
    return "forward" in state and getattr(state["forward"], "__func__", None) is not type(module).forward


def has_ordinary_parameters(module: nn.Module) -> bool:
    """Whether weight and bias exist and no parameter wraps other tensors."""
    for name, parameter in module.__dict__["_parameters"].items():  # a loop, not `all`: this runs at every call
        if parameter is None:
            if name in ("weight", "bias"):
                return False
        elif type(parameter) is not Parameter and wraps_tensors(parameter):
            return False
    return True


def wraps_tensors(tensor: Any) -> bool:
    """Whether it is a tensor made of others, such as torchao's quantised ones or a DTensor: torch marks their class."""
    return hasattr(type(tensor), "__tensor_flatten__")
