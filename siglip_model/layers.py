"""The smallest modules: subclasses of torch's, with the same parameters, that call the backend's operations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_kernels import reference
from siglip_kernels.errors import unsupported
from siglip_kernels.fusable import is_fusable, wraps_tensors
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


class Linear(UsesBackend, nn.Linear):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if wraps_tensors(self.weight):  # a quantised weight overrides F.linear
            return reference.linear(x, self.weight, self.bias, residual)
        return self.ops.linear(x, self.weight, self.bias, residual)


def add_linear(linear: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """residual + linear(x). Wrappers and hooks see what they see in transformers: linear(x) without the residual."""
    return linear(x, residual) if is_fusable(linear, Linear) else residual + linear(x)


class LayerNorm(UsesBackend, nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)

    def init_weights(self) -> None:
        self.reset_parameters()


class MLP(UsesBackend, nn.Module):
    """fc2(act(fc1(x))) + residual."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unsupported("SigLIP", "hidden_act", f"is {activation!r}", ", ".join(ACTIVATIONS))
        self.activation = activation
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def has_fusable_weights(self) -> bool:
        """Whether a backend may compute the MLP from its weights, as one operation."""
        return self.activation in TANH_GELU and is_fusable(self.fc1, Linear) and is_fusable(self.fc2, Linear)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if self.has_fusable_weights():
            return self.ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, residual)
        hidden = ACTIVATIONS[self.activation](fc1(x))
        return fc2(hidden) if residual is None else add_linear(fc2, hidden, residual)

    def init_weights(self) -> None:
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)


def add_pre_norm_mlp(ops: Backend, norm: nn.Module, mlp: nn.Module, x: Tensor) -> Tensor:
    """x + mlp(norm(x)) as one operation, or by calling modules that were replaced, wrapped or hooked."""
    if not is_fusable(mlp, MLP):
        return x + mlp(norm(x))
    if not (mlp.ops is ops and mlp.has_fusable_weights() and is_fusable(norm, LayerNorm)):
        return mlp(norm(x), x)
    fc1, fc2 = mlp.fc1, mlp.fc2
    return ops.pre_norm_mlp(x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


def lecun_normal_(weight: Tensor) -> None:
    """Variance 1/fan_in. As in transformers, it is corrected for truncation at two sigma but truncated at ±2."""
    fan_in = weight[0].numel()
    nn.init.trunc_normal_(weight, std=math.sqrt(1 / fan_in) / 0.87962566103423978)
