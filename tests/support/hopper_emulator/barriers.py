"""mbarriers: arrivals, phases and expected bytes, and the knowledge that passes through them.

A phase completes when all arrivals have come and all expected bytes have landed. A wait for a parity passes if the
phase before the current one has that parity; like the hardware, it sees one bit only.
"""

from collections import Counter
from typing import Any

from hopper_emulator.block import Block, current, learn
from hopper_emulator.faults import (
    BYTE_COUNT,
    DEADLOCK,
    ILLEGAL,
    IN_FLIGHT,
    NOT_FENCED,
    OUT_OF_BOUNDS,
    OVER_ARRIVAL,
    UNDER_ARRIVAL,
    WRONG_PHASE,
    Fault,
)
from hopper_emulator.scheduler import Partition


class Barrier:
    def __init__(self, block: Block, name: str):
        self.block, self.name = block, name
        self.initialised = False
        self.fenced_for_copies = False  # the asynchronous proxy sees the initialisation
        self.loads: list[Any] = []  # TMA loads in flight that will count their bytes here
        block.enroll(self)
        block.barriers.append(self)

    def init(self, count: int) -> None:
        if self.initialised:
            self.block.fault(ILLEGAL, "initialised a second time", self.name)
        if not 1 <= count < 2**20:
            self.block.fault(ILLEGAL, f"a count of {count}", self.name)
        self.initialised, self.fenced_for_copies = True, False
        self.count = self.pending = count
        self.phase = 0  # the current one, not complete yet
        self.bytes = 0  # still to come in this phase
        self.observed = -1  # the latest phase whose completion a wait has seen
        self.incoming: dict[int, int] = {}  # the knowledge of the partitions that arrived
        self.released: dict[int, int] = {}  # the knowledge that a wait passes on
        self.arrivals: Counter[str] = Counter()
        self.completed_by: Counter[str] = Counter()

    def invalidate(self) -> None:
        self.require_initialised()
        if self.loads:
            self.block.fault(IN_FLIGHT, "invalidated with copies in flight", self.name)
        self.initialised = False

    def require_initialised(self) -> None:
        if not self.initialised:
            self.block.fault(ILLEGAL, "used before mbarrier.init", self.name)

    def require_fence(self) -> None:
        self.require_initialised()
        if not self.fenced_for_copies:
            message = "a TMA load or a commit uses it with no fence_async_shared() since mbarrier.init"
            self.block.fault(NOT_FENCED, message, self.name)

    def arrive(
        self, count: int, expected_bytes: int = 0, by: str = "", knowledge: dict[int, int] | None = None
    ) -> None:
        """An arrival of the running partition or, with its knowledge, of another agent."""
        self.require_initialised()
        me = self.block.partition
        self.bytes += expected_bytes
        self.arrivals[by or me.name] += count
        if count > self.pending:
            got = f"{self.count - self.pending + count} arrivals in phase {self.phase}, its count is {self.count}"
            self.block.fault(OVER_ARRIVAL, f"{got}; {self._who(self.arrivals)}", self.name)
        self.pending -= count
        learn(self.incoming, me.clock if knowledge is None else knowledge)
        if knowledge is None:
            me.clock[me.number] += 1
        self.settle()

    def settle(self) -> None:
        """Completes the phase if all arrivals and bytes have come."""
        if self.pending:
            return
        if self.bytes < 0:
            message = f"{-self.bytes} bytes more than expected have landed in phase {self.phase}"
            self.block.fault(BYTE_COUNT, message, self.name)
        if self.bytes:
            return
        if self.loads:
            late = sum(load.bytes for load in self.loads)
            message = f"phase {self.phase} completes with {late} bytes still to land: too few were expected"
            self.block.fault(BYTE_COUNT, message, self.name)
        if self.observed < self.phase - 1:
            message = (
                f"phase {self.phase} completes before any wait for phase {self.phase - 1}: an arrival too "
                f"many, or a wait too few; {self._who(self.arrivals)}"
            )
            self.block.fault(OVER_ARRIVAL, message, self.name)
        learn(self.incoming, {self.number: self.phase + 1})
        self.released = dict(self.incoming)
        self.completed_by, self.arrivals = self.arrivals, Counter()
        self.phase, self.pending = self.phase + 1, self.count

    def wait(self, parity: int) -> None:
        self.require_initialised()
        if parity not in (0, 1):
            self.block.fault(ILLEGAL, f"a wait for parity {parity}", self.name)
        me = self.block.partition
        self.block.scheduler.pause(
            lambda: self.initialised and (self.phase - 1) % 2 == parity, lambda: self._stuck(me, parity)
        )
        learn(me.clock, self.released)
        seen = self.phase - 1
        me.last_waits.pop(self, None)
        me.last_waits[self] = seen  # the most recent comes last
        self.observed = max(self.observed, seen)
        self.block.loads = [load for load in self.block.loads if load.barrier is not self or load.phase > seen]

    def _stuck(self, me: Partition, parity: int) -> Fault:
        """The fault of a wait that never ends."""
        state = f"{me.name} waits for parity {parity} of {self.name}, which is in phase {self.phase} with "
        state += f"{self.count - self.pending} of {self.count} arrivals and {self.bytes} bytes to come"
        kind = DEADLOCK
        if self.pending == 0:
            kind, state = BYTE_COUNT, f"{state}, which no copy sends"
        elif self.pending < self.count:
            kind, state = UNDER_ARRIVAL, f"{state}; {self._who(self.arrivals)}"
        elif self.bytes:
            kind = BYTE_COUNT
        elif me.last_waits.get(self, -1) < self.phase - 1:
            kind, state = WRONG_PHASE, f"{state}; it has not yet seen phase {self.phase - 1}, which is complete"
        else:
            state += f"; a wait for parity {1 - parity} would pass"
        return Fault(kind, state, me.name, self.block.scheduler.step, self.name, self.block.program)

    @staticmethod
    def _who(arrivals: Counter[str]) -> str:
        return "arrived: " + (", ".join(f"{name} ×{n}" for name, n in arrivals.items()) or "none")

    def explain(self, phase: int) -> str:
        """For messages: a phase that a wait has seen, and the partitions that had arrived."""
        if phase < 0:
            return f"{self.name} before its first phase"
        return f"{self.name} phase {phase}" + (f" ({self._who(self.completed_by)})" if phase == self.phase - 1 else "")

    def check_end(self) -> None:
        """Faults if the kernel ends in the middle of a phase."""
        if self.initialised and (self.pending != self.count or self.bytes):
            message = f"the kernel ends in phase {self.phase} with {self.count - self.pending} of {self.count} arrivals"
            kind = BYTE_COUNT if self.bytes else UNDER_ARRIVAL
            self.block.fault(kind, f"{message}, {self.bytes} bytes to come; {self._who(self.arrivals)}", self.name)


class Barriers:
    """What allocate_shared_memory gives for an MBarrierLayout: one barrier, or an array of them."""

    def __init__(self, name: str, members: list[Barrier]):
        self.name, self.members = name, members

    def index(self, i: Any) -> "Barriers":
        i = int(i)
        if not 0 <= i < len(self.members):
            current().fault(OUT_OF_BOUNDS, f"index {i} of {len(self.members)} barriers", self.name)
        return Barriers(self.members[i].name, [self.members[i]])

    @property
    def one(self) -> Barrier:
        if len(self.members) != 1:
            current().fault(ILLEGAL, f"an array of {len(self.members)} barriers where one is needed", self.name)
        return self.members[0]


def init(mbarrier: Barriers, count: int) -> None:
    mbarrier.one.init(int(count))


def invalidate(mbarrier: Barriers) -> None:
    mbarrier.one.invalidate()


def wait(mbarrier: Barriers, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if pred:
        mbarrier.one.wait(int(phase))


def arrive(mbarrier: Barriers, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        mbarrier.one.arrive(int(count))
        current().pause()


def expect(mbarrier: Barriers, bytes_per_cta: int, pred: Any = True) -> None:
    if pred:
        mbarrier.one.arrive(1, int(bytes_per_cta))
        current().pause()


def allocate_mbarrier(batch: int | None = None, two_ctas: bool = False) -> Barriers:
    return allocate(current(), batch or 1, "")


def allocate(block: Block, size: int, name: str) -> Barriers:
    name = name or f"barrier {len(block.barriers)}"
    members = [Barrier(block, f"{name}[{i}]" if size > 1 else name) for i in range(size)]
    return Barriers(name, members)
