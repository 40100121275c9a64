"""The kernels that launches start, per GPU, without compiling them.

    python tests/support/traced_launches.py

prints {operation: {gpu: {launch: [kernel, ...]}}} as JSON.
"""

import json
from typing import Any

from triton.runtime.jit import JITFunction

from bench.compiled.launch import GPUS
from bench.compiled.launches import has_kernels_for, launches_of, operation_names
from siglip_kernels.device import pretend


def trace() -> dict[str, dict[str, dict[str, list[str]]]]:
    started: list[str] = []

    def note(self: Any, *arguments: Any, **options: Any) -> None:
        started.append(self.fn.__name__)

    JITFunction.run = note
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for operation in operation_names():
        for name, gpu in GPUS.items():
            if not has_kernels_for(operation, name):
                continue
            launches = found.setdefault(operation, {}).setdefault(name, {})
            for launch in launches_of(operation):
                started.clear()
                with pretend(gpu):
                    launch.call()
                launches[launch.name] = sorted(set(started))
    return found


if __name__ == "__main__":
    print(json.dumps(trace()))
