"""Prints how far this process's memory rises in one call: `bench.measure.peak_in_a_process` starts it."""

import json
import sys
from dataclasses import replace

from bench.measure import step_of
from bench.operations import DTYPES, OPERATIONS, Setting
from bench.peers import peers_of
from bench.timing import forget_peak, peak_resident_bytes


def main() -> None:
    what = json.loads(sys.argv[1])
    operation = OPERATIONS[what["operation"]]
    shape = operation.shape_class(**what["shape"])
    setting = Setting(operation, shape, DTYPES[what["dtype"]], "cpu", what["direction"])
    contender = peers_of(operation.name)[what["peer"]].prepare(setting)
    sample = replace(setting, shape=shape.sample())
    step_of(contender, sample.inputs(seed=1), sample)()  # loads libraries, starts threads
    step = step_of(contender, setting.inputs(), setting)
    forget_peak()
    before = peak_resident_bytes()
    held = step()  # what it returns is part of what it needs
    print(peak_resident_bytes() - before)
    del held


if __name__ == "__main__":
    main()
