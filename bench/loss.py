"""The sigmoid loss against its peers: errors first, then time and memory of a training step.

    python -m bench.loss [--json FILE] [--sizes 4096 16384 ...] [--widths 768 1152] [--seconds 1]

On a CUDA device: Triton, chunked, eager, compiled eager, siglip-kernel (both ways of its chunk_size) and open_clip, in
bf16. Without one: chunked against eager in fp32, with peak memory from a process of its own for each; Triton kernels
are not timed there, because the interpreter's time says nothing about them. Peers that are missing or run out of memory
keep their rows, with the reason.
"""

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import interleaved, machine
from siglip_kernels import chunked_sigmoid_loss, reference, sigmoid_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

GPU_SIZES = [512, 1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 1_048_576]
CPU_SIZES = [1024, 2048, 4096, 8192, 16_384]
# Above this only what never holds N x N values is tried.
LARGEST_QUADRATIC = 131_072


@dataclasses.dataclass
class Row:
    """One measurement, or the reason why there is none."""

    peer: str
    pairs: int
    width: int
    dtype: str
    milliseconds: float | None = None  # forward and backward, median
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    peak_megabytes: float | None = None  # beyond embeddings and their gradients
    share_of_floor: float | None = None  # of 6 N² D operations at the rate given
    note: str = ""


class Missing(Exception):
    """A peer that cannot be had here, and why."""


def triton_loss() -> Loss:
    if not torch.cuda.is_available():
        raise Missing("not timed: no CUDA device")
    return sigmoid_loss


def compiled_eager() -> Loss:
    return torch.compile(reference.sigmoid_loss)


def siglip_kernel(chunk_size: int) -> Loss:
    """siglip-kernel's bf16 path; chunk_size 0 is its own choice, 1024 its least memory."""
    if not torch.cuda.is_available():
        raise Missing("needs a CUDA device")
    try:
        from siglip_kernel.fused_chunked_bf16 import fused_chunked_bf16_siglip_loss as peer
    except ImportError as error:
        raise Missing(f"pip install siglip-kernel==0.1.2 ({error})") from error
    return lambda x, y, t, b: peer(x, y, t.log(), b, chunk_size)


def open_clip(**arguments) -> Loss:
    """open_clip's SigLipLoss, from the file that defines it: the package imports torchvision."""
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        raise Missing("pip install --no-deps open-clip-torch")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(found.origin).parent / "loss.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.SigLipLoss(**arguments)
    except TypeError as error:
        raise Missing(f"open_clip {_version('open_clip_torch')}: {error}") from error


# Name, how to get it, whether it holds N x N values.
PEERS: list[tuple[str, Callable[[], Loss], bool]] = [
    ("triton", triton_loss, False),
    ("chunked", lambda: chunked_sigmoid_loss, False),
    ("eager", lambda: reference.sigmoid_loss, True),
    ("compiled eager", compiled_eager, True),
    ("siglip-kernel", lambda: siglip_kernel(0), False),
    ("siglip-kernel chunk_size=1024", lambda: siglip_kernel(1024), False),
    ("open_clip", open_clip, True),
    ("open_clip chunk_size=1024", lambda: open_clip(chunk_size=1024), True),
]
CPU_PEERS = ("triton", "chunked", "eager", "open_clip")


def inputs(pairs: int, width: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Normalised embeddings and SigLIP's initial scale and bias, all requiring gradients."""
    generator = torch.Generator(device).manual_seed(0)
    embeds = [
        F.normalize(torch.randn(pairs, width, device=device, generator=generator), dim=-1).to(dtype) for _ in range(2)
    ]
    scalars = [torch.tensor(value, device=device) for value in (10.0, -10.0)]
    return [value.requires_grad_() for value in embeds + scalars]


def training_step(loss: Loss, values: list[Tensor]) -> Callable[[], object]:
    def step() -> None:
        for value in values:
            value.grad = None
        loss(*values).backward()  # type: ignore[call-arg]

    return step


def _peak(step: Callable[[], object], values: list[Tensor]) -> float:
    """CUDA: megabytes beyond the inputs and their gradients."""
    for value in values:
        value.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    gradients = sum(value.numel() * value.element_size() for value in values)
    return (torch.cuda.max_memory_allocated() - before - gradients) / 1e6


def errors(device: str, dtype: torch.dtype, width: int, pairs: int = 2048) -> list[dict[str, object]]:
    """Relative errors of loss and gradients against fp64, for each peer."""
    values = inputs(pairs, width, device, dtype)
    exact = [value.detach().double().requires_grad_() for value in values]
    true = reference.sigmoid_loss(*exact)
    gradients = [true.detach(), *torch.autograd.grad(true, exact)]
    found: list[dict[str, object]] = []
    for name, make, _ in PEERS:
        if device == "cpu" and name not in CPU_PEERS:
            continue
        try:
            loss = make()(*values)
        except Missing as missing:
            found.append({"peer": name, "note": str(missing)})
            continue
        ours = [loss.detach(), *torch.autograd.grad(loss, values)]
        relative = [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, gradients, strict=True)]
        found.append({"peer": name, **dict(zip(("loss", "image", "text", "scale", "bias"), relative, strict=True))})
    return found


def measure(device: str, dtype: torch.dtype, pairs: int, width: int, seconds: float, rate: float) -> list[Row]:
    """A row for each peer at one size."""
    values = inputs(pairs, width, device, dtype)
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, make, quadratic in PEERS:
        if device == "cpu" and name not in CPU_PEERS:
            continue
        row = rows[name] = Row(name, pairs, width, str(dtype).removeprefix("torch."))
        if quadratic and pairs > LARGEST_QUADRATIC:
            row.note = f"not run: would hold {pairs:,} x {pairs:,} values, {pairs**2 * 4 / 1e12:.1f} TB in fp32"
            continue
        try:
            step = training_step(make(), values)
            step()  # compiles
            step()
            if device == "cuda":
                row.peak_megabytes = _peak(step, values)
            else:
                row.peak_megabytes = _peak_in_a_process(name, pairs, width)
            steps[name] = step
        except Missing as missing:
            row.note = str(missing)
        except torch.OutOfMemoryError:
            row.note = "out of memory"
        except Exception as error:  # a peer's own failure is a result
            row.note = f"{type(error).__name__}: {str(error)[:200]}"
        if device == "cuda":
            for value in values:
                value.grad = None
            torch.cuda.empty_cache()
    for name, timing in interleaved(steps, device, seconds, least_rounds=3).items() if steps else ():
        row = rows[name]
        row.milliseconds, row.p20, row.p80 = timing.median * 1e3, timing.p20 * 1e3, timing.p80 * 1e3
        row.rounds = timing.rounds
        if device == "cuda":
            row.share_of_floor = 6 * pairs**2 * width / rate / timing.median
    return list(rows.values())


_ONE_STEP = """
import sys, torch
from bench.loss import PEERS, inputs, training_step
from bench.timing import peak_resident_bytes
name, pairs, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
values = inputs(pairs, width, "cpu", torch.float32)
loss = next(make for peer, make, _ in PEERS if peer == name)()
training_step(loss, inputs(64, width, "cpu", torch.float32))()
before = peak_resident_bytes()
training_step(loss, values)()
gradients = sum(value.numel() * value.element_size() for value in values)
print(peak_resident_bytes() - before - gradients)
"""


def _peak_in_a_process(peer: str, pairs: int, width: int) -> float:
    """CPU: how far the resident set of a fresh process rises in one step, in megabytes beyond inputs and gradients."""
    command = [sys.executable, "-c", _ONE_STEP, peer, str(pairs), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return max(0, int(done.stdout)) / 1e6


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _line(row: Row) -> str:
    time = "" if row.milliseconds is None else f"{row.milliseconds:10.2f} ms ({row.p20:.2f} to {row.p80:.2f})"
    peak = "" if row.peak_megabytes is None else f"{row.peak_megabytes:9.0f} MB"
    share = "" if row.share_of_floor is None else f"{row.share_of_floor:6.1%} of the floor"
    return f"{row.pairs:9,} x {row.width:<5} {row.peer:30} {time:36} {peak:12} {share} {row.note}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Errors, time and memory of the sigmoid loss and its peers.")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--sizes", type=int, nargs="+", help="batch sizes")
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1152])
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring for each peer and size")
    parser.add_argument("--tflops", type=float, default=790.0, help="what the floor of 6 N² D assumes, in TFLOP/s")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    facts = {**machine(), "siglip-kernel": _version("siglip-kernel"), "open_clip": _version("open_clip_torch")}
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    if not on_gpu:
        print("No CUDA device: plain PyTorch only, in fp32. The Triton kernels are not timed.")

    print(f"\nRelative error against fp64 at 2,048 pairs, {dtype}")
    found = {width: errors(device, dtype, width) for width in arguments.widths}
    for width, table in found.items():
        for entry in table:
            print(
                f"{width:6}", "  ".join(f"{k} {v:.1e}" if isinstance(v, float) else f"{v:30}" for k, v in entry.items())
            )

    print("\nForward and backward; memory beyond inputs and gradients")
    rows: list[Row] = []
    for width in arguments.widths:
        for pairs in arguments.sizes or (GPU_SIZES if on_gpu else CPU_SIZES):
            for row in measure(device, dtype, pairs, width, arguments.seconds, arguments.tflops * 1e12):
                rows.append(row)
                print(_line(row), flush=True)
    if arguments.json:
        result = {"machine": facts, "errors": found, "rows": [dataclasses.asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
