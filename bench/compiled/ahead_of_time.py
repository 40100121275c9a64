"""Compiles kernels for GPUs that are not there, and reads what came out: registers, spills, matrix instructions.

    python -m bench.compiled.ahead_of_time attention --gpu a100 h200 b200 [--json]

`bench.compiled.launches` yields `Launch(name, call)` for each operation. A call runs a launcher of ours on
tensors of the `meta` device; every kernel that it would start is compiled exactly as the just-in-time compiler would
have specialised it for those arguments (types, alignment of pointers and strides, constants), and none is run.

Needs Triton but neither a GPU nor a driver. Triton must not have been imported with TRITON_INTERPRET=1, which replaces
the compiler: tests that run in the interpreter start this module as a process of its own (`rows_in_a_subprocess`).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from siglip_kernels.device import Facts, pretend

# Shared memory is what one program may have (CUDA C++ programming guide, compute capabilities).
GPUS = {
    "a100": Facts("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912, 40 * 2**20),
    "rtx4090": Facts("NVIDIA GeForce RTX 4090", (8, 9), 128, 101_376, 72 * 2**20),
    "h200": Facts("NVIDIA H200", (9, 0), 132, 232_448, 50 * 2**20),
    "b200": Facts("NVIDIA B200", (10, 0), 148, 232_448, 126 * 2**20),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A named call of a launcher."""

    name: str
    call: Callable[[], object]


@dataclasses.dataclass
class Row:
    """One kernel, compiled for one GPU. An error, where there is one, leaves the numbers at zero."""

    launch: str
    kernel: str
    gpu: str
    warps: int = 0
    registers: int = 0  # of a thread; 255 is the most there is
    stack_bytes: int = 0  # of a thread: spilled registers and arrays that are not in registers
    shared_bytes: int = 0  # of a program
    shared_limit: int = 0
    tensor_memory_columns: int = 0  # Blackwell: of 512
    matrix: dict[str, int] = dataclasses.field(default_factory=dict)  # {"wgmma m64n128k16": 5, "mma m16n8k16": ...}
    accesses: dict[str, int] = dataclasses.field(default_factory=dict)  # {"cp.async 16": 30, "ld 2": 0, "st 16": ...}
    register_moves: list[int] = dataclasses.field(default_factory=list)  # setmaxnreg: what partitions change to
    error: str = ""

    def problems(self) -> list[str]:
        """What must not be: an error, a spill, or more shared memory than the GPU has."""
        found = [self.error] if self.error else []
        if self.stack_bytes:
            found.append(f"{self.stack_bytes} B of stack")
        if self.shared_bytes > self.shared_limit:
            found.append(f"{self.shared_bytes} B of shared memory, the limit is {self.shared_limit}")
        if self.tensor_memory_columns > 512:
            found.append(f"{self.tensor_memory_columns} columns of tensor memory, the limit is 512")
        return found

    def __str__(self) -> str:
        counts = "  ".join(f"{name} x{count}" for part in (self.matrix, self.accesses) for name, count in part.items())
        verdict = "; ".join(self.problems()) or "ok"
        return (
            f"{self.gpu:7} {self.launch:44} {self.kernel:36} {self.warps:2} warps  {self.registers:3} registers  "
            f"{self.shared_bytes:6} B shared  {counts}  {verdict}"
        )


class _NoDriver:
    """Answers the three questions that the just-in-time compiler asks a driver."""

    def __init__(self, capability: tuple[int, int]):
        self.capability = 10 * capability[0] + capability[1]

    def get_current_device(self) -> int:
        return self.capability  # keys the kernels' caches: one for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def compiling_for(gpu: Facts, record: Callable[[str, Any], None]) -> Iterator[None]:
    """Within it, every launch of a kernel compiles it for `gpu`; `record` gets its name and the result or exception."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, active = JITFunction.run, driver._active

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        try:
            record(self.fn.__name__, run(self, *arguments, grid=grid, warmup=True, **options))
        except Exception as error:
            record(self.fn.__name__, error)

    JITFunction.run = compile_only
    driver.set_active(_NoDriver(gpu.capability))
    try:
        with pretend(gpu):
            yield
    finally:
        JITFunction.run = run
        driver._active = active


def compile_launches(launches: Iterator[Launch], gpu_name: str) -> list[Row]:
    """Every kernel that the launches start, compiled for a GPU of GPUS."""
    gpu = GPUS[gpu_name]
    rows: list[Row] = []
    for launch in launches:

        def record(kernel: str, compiled: Any, launch: Launch = launch) -> None:
            rows.append(_read(launch.name, kernel, gpu_name, gpu, compiled))

        with compiling_for(gpu, record):
            launch.call()
    return rows


def _read(launch: str, kernel: str, gpu_name: str, gpu: Facts, compiled: Any) -> Row:
    row = Row(launch, kernel, gpu_name, shared_limit=gpu.shared_memory)
    if isinstance(compiled, Exception):
        row.error = f"{type(compiled).__name__}: {compiled}"[:500]
        return row
    row.warps = compiled.metadata.num_warps
    row.shared_bytes = compiled.metadata.shared
    row.tensor_memory_columns = getattr(compiled.metadata, "tmem_size", None) or 0
    usage = _resource_usage(compiled.asm["cubin"])
    row.registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    row.stack_bytes = max(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    row.matrix = matrix_instructions(compiled.asm["ptx"])
    row.accesses = global_accesses(compiled.asm["ptx"])
    row.register_moves = sorted({int(n) for n in re.findall(r"setmaxnreg\.\S+\s+(\d+)", compiled.asm["ptx"])})
    return row


def _resource_usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True).stdout


def sass(cubin: bytes) -> str:
    """The machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def matrix_instructions(ptx: str) -> dict[str, int]:
    """How often each matrix instruction and shape stands in the code: "wgmma m64n128k16", "mma m16n8k16", "tcgen05"."""
    found = Counter(f"wgmma {shape}" for shape in re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))
    found.update(f"mma {shape}" for shape in re.findall(r"(?<!w)(?<!g)mma\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))
    found.update("tcgen05" for _ in re.findall(r"tcgen05\.mma\.", ptx))
    return dict(sorted(found.items()))


def global_accesses(ptx: str) -> dict[str, int]:
    """How often the code touches global memory, by kind and bytes: "cp.async 16", "ld 4", "st 16", "tma"."""
    found: Counter[str] = Counter()
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],[^;]*?\],\s*(0x[0-9a-f]+|\d+)", ptx):
        found[f"cp.async {int(size, 0)}"] += 1
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        found[f"{kind} {int(vector or 1) * int(bits) // 8}"] += 1
    found.update("tma" for _ in re.findall(r"cp\.async\.bulk\.tensor", ptx))
    return dict(sorted(found.items()))


def rows_in_a_subprocess(operation: str, *gpus: str, only: str = "") -> list[Row]:
    """`compile_launches` of an operation's launches, in a process where Triton's compiler is not interpreted away.

    only: launches whose name contains this.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--json", "--only", only, "--gpu", *gpus]
    command = [sys.executable, "-m", "bench.compiled.ahead_of_time", operation, *options]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if not done.stdout:
        raise RuntimeError(f"{' '.join(command)} printed nothing:\n{done.stderr}")
    return [Row(**row) for row in json.loads(done.stdout)]


def main() -> int:
    from bench.compiled.launches import launches_of, operation_names  # which import Launch from here

    parser = argparse.ArgumentParser(description="Compile kernels without a GPU; exit code 1 if one spills or fails.")
    parser.add_argument("operations", nargs="+", metavar="OPERATION", choices=operation_names())
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["a100", "h200", "b200"])
    parser.add_argument("--only", default="", help="only launches whose name contains this")
    parser.add_argument("--json", action="store_true", help="print a list of rows rather than a table")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for operation in arguments.operations:
        for gpu in arguments.gpu:
            for row in compile_launches(launches_of(operation, arguments.only), gpu):
                rows.append(row)
                if not arguments.json:
                    print(row, flush=True)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
    return any(row.problems() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
