"""Tiny fake rows, settings and contenders on the CPU, for the bench's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from bench.cases.operations import OPERATIONS, Setting
from bench.cases.shapes import AttentionShape, Shape
from bench.measure.roofline import Roofline
from bench.peers import Peer
from bench.report.rows import Row
from siglip_kernels import reference

ROOFLINE = Roofline(flops=1e12, bytes=1e11)


class KnownRoofline:
    """Replaces RooflineProbe where times do not matter."""

    contenders: ClassVar[dict] = {}

    def roofline(self, times: object) -> Roofline:
        return ROOFLINE


PROBE = KnownRoofline()
SHAPE = AttentionShape("tiny", 2, 17, 2, 8)
H200 = "NVIDIA H200"


def setting(
    operation: str = "attention", shape: Shape = SHAPE, direction: str = "fwd", dtype: torch.dtype = torch.float32
) -> Setting:
    return Setting(OPERATIONS[operation], shape, dtype, "cpu", direction)


def contender(name: str, call: Callable[..., Any] = reference.attention, **entry: Any) -> Peer:
    return Peer("attention", name, lambda setting: call, **entry)


def row(impl: str, milliseconds: float | None = None, **values: Any) -> Row:
    """A row; without `values` all rows belong to one group."""
    shape = {"name": "so400m-384-b64", "batch": 64, "tokens": 729, "heads": 16, "head_dim": 72}
    facts: dict[str, Any] = dict(suite="attention", op="attention", direction="fwd", shape=shape, dtype="bf16")
    facts |= dict(
        gpu=H200, driver="580.1", cuda="13.0", torch="2.11.0", triton="3.6.0", commit="abc", date="2026-12-01"
    )
    if milliseconds is not None:
        facts |= dict(ms_median=milliseconds, ms_p20=0.9 * milliseconds, ms_p80=1.1 * milliseconds, tflops=100.0)
        facts |= dict(roofline_ms=1.0, roofline_share=1 / milliseconds, peak_mem_bytes=10**6, error_vs_fp64=1e-3)
    return Row(impl=impl, **{**facts, **values})
