"""Schedules warp-specialised partitions: each is a thread, and one of them runs at a time.

At every synchronising or memory operation a partition pauses. A seeded generator picks the next among those that are
ready, and how many of the copies in flight land. The seed also chooses the style of the run, because different styles
reveal different faults: copies land at once, now and then, or only when no partition can continue without them;
partitions alternate, or one runs as far as it can. The same seed gives the same run.
"""

import random
import threading
from collections.abc import Callable
from typing import Any

from hopper_emulator.faults import DEADLOCK, ERROR, Fault, UnsupportedByEmulator


class Partition:
    """A warp-specialised partition, or the whole block before and after warp_specialize."""

    def __init__(self, name: str, warps: int, clock: dict[int, int] | None = None):
        self.name, self.warps = name, warps
        self.number = -1
        self.clock: dict[int, int] = dict(clock or {})  # what it knows of each agent
        self.matrix_queue: list[Any] = []  # wgmma not yet waited for, oldest first
        self.store_queue: list[Any] = []  # TMA stores, likewise
        self.last_waits: dict[Any, int] = {}  # barrier: the phase that its last wait saw
        self.is_ready: Callable[[], bool] | None = None
        self.waits_for: Callable[[], Fault] | None = None  # makes the fault of a wait that never ends
        self.turn = threading.Semaphore(0)


class _Abandoned(BaseException):
    """Ends the other partitions' threads after a fault."""


class Scheduler:
    def __init__(self, generator: random.Random, block: Any, warps: int):
        self.generator, self.block = generator, block
        self.main = self.current = Partition("main", warps)
        self.alive: list[Partition] = []
        self.in_flight: list[Callable[[], None]] = []  # each lands one copy
        self.step = 0
        self.error: BaseException | None = None
        self.landing = generator.choice((0.0, 0.3, 0.3, 0.9))
        self.staying = generator.choice((0.0, 0.0, 0.5, 0.95))

    def run(self, bodies: list[tuple[Partition, Callable[[], Any]]]) -> list[Any]:
        """Runs partitions to their ends and returns their results."""
        results: list[Any] = [None] * len(bodies)
        self.alive = [partition for partition, _ in bodies]
        self.everyone = list(self.alive)
        threads = [
            threading.Thread(target=self._live, args=(partition, body, results, i), daemon=True)
            for i, (partition, body) in enumerate(bodies)
        ]
        for thread in threads:
            thread.start()
        self._hand_over()
        for thread in threads:
            thread.join()
        self.current = self.main
        if self.error:
            raise self.error
        return results

    def pause(self, until: Callable[[], bool] | None = None, otherwise: Callable[[], Fault] | None = None) -> None:
        """Lets others run until `until()` holds. Raises `otherwise()` if that never happens."""
        me = self.current
        if me is self.main:
            self._advance()
            while until and not until():
                if not self._land_one():
                    raise otherwise() if otherwise else self._deadlock([me])
            return
        me.is_ready, me.waits_for = until, otherwise
        following = self._choose()
        if following is not me:
            following.turn.release()
            me.turn.acquire()
            if self.error:
                raise _Abandoned
        self.current = me
        me.is_ready = me.waits_for = None

    def _live(self, me: Partition, body: Callable[[], Any], results: list[Any], index: int) -> None:
        me.turn.acquire()
        try:
            if self.error:
                return
            self.current = me
            results[index] = body()
            self.alive.remove(me)
            if self.alive:
                self._hand_over()
        except _Abandoned:
            pass
        except (Fault, UnsupportedByEmulator) as error:
            self._abandon(error)
        except Exception as error:
            place = Fault(ERROR, f"{type(error).__name__}: {error}", me.name, self.step, program=self.block.program)
            place.__cause__ = error
            self._abandon(place)

    def _abandon(self, error: BaseException) -> None:
        self.error = self.error or error
        for partition in self.everyone:
            partition.turn.release()

    def _hand_over(self) -> None:
        self._choose().turn.release()

    def _choose(self) -> Partition:
        self._advance()
        ready = self._ready()
        while not ready:
            if not self._land_one():
                raise self._deadlock(self.alive)
            ready = self._ready()
        if self.current in ready and self.generator.random() < self.staying:
            return self.current
        return self.generator.choice(ready)

    def _advance(self) -> None:
        self.step += 1
        while self.in_flight and self.generator.random() < self.landing:
            self._land_one()

    def _land_one(self) -> bool:
        if self.in_flight:
            self.in_flight.pop(self.generator.randrange(len(self.in_flight)))()
            return True
        return False

    def land_all(self) -> None:
        while self._land_one():
            pass

    def _ready(self) -> list[Partition]:
        return [partition for partition in self.alive if not partition.is_ready or partition.is_ready()]

    def _deadlock(self, waiting: list[Partition]) -> Fault:
        """The most specific fault of the waiting partitions, with the messages of the others."""
        faults = [partition.waits_for() for partition in waiting if partition.waits_for]
        first = min(faults, key=lambda fault: fault.kind == DEADLOCK)
        others = "".join(f"; {fault.message}" for fault in faults if fault is not first)
        message = f"no partition can continue: {first.message}{others}"
        return Fault(first.kind, message, first.partition, self.step, first.barrier, self.block.program)
