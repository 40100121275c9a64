"""Host time of a call, measured through the real launches in a process that does not interpret kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


def test_a_row_for_inference_and_for_training():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host_time", "--only", "layer_norm", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent.parent
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["operation"], row["mode"], row["launches"]) for row in rows] == [
        ("layer_norm", "inference", 1),
        ("layer_norm", "training", 1),
    ]
    assert all(row["us"] > 0 for row in rows)


def test_microseconds_are_those_of_the_cpu():
    from bench.host_time import CALLS, microseconds

    calls = []
    busy = torch.randn(200, 200)

    def call():
        calls.append(1)
        return busy @ busy

    assert 1 < microseconds(call) < 1e6
    assert len(calls) % CALLS == 0
