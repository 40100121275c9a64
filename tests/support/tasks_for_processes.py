"""A task for the processes of `bench.compiled.processes`, which import it by name."""

import os
import signal
import time


def work(task: str) -> str:
    if task == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise ValueError("no such launch")
    if task == "slow":
        time.sleep(0.5)
    return task.upper()
