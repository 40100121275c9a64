"""Compiles kernels without a GPU and reads the result: registers, spills, matrix instructions, memory accesses.

    python -m bench.compiled.ahead_of_time attention --gpu a100 h200 b200 [--json]

`bench.compiled.launches` yields `Launch(name, call)` for each operation. A call runs a launcher of this project on
tensors of the `meta` device. Every kernel that it starts is compiled, but not run, with the specialisation that the
just-in-time compiler would choose for the arguments (types, alignment of pointers and strides, constants).

Needs Triton but neither a GPU nor a driver. Triton must not have been imported with TRITON_INTERPRET=1, which replaces
the compiler: tests that run in the interpreter start this module in a subprocess (`rows_in_a_subprocess`).
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

from bench.compiled.launch import GPUS, Launch
from bench.compiled.launches import launches_of, operation_names
from siglip_kernels.device import Facts, pretend


@dataclasses.dataclass
class Row:
    """One kernel, compiled for one GPU. After an error the numbers are zero."""

    launch: str
    kernel: str
    gpu: str
    warps: int = 0
    registers: int = 0  # per thread, at most 255
    stack_bytes: int = 0  # per thread: spilled registers, and arrays that are not in registers
    shared_bytes: int = 0  # per program
    shared_limit: int = 0
    tensor_memory_columns: int = 0  # Blackwell: of 512
    matrix: dict[str, int] = dataclasses.field(default_factory=dict)  # {"wgmma m64n128k16": 5, "mma m16n8k16": ...}
    accesses: dict[str, int] = dataclasses.field(default_factory=dict)  # {"cp.async 16": 30, "ld 2": 0, "st 16": ...}
    register_moves: list[int] = dataclasses.field(default_factory=list)  # setmaxnreg: registers per thread
    error: str = ""

    def problems(self) -> list[str]:
        """An error, a spill, or more shared or tensor memory than the GPU has."""
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
    """The part of a driver that the just-in-time compiler uses."""

    def __init__(self, capability: tuple[int, int]):
        self.capability = 10 * capability[0] + capability[1]

    def get_current_device(self) -> int:
        return self.capability  # keys the kernels' caches, one per architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def compiling_for(gpu: Facts, record: Callable[[str, Any], None]) -> Iterator[None]:
    """Launches inside the context compile for `gpu`; `record` gets the kernel's name and the result or exception."""
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
    """Compiles every kernel that the launches start, for one of GPUS."""
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
    """Number of matrix instructions in the code by shape: "wgmma m64n128k16", "mma m16n8k16", "tcgen05"."""
    found = Counter(f"wgmma {shape}" for shape in re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))
    found.update(f"mma {shape}" for shape in re.findall(r"(?<!w)(?<!g)mma\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))
    found.update("tcgen05" for _ in re.findall(r"tcgen05\.mma\.", ptx))
    return dict(sorted(found.items()))


def global_accesses(ptx: str) -> dict[str, int]:
    """Number of global memory accesses in the code by kind and bytes: "cp.async 16", "ld 4", "st 16", "tma"."""
    found: Counter[str] = Counter()
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],[^;]*?\],\s*(0x[0-9a-f]+|\d+)", ptx):
        found[f"cp.async {int(size, 0)}"] += 1
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        found[f"{kind} {int(vector or 1) * int(bits) // 8}"] += 1
    found.update("tma" for _ in re.findall(r"cp\.async\.bulk\.tensor", ptx))
    return dict(sorted(found.items()))


def rows_in_a_subprocess(operation: str, *gpus: str, only: str = "") -> list[Row]:
    """`compile_launches` of an operation's launches, in a process without TRITON_INTERPRET.

    only: a regular expression that the names of the wanted launches contain.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--json", "--only", only, "--gpu", *gpus]
    command = [sys.executable, "-m", "bench.compiled.ahead_of_time", operation, *options]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if not done.stdout:
        raise RuntimeError(f"{' '.join(command)} printed nothing:\n{done.stderr}")
    return [Row(**row) for row in json.loads(done.stdout)]


def arguments_of(description: str, gpus: bool = False) -> argparse.Namespace:
    """The command line of this module's and its neighbours' commands: operations, --only, --json and perhaps --gpu."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("operations", nargs="+", metavar="OPERATION", choices=operation_names())
    parser.add_argument("--only", default="", help="compile only launches whose name contains this regular expression")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    if gpus:
        parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["a100", "h200", "b200"])
    arguments = parser.parse_args()
    if not any(True for operation in arguments.operations for _ in launches_of(operation, arguments.only)):
        parser.error(f"--only: no launch of {', '.join(arguments.operations)} matches {arguments.only!r}")
    return arguments


def main() -> int:
    arguments = arguments_of("Compile kernels without a GPU; exit code 1 if one spills or fails.", gpus=True)
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
