"""Leaves of the model: torch's own modules and parameters, computed by the backend's operations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_kernels.errors import unsupported
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


class UsesBackend:
    """A module with operations of its own; `set_backend` on the model reaches every one of them."""

    ops: Backend = SDPA


class Linear(UsesBackend, nn.Linear):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias, residual)


class LayerNorm(UsesBackend, nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


class MLP(UsesBackend, nn.Module):
    """fc2(act(fc1(x))) + residual."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unsupported("SigLIP", "hidden_act", f"is {activation!r}", ", ".join(ACTIVATIONS))
        self.activation = activation
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        # A layer that someone wrapped (LoRA, quantisation) keeps its own forward.
        if self.activation == "gelu_pytorch_tanh" and type(fc1) is Linear and type(fc2) is Linear:
            return self.ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, residual)
        return fc2(ACTIVATIONS[self.activation](fc1(x)), residual)

    def init_weights(self) -> None:
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)


def lecun_normal_(weight: Tensor) -> None:
    """Variance 1/fan_in before truncation at two, transformers' way (it corrects for a truncation at two sigma)."""
    fan_in = weight[0].numel()
    nn.init.trunc_normal_(weight, std=math.sqrt(1 / fan_in) / 0.87962566103423978)
