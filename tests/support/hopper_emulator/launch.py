"""Runs unmodified Gluon kernels for Hopper and Blackwell on the CPU: their results, and the protocol of their barriers.

    with emulating(seed=3):            # launches of @gluon.jit kernels are emulated:
        attention_forward(q, k, v)     # the launcher's own code, with CPU tensors

    emulate(kernel, grid, seed=3, q=tensor_descriptor, out=tensor, BLOCK=64)   # or a single kernel

It executes the kernel's own Python functions, those that are compiled for sm_90 or sm_100, with stand-ins for `gl`
(binding.py, language.py, values.py). What hardware may do late is done late, and what it may do in any order is done in
a random order that the seed determines, so run several seeds. A broken rule raises `Fault` with its kind (faults.py),
program, partition, barrier and step.

Modelled
- warp-specialised partitions, one thread each, under a scheduler that varies the interleaving (scheduler.py);
- mbarriers: counts, phases, parity waits, expected bytes (barriers.py);
- TMA loads that land late and in any order, fill zeros (or NaN) out of bounds, and count their bytes only then; TMA
  stores that read their source at the store_wait that completes them, and clip (copies.py);
- shared memory, per element: whether it was ever written, by whom it was written and read, whether the next access is
  ordered after those whatever the interleaving, and writes of the generic proxy that no fence has made visible to the
  asynchronous proxy (memory.py, block.py);
- asynchronous warpgroup_mma, from registers or shared memory, that reads its operands at the wait that completes it,
  and whose result cannot be used before; of fp8, that its operands lie along the depth (matrix.py);
- tensor memory and tcgen05: products that one partition starts run late, in its order, and only a commit's arrival at
  a barrier tells that they have read their operands and written their accumulators (tensor_memory.py, tensor_core.py);
- Triton's types: promotion, integers that wrap and truncate, bf16 and fp16 rounded to nearest even (values.py);
- pointers with masks and bounds; races in global memory: between two programs, or between two partitions without
  synchronisation (global_memory.py);
- static and dynamic ranges; reductions; constexpr functions and aggregates.

Not modelled
- the agreement of layouts, registers, the size of shared memory: the compiler checks (bench/compiled/ahead_of_time.py);
- threads within a partition: the compiler synchronises its warps around each mbarrier operation;
- time, banks, caches; the order of additions within a matrix product, and the 14 bits with which Hopper adds products
  of fp8 (tests/kernels/fp8 has a model of them); approximations of exp2 and the like;
- a generic read that a later TMA load overwrites counts as ordered by barriers alone, without a proxy fence;
- communication between programs: they run one after another, in a random order; global memory shows a TMA store when
  its source has been read;
- clusters, multicast, cp.async, atomics, unsigned integers, matrix products of fp32 (TF32) and of two blocks together:
  UnsupportedByEmulator.
"""

import contextlib
import inspect
import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from hopper_emulator.binding import bind
from hopper_emulator.block import Block, running
from hopper_emulator.copies import Descriptor
from hopper_emulator.faults import ERROR, IN_FLIGHT, Fault, UnsupportedByEmulator
from hopper_emulator.global_memory import GlobalWrites
from hopper_emulator.language import check_end
from hopper_emulator.values import Pointer, unwrap, wrap
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def emulate(kernel: Any, grid: tuple[int, ...], /, *, seed: int = 0, num_warps: int = 4, **arguments: Any) -> None:
    """Runs a @gluon.jit kernel on the arguments of a launch, tensors and TensorDescriptors on the CPU among them."""
    grid = (*grid, 1, 1)[:3]
    programs = list(itertools.product(*(range(n) for n in grid)))
    random.Random(seed).shuffle(programs)
    writes = GlobalWrites()
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    for program in programs:
        block = Block(program, grid, seed, num_warps, writes)
        inside = {name: unwrap(x) if name in constants else _argument(x) for name, x in arguments.items()}
        with running(block):
            try:
                bind(kernel)(**inside)
                _check_end(block)
            except (Fault, UnsupportedByEmulator):
                raise
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                raise Fault(ERROR, message, "main", block.scheduler.step, program=program) from error


def _argument(x: Any) -> Any:
    x = unwrap(x)
    if isinstance(x, torch.Tensor):
        return Pointer.to_tensor(x)
    if isinstance(x, TensorDescriptor):
        return Descriptor.of_host(x)
    return x if x is None else wrap(x)


def _check_end(block: Block) -> None:
    check_end(block.scheduler.main)
    if block.loads:
        load = block.loads[0]
        message = f"{len(block.loads)} TMA loads without a wait, one of {load.issuer} into {load.shared.name}"
        block.fault(IN_FLIGHT, message, load.barrier.name, load.issuer)
    for core in block.tensor_cores.values():
        core.check_end()
    block.scheduler.land_all()
    for barrier in block.barriers:
        barrier.check_end()


@contextlib.contextmanager
def emulating(seed: int = 0) -> Iterator[None]:
    """Launches kernel[grid](...) of Gluon kernels, with arguments by position or keyword, are emulated."""

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        parameters = inspect.signature(kernel.fn).parameters
        options = {name: named.pop(name) for name in list(named) if name not in parameters}
        bound = inspect.signature(kernel.fn).bind(*arguments, **named)
        bound.apply_defaults()
        programs = grid(bound.arguments) if callable(grid) else tuple(grid)
        emulate(kernel, programs, seed=seed, num_warps=options.get("num_warps", 4), **bound.arguments)

    before = GluonJITFunction.__dict__.get("run")
    GluonJITFunction.run = run
    try:
        yield
    finally:
        if before is None:
            del GluonJITFunction.run
        else:
            GluonJITFunction.run = before
