"""The smallest parts: torch's own Linear and LayerNorm, computed by the backend, and the MLP.

The modules are exactly nn.Linear and nn.LayerNorm, because libraries that quantise, shard or adapt models look for
these types. The module that holds them passes their parameters to an operation of the backend, or calls them if they
were replaced, wrapped or hooked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_kernels.errors import unsupported
from siglip_kernels.fusable import is_fusable
from siglip_model.backends import SDPA, Backend

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": nn.GELU(approximate="tanh"),
    "gelu_new": nn.GELU(approximate="tanh"),
    "gelu_fast": nn.GELU(approximate="tanh"),
    "gelu": nn.GELU(),
    "gelu_python": nn.GELU(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": nn.Identity(),
}


# The activations that the backends' `mlp` computes.
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")


class UsesBackend:
    """A module that calls operations of a backend. `set_backend` of the model sets `ops` on all of them."""

    ops: Backend = SDPA


def apply_linear(ops: Backend, linear: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """linear(x) + residual. Wrappers and hooks see what they see in transformers: linear(x) without the residual."""
    if is_fusable(linear, nn.Linear):
        return ops.linear(x, linear.weight, linear.bias, residual)
    return linear(x) if residual is None else residual + linear(x)


def apply_layer_norm(ops: Backend, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x)."""
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps) if is_fusable(norm, nn.LayerNorm) else norm(x)


class MLP(UsesBackend, nn.Module):
    """fc2(act(fc1(x))) + residual."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unsupported("SigLIP", "hidden_act", f"is {activation!r}", ", ".join(ACTIVATIONS))
        self.activation = activation
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def has_fusable_weights(self) -> bool:
        """Whether a backend may compute the MLP from its weights, as one operation."""
        return self.activation in TANH_GELU and is_fusable(self.fc1, nn.Linear) and is_fusable(self.fc2, nn.Linear)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        x, fc1, fc2 = hidden_states, self.fc1, self.fc2
        if self.has_fusable_weights():
            return self.ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, residual)
        hidden = ACTIVATIONS[self.activation](apply_linear(self.ops, fc1, x))
        return apply_linear(self.ops, fc2, hidden, residual)

    def init_weights(self) -> None:
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)


def add_pre_norm_mlp(ops: Backend, norm: nn.Module, mlp: nn.Module, x: Tensor) -> Tensor:
    """x + mlp(norm(x)) as one operation, or by calling modules that were replaced, wrapped or hooked."""
    if not is_fusable(mlp, MLP):
        return x + mlp(apply_layer_norm(ops, norm, x))
    if not (mlp.ops is ops and mlp.has_fusable_weights() and is_fusable(norm, nn.LayerNorm)):
        return mlp(apply_layer_norm(ops, norm, x), x)
    fc1, fc2 = mlp.fc1, mlp.fc2
    return ops.pre_norm_mlp(x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters, or what replaces them in a replica by nn.DataParallel, which has none."""
    for each in module.modules():
        yield from each.parameters(recurse=False)
        yield from getattr(each, "_former_parameters", {}).values()


def lecun_normal_(weight: Tensor) -> None:
    """Variance 1/fan_in. As in transformers, it is corrected for truncation at two sigma but truncated at ±2."""
    fan_in = weight[0].numel()
    nn.init.trunc_normal_(weight, std=math.sqrt(1 / fan_in) / 0.87962566103423978)
