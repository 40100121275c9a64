"""Host time of a call: PyTorch's dispatcher, Python, and the look-ups of the just-in-time compiler.

    python -m bench.host_time [--only attention] [--json]

At small batch sizes a GPU waits for the host, however fast its kernels are. No GPU is needed: the operations run on
tiny CPU tensors as if on an H200, and each kernel is compiled and looked up as usual but not launched; the driver's
launch, some microseconds, comes on top. The CPU time of this process on one thread is measured, which a busy machine
disturbs little. Needs Triton, which must not have been imported with TRITON_INTERPRET=1.
"""

import argparse
import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import siglip_kernels
from bench.compiled.ahead_of_time import GPUS, compiling_for

TOKENS, WIDTH, HIDDEN, HEADS = 128, 64, 128, 1
ROUNDS, CALLS = 15, 40


def operations(gradients: bool) -> dict[str, Callable[[], Any]]:
    """The operations of an encoder layer and parts of them, in bf16. gradients: whether the tensors require them."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16).requires_grad_(gradients)

    x, norm = tensor(1, TOKENS, WIDTH), (tensor(WIDTH), tensor(WIDTH), 1e-6)
    qkv = tensor(1, TOKENS, 3, HEADS, WIDTH // HEADS).unbind(2)
    projections = [tensor(*shape) for _ in "qkv" for shape in ((WIDTH, WIDTH), (WIDTH,))]
    mlp = [tensor(*shape) for shape in ((HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,))]
    call: Callable[..., Any] = functools.partial  # a type checker would count starred arguments
    return {
        "pre_norm_attention": call(siglip_kernels.pre_norm_attention, x, *norm, *projections, *projections[:2], HEADS),
        "pre_norm_qkv": call(siglip_kernels.pre_norm_qkv, x, *norm, *projections, HEADS),
        "attention": call(siglip_kernels.attention, *qkv),
        "linear": call(siglip_kernels.linear, x, *projections[:2], x),
        "pre_norm_mlp": call(siglip_kernels.pre_norm_mlp, x, *norm, *mlp),
        "layer_norm": call(siglip_kernels.layer_norm, x, *norm),
    }


def microseconds(call: Callable[[], Any]) -> float:
    """CPU time of one call in microseconds: the median of several rounds' averages."""
    averages = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        averages.append((time.process_time() - start) / CALLS * 1e6)
    return statistics.median(averages[1:])  # the first round compiles


def rows(only: str = "") -> Iterator[dict[str, Any]]:
    """A row per operation in inference, then in training, where the forward pass is timed."""
    launched: list[str] = []

    def record(kernel: str, compiled: Any) -> None:
        if isinstance(compiled, Exception):
            raise compiled
        launched.append(kernel)

    with compiling_for(GPUS["h200"], record):
        for training in (False, True):
            for name, call in operations(training).items():
                if not re.search(only, name):
                    continue
                with torch.set_grad_enabled(training):
                    time_taken = microseconds(call)
                    launched.clear()
                    call()
                mode = "training" if training else "inference"
                yield {"operation": name, "mode": mode, "launches": len(launched), "us": round(time_taken, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Host time of a call, without a GPU.")
    parser.add_argument(
        "--only", default="", help="measure only operations whose name contains this regular expression"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    arguments = parser.parse_args()
    if not any(re.search(arguments.only, name) for name in operations(gradients=False)):
        parser.error(f"--only: no operation matches {arguments.only!r}")
    torch.set_num_threads(1)
    for row in rows(arguments.only):
        if arguments.json:
            print(json.dumps(row), flush=True)
        else:
            print("{operation:18} {mode:10} {launches} launches {us:7.1f} us".format(**row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
