"""Compiles kernels without a GPU and reads the result: registers, spills, matrix instructions, memory accesses.

    python -m bench.compiled.ahead_of_time attention --gpu h200 sm_120 [--json]

`bench.compiled.launches` yields `Launch(name, call)` for each operation. A call runs a launcher of this project on
tensors of the `meta` device. Every kernel that it starts is compiled, but not run, with the specialisation that the
just-in-time compiler would choose for the arguments (types, alignment of pointers and strides, constants).

Triton keeps what it compiles in ~/.triton/cache or TRITON_CACHE_DIR, by the source of the kernel and of what it calls,
its specialisation, the GPU and the compiler's version, so that only changed kernels are compiled again.

Needs Triton but neither a GPU nor a driver. Triton must not have been imported with TRITON_INTERPRET=1, which replaces
the compiler: tests that run in the interpreter start this module in a subprocess (`rows_in_a_subprocess`).
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from bench.compiled.launch import BY_NAME, GPUS, Launch
from bench.compiled.launches import launches_of, operation_names
from siglip_kernels.device import Facts, pretend

STACK_LIMIT = 16  # bytes per thread: four spilled registers
TENSOR_MEMORY = 512  # columns of a multiprocessor with tcgen05


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
    inputs: list[str] = dataclasses.field(default_factory=list)  # element types of the tensors: ["bf16", "fp32"]
    products: dict[str, int] = dataclasses.field(default_factory=dict)  # tl.dot by operands: {"bf16": 2, "tf32": 1}
    products_by_vectors: int = 0  # of the compiled products, those without matrix instructions
    key: str = ""  # identifies the compiled kernel: its source, specialisation, GPU and compiler
    error: str = ""

    def problems(self) -> list[str]:
        """An error, a spill of more than STACK_LIMIT, more shared or tensor memory than the GPU has, or products of
        half precision or TF32 without matrix instructions.
        """
        found = [self.error] if self.error else []
        if self.stack_bytes > STACK_LIMIT:
            found.append(f"{self.stack_bytes} B of stack, the limit is {STACK_LIMIT}")
        if self.shared_bytes > self.shared_limit:
            found.append(f"{self.shared_bytes} B of shared memory, the limit is {self.shared_limit}")
        if self.tensor_memory_columns > TENSOR_MEMORY:
            found.append(f"{self.tensor_memory_columns} columns of tensor memory, the limit is {TENSOR_MEMORY}")
        if self._lacks_matrix_instructions():
            found.append(f"products of {', '.join(self.products)} without matrix instructions")
        return found

    def _lacks_matrix_instructions(self) -> bool:
        """Whether a product of half precision or TF32 has none. Those of fp32 that is not TF32 never have any."""
        reduced = {"bf16", "fp16", "fp8", "tf32"} & {*self.inputs, *self.products}
        if not self.products or not reduced:
            return False
        return not self.matrix or (self.products_by_vectors > 0 and "fp32" not in self.products)

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
    launched: dict[int, Any] = {}

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched[id(self)] = self  # a function's own hash takes longer than a launch
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
        for function in launched.values():  # a thousand compiled kernels would fill the memory; Triton has them on disk
            function.device_caches.clear()


def compile_launches(launches: Iterator[Launch], gpu_name: str) -> list[Row]:
    """Compiles every kernel that the launches start, for one of GPUS."""
    rows: list[Row] = []
    for launch in launches:
        found = _compile(launch, gpu_name)
        if any(row.error for row in found):
            found = _compile_without_the_cache(launch, gpu_name)
        rows += found
    return rows


def _compile(launch: Launch, gpu_name: str) -> list[Row]:
    gpu = GPUS[gpu_name]
    rows: list[Row] = []

    def record(kernel: str, compiled: Any) -> None:
        row = Row(launch.name, kernel, gpu_name, shared_limit=gpu.shared_memory)
        try:
            if isinstance(compiled, Exception):
                raise compiled
            _read(row, compiled)
        except Exception as error:
            row.error = in_one_line(error)
        rows.append(row)

    with compiling_for(gpu, record):
        launch.call()
    return rows


def in_one_line(error: Exception) -> str:
    """The error's type and message; of a long one, such as one that quotes the kernel, the beginning and the end."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 500 else f"{text[:100]} … {text[-400:]}"


def _compile_without_the_cache(launch: Launch, gpu_name: str) -> list[Row]:
    """`_compile` again in an empty cache: the error may be that of a damaged entry, which is then removed."""
    from triton.runtime.cache import get_cache_manager

    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, TRITON_CACHE_DIR=empty):
        rows = _compile(launch, gpu_name)
    for row in rows:
        if not row.error:
            with contextlib.suppress(OSError):  # a cache that cannot be written
                shutil.rmtree(get_cache_manager(row.key).cache_dir)
    return rows


def _read(row: Row, compiled: Any) -> None:
    """Fills the row with the facts of a compiled kernel."""
    row.key = compiled.hash
    row.warps = compiled.metadata.num_warps
    row.shared_bytes = compiled.metadata.shared
    row.tensor_memory_columns = getattr(compiled.metadata, "tmem_size", None) or 0
    row.registers, row.stack_bytes = resources(compiled.asm["cubin"])
    row.matrix = matrix_instructions(compiled.asm["ptx"])
    row.accesses = global_accesses(compiled.asm["ptx"])
    row.register_moves = sorted({int(n) for n in re.findall(r"setmaxnreg\.\S+\s+(\d+)", compiled.asm["ptx"])})
    row.inputs = element_types(compiled.src.signature.values())
    row.products = products(compiled.asm.get("ttir") or compiled.asm["ttgir"])
    row.products_by_vectors = products_by_vectors(compiled.asm["ttgir"])


@functools.cache
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    usage = _output_of("cuobjdump", "-res-usage", cubin)
    found = (re.findall(pattern, usage) for pattern in (r"REG:(\d+)", r"(?:STACK|LOCAL):(\d+)"))
    registers, stack = (max(int(n) for n in numbers) for numbers in found)
    return registers, stack


@functools.lru_cache(maxsize=32)  # an operation may start a kernel dozens of times; the text may take megabytes
def sass(cubin: bytes) -> str:
    """The machine code as text."""
    return _output_of("nvdisasm", "-c", cubin)


def _output_of(tool: str, option: str, cubin: bytes) -> str:
    """The output of one of the tools that Triton brings along. RuntimeError if it cannot read the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_tool(tool), option, file.name], capture_output=True, text=True)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"{tool}: {done.stderr.strip()[:200] or 'no output'}")
    return done.stdout


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


_NAMES = {"f8": "fp8", "f16": "fp16", "f32": "fp32"}  # as this project calls what Triton's IR calls f16 and f32


def element_types(signature: Iterable[str]) -> list[str]:
    """The element types of the pointers and tensor descriptors in a kernel's signature: ["bf16", "fp32"]."""
    named = (re.match(r"\*k?([a-z]+\d+\w*)|tensordesc<([a-z]+\d+)", str(one)) for one in signature)
    return sorted({one[1] or one[2] for one in named if one})


def products(ir: str) -> dict[str, int]:
    """Number of products of tiles in Triton's or Gluon's IR, by their operands: bf16, fp16, fp8, tf32, fp32."""
    found: Counter[str] = Counter()
    for line in re.findall(r"(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) .*", ir):
        operand = next(iter(re.findall(r": *(?:tensor|!ttg\.memdesc)<(?:\d+x)+([a-z]+\d+)", line)), "unknown")
        tf32 = operand == "f32" and re.search(r"inputPrecision = (tf32|0)\b", line)
        found["tf32" if tf32 else _NAMES.get(operand, operand)] += 1
    return dict(sorted(found.items()))


def products_by_vectors(ttgir: str) -> int:
    """Number of products that are compiled to multiply-adds: those whose result is laid out in blocks of elements."""
    return len(re.findall(r"tt\.dot .*-> tensor<[^#]*#blocked\d*>", ttgir))


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
        parser.add_argument("--gpu", nargs="+", choices=BY_NAME, default=list(GPUS), metavar="GPU")
    arguments = parser.parse_args()
    if not any(True for operation in arguments.operations for _ in launches_of(operation, arguments.only)):
        parser.error(f"--only: no launch of {', '.join(arguments.operations)} matches {arguments.only!r}")
    return arguments


def main() -> int:
    arguments = arguments_of("Compile kernels without a GPU; exit code 1 if one spills or fails.", gpus=True)
    rows: list[Row] = []
    for operation in arguments.operations:
        for gpu in dict.fromkeys(BY_NAME[name] for name in arguments.gpu):
            for row in compile_launches(launches_of(operation, arguments.only), gpu):
                rows.append(row)
                if not arguments.json:
                    print(row, flush=True)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
    return any(row.problems() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
