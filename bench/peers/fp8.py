"""Peers of the products of encoder layers in fp8: torchao's, and PyTorch's `_scaled_mm`.

As this project's, both have e4m3 operands, a scale per row of activations and per output channel of weights, and
quantise the weights in advance. They are the definition (`siglip_kernels.reference`) with other products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from bench.cases.fp8 import DEFINITIONS
from bench.cases.operations import Setting
from bench.peers.compiled import compiled
from bench.peers.registry import peer, require_fp8
from siglip_kernels import reference
from siglip_kernels.fp8.reference import quantise

_fp8_peer = functools.partial(peer, tuple(DEFINITIONS), cuda=True, dtypes=("bf16",))


def _definition(setting: Setting) -> Callable[..., Any]:
    """Of the operation without fp8."""
    found: Callable[..., Any] = getattr(reference, setting.operation.name.removeprefix("fp8_"))
    return found


class _Rowwise(TorchFunctionMode):
    """Computes F.linear by torch._scaled_mm."""

    def __init__(self) -> None:
        self.weights = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.product(*args) if func is F.linear else func(*args, **(kwargs or {}))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight not in self.weights:
            self.weights[weight] = quantise(weight)
        values, scales = quantise(x.flatten(0, -2))
        weight_values, weight_scales = self.weights[weight]
        out = torch._scaled_mm(
            values,
            weight_values.t(),
            scale_a=scales[:, None],
            scale_b=weight_scales[None, :],
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return out.unflatten(0, x.shape[:-1])


@_fp8_peer("scaled_mm", note="torchao's formula in plain PyTorch")
def scaled_mm(setting: Setting) -> Callable[..., Any]:
    require_fp8(setting)
    rowwise, definition = _Rowwise(), _definition(setting)

    def call(**arguments: Any) -> Any:
        with rowwise:
            return definition(**arguments)

    return call


@_fp8_peer("torchao:float8", package="torchao", note="dynamic, rowwise; torch.compile")
def torchao(setting: Setting) -> Callable[..., Any]:
    require_fp8(setting)
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor, QuantizeTensorToFloat8Kwargs

    # What quantize_ makes of a weight by Float8DynamicActivationFloat8WeightConfig(PerRow()), which refuses CPUs.
    options = dict(
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerRow()),
    )
    weights = WeakTensorKeyDictionary()
    definition = _definition(setting)
    compute = compiled(definition, "compile") if setting.device == "cuda" else definition

    def quantised(name: str, value: Any) -> Any:
        if not name.endswith("_weight") or name == "norm_weight":
            return value
        if value not in weights:
            weights[value] = Float8Tensor.from_hp(value, **options)
        return weights[value]

    return lambda **arguments: compute(**{name: quantised(name, value) for name, value in arguments.items()})
