"""Shared by the towers of all three libraries: LayerNorm, and the two halves of a pre-norm encoder layer."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import siglip_kernels
from siglip_kernels.fusable import has_ordinary_parameters, is_fusable, is_unhooked
from siglip_kernels.integrations.key_padding import KeyPadding, attend
from siglip_kernels.integrations.patching import (
    Accelerated,
    Description,
    is_replaced,
    runs,
    why_not_fusable,
)

LARGEST_HEAD_DIM = 128
LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)  # the second in torch's MultiheadAttention
_TANH_GELUS = {
    ("transformers.activations", "GELUTanh"),
    ("transformers.activations", "PytorchGELUTanh"),
    ("timm.layers.activations", "GELUTanh"),
}


def is_tanh_gelu(activation: Any) -> bool:
    """Whether it is the activation that `siglip_kernels.mlp` computes, without hooks."""
    if isinstance(activation, nn.Module) and not is_unhooked(activation):
        return False
    if type(activation) is nn.GELU:
        return activation.approximate == "tanh"
    return (type(activation).__module__, type(activation).__name__) in _TANH_GELUS


def why_not_tanh_gelu(activation: Any) -> list[str]:
    if is_tanh_gelu(activation):
        return []
    shown = repr(activation) if isinstance(activation, nn.Module) else getattr(activation, "__name__", activation)
    return [f"the activation {shown} is called normally; the fused MLP computes GELU's tanh form"]


def why_not_head_dim(head_dim: int) -> list[str]:
    if head_dim % 8 == 0 and head_dim <= LARGEST_HEAD_DIM:
        return []
    return [f"its head dim is {head_dim}; siglip_kernels.attention takes multiples of 8 up to {LARGEST_HEAD_DIM}"]


class LayerNorm(Accelerated):
    """Replaces torch.nn.LayerNorm and subclasses that compute the same."""

    @staticmethod
    def describe(module):
        if len(module.normalized_shape) != 1 or module.weight is None or module.bias is None:
            return Description((), ("siglip_kernels.layer_norm takes one dimension, with weight and bias",))
        if getattr(module, "_fast_norm", False):
            return Description((), ("timm's fast norm is on, which normalises in the autocast dtype",))
        return Description(("layer_norm",))

    @staticmethod
    def example(module, drawn):
        return (drawn(2, 5, module.normalized_shape[0]),)

    def forward(self: Any, x: Tensor) -> Tensor:
        if takes_norm(x, self):
            return siglip_kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


def takes_norm(x: Tensor, norm: Any) -> bool:
    """Whether `layer_norm` supports x with the parameters of a LayerNorm, which may be fp32 whatever x's dtype is."""
    return has_ordinary_parameters(norm) and (
        runs(x, norm.weight, norm.bias) or (runs(x) and norm.weight.dtype == torch.float32)
    )


def is_fusable_norm(norm: Any, x: Tensor) -> bool:
    """Whether an operation that starts with a LayerNorm may take this one's parameters."""
    return is_replaced(norm, LayerNorm) and is_unhooked(norm) and takes_norm(x, norm)


def why_not_fusable_norm(path: str, norm: Any) -> list[str]:
    if is_replaced(norm, LayerNorm) and is_unhooked(norm):
        return []
    return [f"{path} ({type(norm).__name__}) has hooks or is not replaced, and is called normally"]


def packed(operations: ModuleType, weight: Tensor, bias: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Weights and biases of q, k and v, of which these hold all three. fp8 takes them as they are."""
    if operations is siglip_kernels:
        return weight.chunk(3), bias.chunk(3)
    return (weight, None, None), (bias, None, None)


def add_pre_norm_attention(
    operations: ModuleType,
    x: Tensor,
    norm: Any,
    weights: Sequence[Any],
    biases: Sequence[Any],
    out: Any,
    heads: int,
    scale: float | None = None,
    padding: KeyPadding | None = None,
) -> Tensor:
    """x + out(attention(q, k, v)) with the projections of norm(x), whose weights and biases are those of q, k and v.

    operations: here and below, what `operations_of` returns.
    """
    (q, k, v), (q_bias, k_bias, v_bias) = weights, biases
    parameters = (norm.weight, norm.bias, norm.eps, q, q_bias, k, k_bias, v, v_bias)
    fusable = is_fusable(out, *LINEARS) and runs(x, out.weight, out.bias)
    if fusable and (padding is None or padding.order is None):
        lengths = None if padding is None else padding.lengths.expand(x.shape[0])
        return operations.pre_norm_attention(  # type: ignore[no-any-return]
            x, *parameters, out.weight, out.bias, heads, scale=scale, lengths=lengths
        )
    return add_linear(x, out, attend(operations.pre_norm_qkv(x, *parameters, heads), scale, padding).flatten(2))


def add_linear(x: Tensor, linear: Any, y: Tensor) -> Tensor:
    """x + linear(y)."""
    if is_fusable(linear, *LINEARS) and runs(y, linear.weight, linear.bias):
        return siglip_kernels.linear(y, linear.weight, linear.bias, x)
    return x + linear(y)


def fuses_mlp(fc1: Any, activation: Any, fc2: Any, x: Tensor) -> bool:
    return (
        is_tanh_gelu(activation)
        and is_fusable(fc1, nn.Linear)
        and is_fusable(fc2, nn.Linear)
        and runs(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    )


def add_pre_norm_mlp(
    operations: ModuleType, x: Tensor, norm: Any, fc1: Any, activation: Callable[[Tensor], Tensor], fc2: Any
) -> Tensor:
    """x + fc2(activation(fc1(norm(x))))."""
    if fuses_mlp(fc1, activation, fc2, x) and is_fusable_norm(norm, x):
        return operations.pre_norm_mlp(  # type: ignore[no-any-return]
            x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias
        )
    normed = norm(x)
    if fuses_mlp(fc1, activation, fc2, normed):
        return mlp(operations, normed, fc1, fc2, x)
    return add_linear(x, fc2, activation(fc1(normed)))


def mlp(operations: ModuleType, x: Tensor, fc1: nn.Linear, fc2: nn.Linear, residual: Tensor | None = None) -> Tensor:
    return operations.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, residual)  # type: ignore[no-any-return]


Parameters = tuple[Tensor, Tensor | None]  # weight and bias
Named = tuple[str, nn.Module]  # a module with its path inside the module that a report describes


def joined(*parts: Description) -> Description:
    """The descriptions of a module's parts as one, each operation once."""
    operations = dict.fromkeys(operation for part in parts for operation in part.operations)
    remarks = tuple(remark for part in parts for remark in part.remarks)
    return Description(tuple(operations), remarks, tuple(each for part in parts for each in part.projections))


def describe_called(norm: nn.Module, *remarks: str) -> Description:
    """Half of a block whose attention or MLP is called, after its LayerNorm."""
    return Description(("layer_norm",) * is_replaced(norm, LayerNorm), remarks)


def describe_pre_norm_attention(
    norm: Named, projections: Sequence[Named], out: Named, *remarks: str, in_proj: Sequence[Parameters] = ()
) -> Description:
    """x + out(attention(projections(norm(x)))), fused where the modules allow it. in_proj: of no module of its own."""
    before = why_not_fusable_norm(*norm)
    for projection in projections:
        before += why_not_fusable(*projection, nn.Linear)
    after = why_not_fusable(*out, *LINEARS)
    inputs = (*parameters_of(*projections), *in_proj)
    if not before and not after:
        return Description(("pre_norm_attention",), remarks, (*inputs, *parameters_of(out)))
    projected = ("layer_norm",) * is_replaced(norm[1], LayerNorm) if before else ("pre_norm_qkv",)
    operations = (*projected, "attention", *(() if after else ("linear",)))
    return Description(operations, (*before, *after, *remarks), () if before else inputs)


def parameters_of(*linears: Named) -> tuple[Parameters, ...]:
    return tuple([(linear.weight, linear.bias) for _, linear in linears])  # type: ignore[misc]


def describe_mlp(fc1: Named, activation: Any, fc2: Named, *remarks: str) -> Description:
    """fc2(activation(fc1(x))), unless there is any remark."""
    found = why_not_fusable(*fc1, nn.Linear) + why_not_fusable(*fc2, nn.Linear) + why_not_tanh_gelu(activation)
    found += remarks
    return Description((), tuple(found)) if found else Description(("mlp",), (), parameters_of(fc1, fc2))


def describe_pre_norm_mlp(norm: Named, fc1: Named, activation: Any, fc2: Named) -> Description:
    """`add_pre_norm_mlp`."""
    inner, outer = describe_mlp(fc1, activation, fc2), why_not_fusable_norm(*norm)
    if inner.operations and not outer:
        return inner._replace(operations=("pre_norm_mlp",))
    rest = inner.operations or ("linear",) * is_fusable(fc2[1], nn.Linear)
    operations = (*("layer_norm",) * is_replaced(norm[1], LayerNorm), *rest)
    return Description(operations, (*inner.remarks, *outer), inner.projections)


def why_not_patches(path: str, convolution: Any) -> list[str]:
    """Remarks on why `siglip_kernels.patch_embed` cannot compute a convolution, or an empty list."""
    if not is_fusable(convolution, nn.Conv2d):
        return why_not_fusable(path, convolution, nn.Conv2d)
    adjacent = convolution.stride == convolution.kernel_size and convolution.padding in ("valid", (0, 0))
    if adjacent and convolution.dilation == (1, 1) and convolution.groups == 1:
        return []
    return [f"{path} does not cut the image into adjacent patches without overlap"]


def is_fusable_attention(attention: Any) -> bool:
    """`is_fusable` for a torch.nn.MultiheadAttention of SigLIP's form: packed projections with biases."""
    return (
        is_fusable(attention, nn.MultiheadAttention)
        and attention.in_proj_weight is not None
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and attention.bias_v is None
        and not attention.add_zero_attn
        and not (attention.training and attention.dropout)
        and is_fusable(attention.out_proj, *LINEARS)
    )
