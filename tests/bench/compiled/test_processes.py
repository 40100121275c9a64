"""Tasks in several processes: results by number, and a crash that costs one task."""

import multiprocessing

from tasks_for_processes import work

from bench.compiled.processes import Crashed, work_on


def test_a_crash_or_an_exception_costs_one_task():
    begun = []
    tasks = ["a", "crash", "raise", "b", "c"]
    found = dict(work_on(work, tasks, 2, lambda done, number: begun.append((done, number))))
    assert [found[n] for n in (0, 3, 4)] == ["A", "B", "C"]
    assert isinstance(found[1], Crashed) and str(found[1]) == "the process was ended by SIGKILL"
    assert isinstance(found[2], RuntimeError) and str(found[2]) == "ValueError: no such launch"
    assert [number for _, number in begun] == list(range(5))
    assert begun[0] == (0, 0) and begun[1][0] == 0 and begun[-1][0] >= 3  # two at once, and what is done is counted
    assert not multiprocessing.active_children()


def test_processes_end_when_nobody_wants_more_results():
    found = work_on(work, ["a", "slow", "slow", "slow"], 2)
    assert next(found) == (0, "A")
    found.close()
    assert not multiprocessing.active_children()
