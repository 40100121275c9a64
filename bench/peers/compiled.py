"""torch.compile as a peer: its modes, and what training asks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config

# Name in the registry, and torch.compile's.
MODES = {"compile": "default", "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """`function` through torch.compile with fixed sizes.

    Outputs of CUDA graphs are overwritten by the next call, so each call marks a new step.
    """
    # `bwd` is timed by running one graph's backward many times, and a donated buffer can be used once.
    torch._functorch.config.donated_buffer = False
    # Several modes of one function are several compilations of one code object; beyond the limit it would run eagerly.
    torch._dynamo.config.recompile_limit = 64
    call = torch.compile(function, mode=MODES[mode], dynamic=False)
    if mode == "compile":
        return call

    def step(*arguments: Any, **keywords: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return call(*arguments, **keywords)

    return step
