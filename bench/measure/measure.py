"""Measures one setting: every contender is prepared, judged against fp64, and the right ones are timed side by side."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases.operations import Contender, Inputs, Setting
from bench.cases.suites import SUITES, dtype_name
from bench.environment import Watch, environment
from bench.measure.accuracy import Judge, NoTruth, as_list, differentiable, forward, upstream
from bench.measure.roofline import FloorProbe, Floors
from bench.measure.timing import LEAST_ROUNDS, Clock, Steps, Timing, clock, copies, cuda_peak, interleaved
from bench.peers import Missing, Peer, Unsupported
from bench.report.rows import AGAIN, Row, new_row


@dataclass(frozen=True)
class Plan:
    """How much time to spend. red: (operation, kernels) of ours that `check` found wrong, which are not timed: why."""

    seconds: float = 0.3  # on each contender
    least_rounds: int = LEAST_ROUNDS
    red: Mapping[tuple[str, str], str] = field(default_factory=dict)


class DeadDevice(RuntimeError):
    """A kernel broke the CUDA context: nothing more can run in this process."""


# How the reason begins of a contender that nothing can run after in the same process: it broke the CUDA context, did
# not end, or crashed.
DEADLY = "took the process down: "


def device_is_dead() -> bool:
    """Whether an earlier kernel's error comes back whatever is asked."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def blank_row(suite: str, setting: Setting, entry: Peer, **values: Any) -> Row:
    """A contender's row before it is measured."""
    return new_row(
        suite=suite,
        op=setting.operation.name,
        direction=setting.direction,
        shape=setting.shape.sizes(),
        dtype=dtype_name(setting.dtype),
        impl=entry.name,
        peer_version=entry.version(),
        **values,
    )


def step_of(contender: Contender, inputs: Inputs, setting: Setting) -> Callable[[], object]:
    """One call in the setting's direction. For `bwd` the forward is behind it, and its graph is kept."""
    if setting.direction == "fwd":
        return lambda: forward(contender, inputs)
    inputs = differentiable(inputs)
    leaves = [*inputs.tensors.values(), *contender.parameters.values()]

    def results() -> list[Tensor]:
        return as_list(contender.call(**inputs.arguments()))

    def backward(of: list[Tensor], keep: bool) -> object:
        return torch.autograd.grad(of, leaves, given, retain_graph=keep, allow_unused=True)

    def backward_alone() -> object:
        with contender.active():
            return backward(kept, keep=True)

    def both() -> object:
        with contender.active():
            return backward(results(), keep=False)

    if setting.direction == "bwd":
        with contender.active():
            kept = results()
        given = upstream(kept, setting.dtype)
        return backward_alone
    given = upstream(forward(contender, inputs), setting.dtype)
    return both


def measure(
    suite: str,
    setting: Setting,
    entries: Iterable[Peer],
    probe: FloorProbe,
    plan: Plan,
    write: Callable[[Row], None],
    progress: Callable[[str], None] = lambda what: None,
) -> None:
    """Writes a row for each contender: what fails as soon as it has failed, what is timed when all are.

    The first of those that are timed is timed twice; its second row, with "#2" behind the name, is the noise.
    """
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()  # collecting after every contender need not look through all of PyTorch
    try:
        _measure(suite, setting, list(entries), probe, plan, write, progress)
    finally:
        gc.unfreeze()


def _measure(
    suite: str,
    setting: Setting,
    entries: Sequence[Peer],
    probe: FloorProbe,
    plan: Plan,
    write: Callable[[Row], None],
    progress: Callable[[str], None],
) -> None:
    try:
        group = _Group(suite, setting, plan, probe)
    except Exception as error:  # inputs that do not fit are everybody's failure
        status, reason = explain(error)
        for entry in entries:
            write(blank_row(suite, setting, entry, status=status, reason=f"inputs: {reason}"))
        return
    for entry in entries:
        progress(entry.name)
        row = group.prepare(entry)
        if row is not None and device_is_dead():
            write(replace(row, reason=DEADLY + row.reason))
            raise DeadDevice(f"{entry.name} broke the CUDA context, as its row says; start again to go on without it")
        if row is not None:
            write(row)
    progress("timing")
    for row in group.time():
        write(row)
    group.close()


class _Group:
    """Contenders of one setting that stand ready to be timed, and the inputs that they share."""

    def __init__(self, suite: str, setting: Setting, plan: Plan, probe: FloorProbe):
        self.suite, self.setting, self.plan, self.probe = suite, setting, plan, probe
        first = setting.inputs(0)
        self.inputs = [first, *(setting.inputs(seed) for seed in range(1, copies(first.bytes(), setting.device)))]
        self.judge = Judge(setting, first)
        self.ready: dict[str, tuple[Row, Steps]] = {}

    def prepare(self, entry: Peer) -> Row | None:
        """None where the contender is ready, else its row with the reason why not."""
        row = blank_row(self.suite, self.setting, entry)
        try:
            red = self.plan.red.get((self.setting.operation.name, entry.kernels)) if entry.ours else None
            if red is not None:
                return replace(row, status="error", reason=f"not timed: {red}")
            self._refuse_what_memory_forbids(entry)
            contender = entry.prepare(self.setting)
            doubt = ""
            try:
                verdict = self.judge.judge(entry, contender)
                row.error_vs_fp64 = verdict.error if math.isfinite(verdict.error) else None
                if verdict.problem:
                    return replace(row, status="error", reason=verdict.problem)
            except NoTruth as error:
                doubt = f"not judged: {error}"
            row.reason = "; ".join(note for note in (entry.note, contender.note, doubt) if note)
            steps = [step_of(contender, inputs, self.setting) for inputs in self.inputs]
            for step in steps[:2]:
                step()
            if self.setting.device == "cuda":
                row.peak_mem_bytes = cuda_peak(steps[0])
            self.ready[entry.name] = row, Steps(steps)
            return None
        except Exception as error:  # whatever goes wrong in a peer is its result
            status, reason = explain(error)
            return replace(row, status=status, reason=reason)
        finally:
            free()

    def _refuse_what_memory_forbids(self, entry: Peer) -> None:
        """A CPU's system lends memory that it does not have, and ends the process later."""
        pairs = getattr(self.setting.shape, "pairs", 0)
        if self.setting.device == "cpu" and entry.quadratic:
            needed, there = 4 * entry.quadratic * pairs**2, _available_memory()
            if needed > 0.8 * there:
                raise torch.OutOfMemoryError(
                    f"not tried: about {needed / 1e9:.0f} GB, and {there / 1e9:.0f} GB are free"
                )

    def time(self) -> list[Row]:
        """Rows of all that are ready."""
        if not self.ready:
            return []
        if self.setting.device == "cpu":
            for name, peak in peaks_in_a_process(self.setting, list(self.ready)).items():
                self.ready[name][0].peak_mem_bytes = peak
        timed = {name: steps for name, (_, steps) in self.ready.items()}
        first = next(iter(timed))
        timed[first + AGAIN] = timed[first]
        watch = Watch()
        contenders = {**timed, **self.probe.contenders}
        rows = []

        def failed(name: str, error: Exception) -> None:
            if name not in timed:
                raise error  # without the floors there is nothing to tell
            status, reason = explain(error)
            row = replace(self.ready[name.removesuffix(AGAIN)][0], impl=name)
            rows.append(replace(row, status=status, reason=f"while it was timed: {reason}"))
            free()

        plan = self.plan
        times = interleaved(contenders, self._clock(), plan.seconds, plan.least_rounds, watch.look, failed)
        floors = self.probe.floors(times)
        for name in (name for name in timed if name in times):
            row = self.ready[name.removesuffix(AGAIN)][0]
            note = "; ".join(part for part in (row.reason, watch.note()) if part)
            rows.append(with_times(replace(row, impl=name, reason=note), self.setting, times[name], floors))
        return rows

    def _clock(self) -> Clock:
        return clock(self.setting.device, SUITES[self.suite].hide_launches)

    def close(self) -> None:
        self.ready.clear()
        self.inputs.clear()
        free()


def with_times(row: Row, setting: Setting, timing: Timing, floors: Floors) -> Row:
    """The row with what follows from the time: rates, and the share of the floor."""
    element, seconds = setting.dtype.itemsize, timing.median / 1e3
    floor = floors.milliseconds(setting.shape, setting.direction, element)
    return replace(
        row,
        ms_median=timing.median,
        ms_p20=timing.p20,
        ms_p80=timing.p80,
        tflops=setting.shape.flops(setting.direction) / seconds / 1e12,
        gbps=setting.shape.bytes(setting.direction, element) / seconds / 1e9,
        floor_ms=floor,
        floor_share=floor / timing.median,
    )


def explain(error: BaseException) -> tuple[str, str]:
    """(status, reason) of a contender that raised."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Missing):
        return "missing", message
    if isinstance(error, Unsupported):
        return "unsupported", message
    if isinstance(error, torch.OutOfMemoryError):
        return "oom", message[:200]
    if isinstance(error, NotImplementedError):
        return "unsupported", message[:300]
    return "error", f"{type(error).__name__}: {message}"[:300]


def free() -> None:
    """Gives back what the last contender held."""
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # of a dead device
            torch.cuda.empty_cache()


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**40


def peaks_in_a_process(setting: Setting, names: Sequence[str]) -> dict[str, int]:
    """How far the resident memory of a fresh process rises during one call of each contender (Linux; empty elsewhere).

    There the system takes back every piece of memory that is freed, so that none is used again unseen. What the process
    could not measure, because it ended early, is absent.
    """
    if sys.platform != "linux":
        return {}
    what = {
        "operation": setting.operation.name,
        "shape": setting.shape.sizes(),
        "dtype": dtype_name(setting.dtype),
        "direction": setting.direction,
        "peers": list(names),
    }
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "bench.measure.peak_memory", json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**allocator))
    return {name: peak for line in done.stdout.splitlines() for name, peak in json.loads(line).items()}
