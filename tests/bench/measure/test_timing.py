"""Clocks, rotation, memory and notes of disturbances, with a fake GPU."""

import mmap
import sys
import types

import pytest

from bench import environment
from bench.measure import timing
from bench.measure.timing import CudaClock, Steps, Timing, copies, cpu_clock, interleaved


class FakeGpu:
    """A stream of work with its own clock, in milliseconds; the host queues instantly."""

    def __init__(self, monkeypatch):
        self.now, self.slept, self.log = 0.0, [], []
        fake = types.SimpleNamespace(
            Event=lambda enable_timing: FakeEvent(self),
            synchronize=lambda: self.log.append("synchronize"),
            _sleep=lambda cycles: self.log.append("sleep"),
        )
        monkeypatch.setattr(timing.torch, "cuda", fake)

    def kernel(self, milliseconds):
        def launch():
            self.log.append("kernel")
            self.now += milliseconds

        return launch


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu.log.append("record")
        self.at = self.gpu.now

    def elapsed_time(self, other):
        return other.at - self.at


def test_events_see_the_calls_alone(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    clock, steps = CudaClock(hide_launches=True), Steps([gpu.kernel(2.0)])
    assert clock(steps) == 2.0
    gpu.log.clear()
    assert clock(steps) == 2.0
    calls = gpu.log.count("kernel")
    assert 1 <= calls <= timing.LONGEST_BURST
    assert gpu.log == ["sleep", "record", *["kernel"] * calls, "record", "synchronize"]


def test_latency_is_not_hidden(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    clock, steps = CudaClock(hide_launches=False), Steps([gpu.kernel(1.0)])
    clock(steps)
    assert "sleep" not in gpu.log


def test_each_call_reads_the_next_copy():
    seen = []
    steps = Steps([lambda number=number: seen.append(number) for number in range(3)])
    for _ in range(7):
        steps()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_copies_exceed_the_l2_twice(monkeypatch):
    properties = types.SimpleNamespace(L2_cache_size=50 * 2**20)
    fake = types.SimpleNamespace(get_device_properties=lambda index: properties, current_device=lambda: 0)
    monkeypatch.setattr(timing.torch, "cuda", fake)
    assert copies(2**20, "cuda") * 2**20 >= 2 * properties.L2_cache_size
    assert copies(2**30, "cuda") == 2 and copies(1, "cuda") == timing.MOST_COPIES
    assert copies(1, "cpu") == 2


def test_rounds_take_every_contender_once_in_changing_order():
    order = []
    contenders = {name: Steps([lambda name=name: order.append(name)]) for name in "abcd"}
    rounds = []
    times = interleaved(contenders, cpu_clock, seconds=0.0, least_rounds=6, each_round=lambda: rounds.append(1))
    assert list(times) == list("abcd") and all(one.rounds == 6 for one in times.values()) and len(rounds) == 6
    turns = [order[4 * turn : 4 * turn + 4] for turn in range(7)]  # the first warms up
    assert all(sorted(turn) == list("abcd") for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 2


def test_median_and_fifths():
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(3.0, pytest.approx(1.8), pytest.approx(4.2), 5)
    assert Timing.of([1.0]) == Timing(1.0, 1.0, 1.0, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_call():
    timing.forget_peak()
    before = timing.peak_resident_bytes()
    with mmap.mmap(-1, 50_000_000) as held:  # a tensor may be given memory that this process freed and kept
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert timing.peak_resident_bytes() - before >= 45_000_000


@pytest.mark.parametrize(
    ("active", "processes", "note"),
    [
        (0x0, 1, ""),
        (0x1, 1, ""),  # idle
        (0x4, 1, "throttled: power cap"),
        (0x60, 2, "busy: other processes compute on this GPU; throttled: heat (hardware); throttled: heat (software)"),
    ],
)
def test_a_throttled_or_busy_gpu_is_noted(monkeypatch, active, processes, note):
    library = types.SimpleNamespace(
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: active,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [None] * processes,
    )
    monkeypatch.setattr(environment, "device", lambda: "cuda")
    monkeypatch.setattr(environment, "_nvml", lambda: library)
    monkeypatch.setattr(environment, "_handle", lambda library: None)
    watch = environment.Watch()
    watch.look()
    watch.look()
    assert watch.note() == note


def test_a_busy_cpu_is_noted(monkeypatch):
    monkeypatch.setattr(environment, "device", lambda: "cpu")
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (7.4, 0, 0))
    watch = environment.Watch()
    watch.look()
    assert watch.note() == "busy: load 7 on 2 cores"
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (1.0, 0, 0))
    calm = environment.Watch()
    calm.look()
    assert calm.note() == ""
