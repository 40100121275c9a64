"""Runs pytest again and again, each time in a fork of a process that has imported what takes long, but nothing of this
project, which each run may take from another folder.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SLOW = ("hypothesis", "numpy", "pytest", "torch._dynamo", "triton.experimental.gluon")


class PytestForks:
    """Runs pytest in `folder`; a context manager."""

    def __init__(self, folder: Path):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "PytestForks":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, arguments: Sequence[str], output: Path) -> int:
        """pytest's exit status. What it prints is written to the file `output`."""
        print(json.dumps([*arguments]), output, file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())


def _serve() -> None:
    for name in SLOW:
        __import__(name)
    import pytest
    from hypothesis import Phase, settings

    # A failure is enough: to look for a simpler one takes minutes.
    settings.register_profile("without shrinking", phases=(Phase.explicit, Phase.generate))
    settings.load_profile("without shrinking")
    for line in sys.stdin:
        arguments, end = json.JSONDecoder().raw_decode(line)
        child = os.fork()
        if child == 0:
            file = os.open(line[end:].strip(), os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            status = pytest.main(arguments)
            sys.stdout.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
