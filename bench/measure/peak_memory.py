"""Prints the rise of this process's memory in a call of each contender; `bench.measure.measure` starts it."""

import json
import os
import sys
from dataclasses import replace

from bench.cases.operations import DTYPES, OPERATIONS, Setting
from bench.measure.measure import free, step_of
from bench.measure.timing import forget_peak, peak_resident_bytes
from bench.peers import peers_of


def peak(setting: Setting, name: str) -> int:
    """Peak bytes of a call beyond inputs and weights; its outputs and gradients count."""
    entry = peers_of(setting.operation.name)[name]
    contender = entry.prepare(setting)
    if not entry.keeps_memory:
        first = setting if entry.one_size else replace(setting, shape=setting.shape.sample())
        step_of(contender, first.inputs(seed=1), first)()  # loads libraries, starts threads
    step = step_of(contender, setting.inputs(), setting)
    free()
    forget_peak()
    before = peak_resident_bytes()
    held = step()
    after = peak_resident_bytes()
    del held
    return after - before


def main() -> None:
    task = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # contenders that print do not disturb them
    operation = OPERATIONS[task["operation"]]
    shape = operation.shape_class(**task["shape"])
    setting = Setting(operation, shape, DTYPES[task["dtype"]], "cpu", task["direction"])
    for name in task["peers"]:
        print(json.dumps([name, peak(setting, name)]), file=answers, flush=True)


if __name__ == "__main__":
    main()
