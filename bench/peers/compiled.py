"""torch.compile as a peer: its modes, and the settings that timing needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Name in the registry: mode of torch.compile.
MODES = {"compile": "default", "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """`function` compiled by torch.compile for fixed sizes.

    In modes with CUDA graphs each call marks a new step, because it overwrites the previous call's outputs.
    """
    # These import Triton, which a process that compiles kernels must not have done before it unsets TRITON_INTERPRET.
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    # Timing `bwd` runs one graph's backward repeatedly, and a donated buffer can be used once only.
    functorch.donated_buffer = False
    # Each mode of a function compiles the same code object once more; beyond the limit it would run eagerly.
    dynamo.recompile_limit = 64
    call = torch.compile(function, mode=MODES[mode], dynamic=False)
    if mode == "compile":
        return call

    def step(*arguments: Any, **keywords: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return call(*arguments, **keywords)

    return step


def frozen(function: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any]:
    """`function` compiled for inference at the sizes of `arguments`, with its weights as constants that are packed
    and folded once ("freezing")."""
    from torch._inductor import config as inductor

    call = compiled(function, "compile")
    with inductor.patch(freezing=True), torch.no_grad():
        call(**arguments)
    return call
