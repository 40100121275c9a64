"""Measures one setting: prepares every contender, judges it against fp64, and times the correct ones side by side."""

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
from bench.cases.shapes import LossShape
from bench.cases.suites import SUITES, dtype_name
from bench.environment import Watch, process_environment
from bench.measure.accuracy import Judge, NoTruth, as_list, differentiable, forward, upstream
from bench.measure.roofline import Roofline, RooflineProbe
from bench.measure.timing import LEAST_ROUNDS, Clock, Steps, Timing, clock, copies, cuda_peak, interleaved
from bench.peers import Missing, Peer, Unsupported
from bench.report.rows import AGAIN, Row, new_row


@dataclass(frozen=True)
class Plan:
    """How much time to spend. failed: (operation, kernels) that failed `check` and are not timed, with the reason."""

    seconds: float = 0.3  # on each contender
    least_rounds: int = LEAST_ROUNDS
    failed: Mapping[tuple[str, str], str] = field(default_factory=dict)


class DeadDevice(RuntimeError):
    """A kernel broke the CUDA context: nothing more can run in this process."""


TIMING = "timing"  # the step of a group that times all its contenders


def device_is_dead() -> bool:
    """Whether an earlier kernel's error broke the CUDA context."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def blank_row(suite: str, setting: Setting, entry: Peer, **values: Any) -> Row:
    """A contender's row before its measurement."""
    return new_row(
        suite=suite,
        op=setting.operation.name,
        direction=setting.direction,
        shape=setting.shape.sizes(),
        dtype=dtype_name(setting.dtype),
        impl=entry.name,
        comparable=entry.comparable,
        precision=entry.precision,
        peer_version=entry.version(),
        **values,
    )


def step_of(contender: Contender, inputs: Inputs, setting: Setting) -> Callable[[], object]:
    """One call in the setting's direction. For `bwd` the forward has already run, and its graph is kept."""
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
    probe: RooflineProbe,
    plan: Plan,
    write: Callable[[Row], None],
    progress: Callable[[Peer | None], None] = lambda peer: None,
) -> None:
    """Writes a row per contender: failures at once, times when all contenders have been timed.

    The first timed contender is timed twice; its second row, with "#2" after the name, gives the noise.
    progress: called with each peer before it is prepared, and with None when the timing begins.
    """
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()  # so that collecting after every contender does not scan all of PyTorch
    try:
        _measure(suite, setting, list(entries), probe, plan, write, progress)
    finally:
        gc.unfreeze()


def _measure(
    suite: str,
    setting: Setting,
    entries: Sequence[Peer],
    probe: RooflineProbe,
    plan: Plan,
    write: Callable[[Row], None],
    progress: Callable[[Peer | None], None],
) -> None:
    try:
        group = _Group(suite, setting, plan, probe)
    except Exception as error:  # inputs that do not fit fail every contender
        status, reason = explain(error)
        for entry in entries:
            write(blank_row(suite, setting, entry, status=status, reason=f"inputs: {reason}"))
        return
    for entry in entries:
        progress(entry)
        row = group.prepare(entry)
        if row is not None and device_is_dead():
            write(replace(row, crashed=True, reason=f"crashed: {row.reason}"))
            raise DeadDevice(f"{entry.name} broke the CUDA context (see its row); run again to resume without it")
        if row is not None:
            write(row)
    progress(None)
    for row in group.time():
        write(row)
    group.close()


class _Group:
    """Contenders of one setting that are ready to be timed, and the inputs that they share."""

    def __init__(self, suite: str, setting: Setting, plan: Plan, probe: RooflineProbe):
        self.suite, self.setting, self.plan, self.probe = suite, setting, plan, probe
        first = setting.inputs(0)
        self.inputs = [first, *(setting.inputs(seed) for seed in range(1, copies(first.bytes(), setting.device)))]
        self.judge = Judge(setting, first)
        self.ready: dict[str, tuple[Row, Steps]] = {}

    def prepare(self, entry: Peer) -> Row | None:
        """None if the contender is ready, else its row with the reason."""
        row = blank_row(self.suite, self.setting, entry)
        try:
            failed = self.plan.failed.get((self.setting.operation.name, entry.kernels)) if entry.uses_kernels else None
            if failed is not None:
                return replace(row, status="error", reason=f"not timed: {failed}")
            self._require_memory(entry)
            contender = entry.prepare(self.setting)
            doubt = ""
            try:
                verdict = self.judge.judge(entry, contender)
                row.error_vs_fp64 = verdict.error if math.isfinite(verdict.error) else None
                row.least_cosine = verdict.cosine
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
        except Exception as error:  # any error of a peer is its result
            status, reason = explain(error)
            return replace(row, status=status, reason=reason)
        finally:
            free()

    def _require_memory(self, entry: Peer) -> None:
        """Raises OutOfMemoryError on a CPU, where the system overcommits memory and kills the process later."""
        shape = self.setting.shape
        if self.setting.device == "cpu" and entry.quadratic and isinstance(shape, LossShape):
            needed, there = 4 * entry.quadratic * shape.pairs * shape.texts, _available_memory()
            if needed > 0.8 * there:
                raise torch.OutOfMemoryError(
                    f"not tried: about {needed / 1e9:.0f} GB, and {there / 1e9:.0f} GB are free"
                )

    def time(self) -> list[Row]:
        """Times all contenders that are ready; one row each."""
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
                raise error  # no row is complete without the roofline
            status, reason = explain(error)
            row = replace(self.ready[name.removesuffix(AGAIN)][0], impl=name)
            rows.append(replace(row, status=status, reason=f"while it was timed: {reason}"))
            free()

        plan = self.plan
        times = interleaved(contenders, self._clock(), plan.seconds, plan.least_rounds, watch.look, failed)
        roofline = self.probe.roofline(times)
        for name in (name for name in timed if name in times):
            row, disturbance = self.ready[name.removesuffix(AGAIN)][0], watch.note()
            note = "; ".join(part for part in (row.reason, disturbance) if part)
            row = replace(row, impl=name, reason=note, disturbed=bool(disturbance))
            rows.append(with_times(row, self.setting, times[name], roofline))
        return rows

    def _clock(self) -> Clock:
        return clock(self.setting.device, SUITES[self.suite].hide_launches)

    def close(self) -> None:
        self.ready.clear()
        self.inputs.clear()
        free()


def with_times(row: Row, setting: Setting, timing: Timing, roofline: Roofline) -> Row:
    """The row with its times, rates and share of the roofline."""
    element, seconds = setting.dtype.itemsize, timing.median / 1e3
    least = roofline.milliseconds(setting.shape, setting.direction, element)
    return replace(
        row,
        ms_median=timing.median,
        ms_p20=timing.p20,
        ms_p80=timing.p80,
        tflops=setting.shape.flops(setting.direction) / seconds / 1e12,
        gbps=setting.shape.bytes(setting.direction, element) / seconds / 1e9,
        roofline_ms=least,
        roofline_share=least / timing.median,
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
    """Frees the memory of the last contender."""
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # of a dead device
            torch.cuda.empty_cache()


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**40


def peaks_in_a_process(setting: Setting, names: Sequence[str]) -> dict[str, int | None]:
    """Rise of another process's resident memory during one call of each contender, in bytes (Linux; None elsewhere).

    The process's allocator returns freed memory to the system at once, so that reuse does not hide an allocation.
    None also for a contender with which the process ended; the next are measured in another one.
    """
    if sys.platform != "linux":
        return dict.fromkeys(names)
    task = {
        "operation": setting.operation.name,
        "shape": setting.shape.sizes(),
        "dtype": dtype_name(setting.dtype),
        "direction": setting.direction,
    }
    allocator = process_environment(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")
    found: dict[str, int | None] = {}
    while left := [name for name in names if name not in found]:
        command = [sys.executable, "-m", "bench.measure.peak_memory", json.dumps({**task, "peers": left})]
        done = subprocess.run(command, capture_output=True, text=True, env=allocator)
        found |= dict(json.loads(line) for line in done.stdout.splitlines())
        if done.returncode != 0:
            found |= {next(name for name in left if name not in found): None}
    return found
