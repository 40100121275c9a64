"""Fixtures of the kernel tests.

Without a GPU the test process runs Triton's interpreter on CPU tensors: `tests/conftest.py` sets TRITON_INTERPRET=1
before anything imports Triton. With a GPU the same tests run compiled kernels. A test that needs the other kind of
process starts one:

- `bench.compiled.ahead_of_time.rows_in_a_subprocess(module, *gpus)` compiles for GPUs that are not there;
- the fixture `run_python(code, **environment)` runs anything else, such as an import with Triton blocked.

`device` is where a kernel test puts its tensors; `poisoned_empty` fills uninitialised memory with NaN. Every test draws
from the same seed, so that its result is reproducible; TEST_SEED=7 pytest tests/kernels draws from another.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(int(os.environ.get("TEST_SEED", "0")))


@pytest.fixture(scope="session")
def device() -> str:
    """The device of a kernel test's tensors: the GPU, or without one the CPU, where Triton's interpreter runs."""
    if torch.cuda.is_available():
        return "cuda"
    from siglip_kernels.device import interpreting

    assert interpreting(), "Triton was imported before tests/conftest.py could turn its interpreter on"
    return "cpu"


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fills uninitialised memory with NaN, so that an element that no kernel writes is detected."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", params=["published", pytest.param("every", marks=pytest.mark.thorough)])
def extent(request: pytest.FixtureRequest) -> str:
    """Which launches a module compiles ahead of time: those of one published shape, or every one."""
    return request.param


@pytest.fixture(scope="module")
def gpus(extent: str) -> tuple[str, ...]:
    """The GPUs that a module compiles for. sm_89 gets sm_80's code with less shared memory, so that it is left to
    "every"; sm_86 gets sm_89's, with the same registers and instructions, and is left to `python -m bench compile`.
    """
    return ("a100", "h200", "b200", "rtx5090") + (("rtx4090",) if extent == "every" else ())


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a new Python process without Triton's interpreter; keyword arguments set environment variables."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env={**inherited, **environment}, cwd=ROOT)

    return run
