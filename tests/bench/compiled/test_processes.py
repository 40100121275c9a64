"""Tasks in several processes: results by number, and a crash that costs one task."""

import multiprocessing
import subprocess
import sys

from tasks_for_processes import work

from bench.compiled.processes import Crashed, work_on
from bench.environment import ROOT


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


_MASKS = """
import signal
from multiprocessing import util
from bench.compiled.processes import _Process
start = util.spawnv_passfds
def spawn(*arguments):
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
    return start(*arguments)
util.spawnv_passfds = spawn
if __name__ == "__main__":
    _Process(str.upper).end()
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_interrupts_wait_until_a_process_ignores_them():
    """Of the first ones, the tracker's and its own: later, the tracker runs."""
    done = subprocess.run([sys.executable, "-c", _MASKS], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["True", "True", "False"], done.stdout + done.stderr
