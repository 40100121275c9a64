"""One running thread block: its scheduler, its agents and what they know of each other.

Agents are partitions, barriers and, on Blackwell, each partition's queue of products. Each has a clock, and each
partition has a vector clock of all agents, as in race detectors (Flanagan & Freund, "FastTrack", PLDI 2009). Knowledge
passes through barriers only: an arrival adds the partition's knowledge to the barrier's, a wait takes the barrier's. An
access of one agent is ordered before another's exactly if the other knows of it, independent of the interleaving that
happened to run.
"""

import random
from typing import Any, NoReturn

from hopper_emulator.faults import Fault
from hopper_emulator.scheduler import Partition, Scheduler

Clock = dict[int, int]


def learn(clock: Clock, other: Clock) -> None:
    """clock becomes the elementwise maximum of both."""
    for agent, time in other.items():
        if clock.get(agent, 0) < time:
            clock[agent] = time


class Block:
    def __init__(
        self, program: tuple[int, int, int], grid: tuple[int, int, int], seed: object, warps: int, global_writes: Any
    ):
        self.program, self.grid, self.global_writes = program, grid, global_writes
        self.agents: list[Any] = []  # by number
        self.allocations: list[Any] = []
        self.barriers: list[Any] = []
        self.loads: list[Any] = []  # TMA loads that no partition has waited for
        self.tensor_cores: dict[int, Any] = {}  # by the number of the partition that starts products
        self.tensor_columns = 0  # allocated in tensor memory
        self.scheduler = Scheduler(random.Random(repr((seed, program))), self, warps)
        self.enroll(self.scheduler.main)

    def enroll(self, agent: Any) -> int:
        """Gives an agent its number."""
        agent.number = len(self.agents)
        self.agents.append(agent)
        if isinstance(agent, Partition):
            agent.clock[agent.number] = 1
        return agent.number

    @property
    def partition(self) -> Partition:
        """The partition whose turn it is."""
        return self.scheduler.current

    def pause(self) -> None:
        self.scheduler.pause()

    def fault(self, kind: str, message: str, barrier: str = "", partition: str | None = None) -> NoReturn:
        raise Fault(kind, message, partition or self.partition.name, self.scheduler.step, barrier, self.program)


_running: list[Block] = []


def current() -> Block:
    """The running block."""
    if not _running:
        raise RuntimeError("a Gluon function was called outside of emulate()")
    return _running[-1]


class running:
    """A context in which `current()` is the block."""

    def __init__(self, block: Block):
        self.block = block

    def __enter__(self) -> Block:
        _running.append(self.block)
        return self.block

    def __exit__(self, *exception: object) -> None:
        _running.pop()
