"""Attention against its peers on one GPU: error against fp64 first, then time.

    python -m bench.attention [--dtype bf16] [--pass forward backward] [--only so400m-384] [--json FILE]
    python -m bench.attention --tune            # prints entries for siglip_kernels/attention/tuned.py

Peers: SDPA pinned to FlashAttention, cuDNN, memory-efficient and math; FlexAttention; FlashAttention-2 and -3 where
they are installed. All read packed q, k and v, drawn anew from a normal distribution, each in the layout that it asks
for. A call is timed in a CUDA graph that goes through copies of the inputs, together twice the L2, so that no
launch and no cache is measured; peers take turns in an order drawn anew each round. A peer that fails keeps its row,
with the reason. Needs a CUDA device: exit code 2 without one.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.timing import machine
from siglip_kernels import attention, reference

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Case:
    """What one model asks of attention."""

    name: str
    batch: int
    tokens: int
    heads: int
    head_dim: int

    def operations(self, backward: bool) -> float:
        """Two products forward, five backward, of the head dim that was asked for."""
        return (10 if backward else 4) * self.batch * self.heads * self.tokens**2 * self.head_dim


CASES = [
    *(Case("so400m-384", batch, 729, 16, 72) for batch in (8, 64, 256)),
    *(Case("so400m-224", batch, 256, 16, 72) for batch in (64, 256)),
    *(Case("large-384", batch, 576, 16, 64) for batch in (8, 64, 256)),
    *(Case("base-512", batch, 1024, 12, 64) for batch in (8, 64)),
    Case("base-224", 256, 196, 12, 64),
    *(Case("base text", batch, 64, 12, 64) for batch in (1024, 4096)),
    *(Case("so400m text", batch, 64, 16, 72) for batch in (1024, 4096)),
]


@dataclasses.dataclass
class Row:
    """One measurement, or the reason why there is none."""

    case: str
    direction: str
    peer: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    error: float | None = None  # of one sample against fp64, relative; backward: the worst of the three gradients
    eager_error: float | None = None  # the same of plain PyTorch in the same dtype
    microseconds: float | None = None  # median
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    tflops: float | None = None
    note: str = ""


class Missing(Exception):
    """A peer that cannot be had here, and why."""


def sdpa(backend: str) -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    pinned = getattr(SDPBackend, backend)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(pinned):
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return call


def flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def flash_attention_2() -> Attention:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Missing(f"pip install flash-attn ({error})") from error
    return flash_attn_func


def flash_attention_3() -> Attention:
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError as error:
        raise Missing(f"pip install fa3-fwd ({error})") from error

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return call


PEERS: dict[str, Callable[[], Attention]] = {
    "triton": lambda: attention,
    "SDPA flash": lambda: sdpa("FLASH_ATTENTION"),
    "SDPA cuDNN": lambda: sdpa("CUDNN_ATTENTION"),
    "SDPA efficient": lambda: sdpa("EFFICIENT_ATTENTION"),
    "SDPA math": lambda: sdpa("MATH"),
    "FlexAttention": flex,
    "FlashAttention-2": flash_attention_2,
    "FlashAttention-3": flash_attention_3,
}


def packed(case: Case, dtype: torch.dtype, batch: int | None = None) -> list[Tensor]:
    """q, k and v as views of one tensor, requiring gradients of their own."""
    qkv = torch.randn(batch or case.batch, case.tokens, 3, case.heads, case.head_dim, device="cuda").to(dtype)
    return [tensor.detach().requires_grad_() for tensor in qkv.unbind(2)]


def error(call: Attention, case: Case, dtype: torch.dtype, backward: bool) -> float:
    """Relative error of two samples against fp64, on inputs that no other call sees."""
    inputs = packed(case, dtype, batch=2)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, truth = call(*inputs), reference.attention(*exact)
    if not backward:
        return float((out.double() - truth).norm() / truth.norm())
    out_grad = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, out_grad)
    true = torch.autograd.grad(truth, exact, out_grad.double())
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))


def _backward(out: Tensor, inputs: list[Tensor]) -> Callable[[], object]:
    out_grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, out_grad, retain_graph=True)


def graph(call: Attention, case: Case, dtype: torch.dtype, backward: bool) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of several calls, each on inputs of its own, and how many."""
    bytes_of_one = 4 * case.batch * case.tokens * case.heads * case.head_dim * dtype.itemsize
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, min(64, -(-2 * l2 // bytes_of_one)))
    sets = [packed(case, dtype) for _ in range(copies)]
    work: list[Callable[[], object]]
    if backward:
        work = [_backward(call(*inputs), inputs) for inputs in sets]
    else:
        work = [functools.partial(call, *(tensor.detach() for tensor in inputs)) for inputs in sets]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work[0]()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for step in work:
            step()
    return captured, copies


def time_interleaved(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], seconds: float) -> dict[str, list[float]]:
    """Microseconds of one call, a value for each round: every graph runs once a round, in an order drawn anew."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    for captured, _ in graphs.values():
        captured.replay()
    torch.cuda.synchronize()
    spent = 0.0
    while spent < seconds * len(graphs) or len(times[order[0]]) < 5:
        random.shuffle(order)
        for name in order:
            captured, calls = graphs[name]
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            captured.replay()
            after.record()
            torch.cuda.synchronize()
            elapsed = before.elapsed_time(after)
            spent += elapsed / 1e3
            times[name].append(1e3 * elapsed / calls)
    return times


def measure(case: Case, dtype: torch.dtype, backward: bool, seconds: float, peers: list[str]) -> list[Row]:
    """A row for each peer."""
    rows: dict[str, Row] = {}
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    eager_error = error(reference.attention, case, dtype, backward)
    for name in peers:
        row = rows[name] = Row(
            case.name,
            "backward" if backward else "forward",
            name,
            case.batch,
            case.tokens,
            case.heads,
            case.head_dim,
            str(dtype).removeprefix("torch."),
            eager_error=eager_error,
        )
        try:
            call = PEERS[name]()
            row.error = error(call, case, dtype, backward)
            if not row.error <= 2 * eager_error + torch.finfo(dtype).eps:
                row.note = "error beyond the budget"
            graphs[name] = graph(call, case, dtype, backward)
        except Missing as missing:
            row.note = str(missing)
        except torch.OutOfMemoryError:
            row.note = "out of memory"
        except Exception as failure:  # a peer's own failure is a result
            row.note = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
        torch.cuda.empty_cache()
    for name, values in (time_interleaved(graphs, seconds) if graphs else {}).items():
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        row = rows[name]
        row.microseconds, row.p20, row.p80 = statistics.median(values), fifths[0], fifths[-1]
        row.rounds = len(values)
        row.tflops = case.operations(backward) / row.microseconds / 1e6
    return list(rows.values())


def line(row: Row) -> str:
    time = "" if row.microseconds is None else f"{row.microseconds:9.1f} us ({row.p20:.1f} to {row.p80:.1f})"
    rate = "" if row.tflops is None else f"{row.tflops:6.1f} TFLOP/s"
    wrong = "" if row.error is None else f"error {row.error:.1e} (eager {row.eager_error:.1e})"
    what = f"{row.case} B={row.batch} S={row.tokens} D={row.head_dim} {row.direction}"
    return f"{what:48} {row.peer:17} {time:36} {rate:14} {wrong:34} {row.note}"


def tune(dtype: torch.dtype, seconds: float) -> None:
    """Measures the tiles of each kernel over the cases and prints the fastest, as entries for tuned.py."""
    from siglip_kernels.attention import configuration
    from siglip_kernels.device import facts

    name = facts(torch.device("cuda")).name
    print(f'TUNED["{name}"] = {{')
    heuristic = configuration.tile
    for case in (Case("", 64, tokens, 16, head_dim) for head_dim in (64, 72) for tokens in (196, 256, 576, 729, 1024)):
        for kernel in ("forward", "backward_queries", "backward_keys"):
            graphs = {}
            tiles = {}
            for candidate in configuration.candidates(kernel):

                def chosen(
                    asked: str,
                    *arguments: object,
                    candidate: configuration.Tile = candidate,
                    kernel: str = kernel,
                ) -> configuration.Tile:
                    return candidate if asked == kernel else heuristic(asked, *arguments)  # type: ignore[arg-type]

                configuration.tile = chosen  # type: ignore[assignment]
                try:
                    backward = kernel != "forward"
                    allowed = 2 * error(reference.attention, case, dtype, backward) + torch.finfo(dtype).eps
                    if error(attention, case, dtype, backward) <= allowed:
                        graphs[str(candidate)] = graph(attention, case, dtype, backward)
                        tiles[str(candidate)] = candidate
                except Exception as failure:
                    print(f"    # {kernel} {candidate}: {type(failure).__name__}", file=sys.stderr)
                finally:
                    configuration.tile = heuristic
            medians = {which: statistics.median(values) for which, values in time_interleaved(graphs, seconds).items()}
            best = min(medians, key=lambda which: medians[which])
            columns = sum(configuration.split_head_dim(case.head_dim))
            length = configuration.length_class(case.tokens)
            key = (kernel, dtype.itemsize, columns, length, length)
            print(f"    {key}: {dataclasses.astuple(tiles[best])},  # {medians[best]:.1f} us at {case.tokens} tokens")
    print("}")


def commit() -> str:
    """Of the working tree; "+" where it differs."""
    root = Path(__file__).parent.parent
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, cwd=root).stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description="Attention and its peers: error against fp64, then time.")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--pass", nargs="+", choices=["forward", "backward"], default=["forward", "backward"], dest="passes"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--seconds", type=float, default=0.3, help="of measuring for each peer and case")
    parser.add_argument("--json", type=Path, help="also append a line of JSON for each row to this file")
    parser.add_argument("--tune", action="store_true", help="measure configurations instead, and print the fastest")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.attention times CUDA kernels and this machine has no CUDA device.", file=sys.stderr)
        return 2
    dtype = DTYPES[arguments.dtype]
    if arguments.tune:
        tune(dtype, arguments.seconds)
        return 0
    facts = {**machine(), "commit": commit()}
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    cases = [case for case in CASES if arguments.only in case.name]
    for case, direction in itertools.product(cases, arguments.passes):
        for row in measure(case, dtype, direction == "backward", arguments.seconds, arguments.peers):
            print(line(row), flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps({**dataclasses.asdict(row), **facts}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
