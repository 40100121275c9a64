"""How kernels are tested.

Without a GPU the whole test process runs Triton's interpreter, on CPU tensors: `tests/conftest.py` sets
TRITON_INTERPRET=1 before anything imports Triton, whichever tests are collected and in whatever order. With a GPU the
same tests run the compiled kernels on it. What needs a process of the other kind starts one:

- `bench.compiled.ahead_of_time.rows_in_a_subprocess(module, *gpus)`: compilation for GPUs that are not there;
- the fixture `run_python(code, **environment)`: anything else, such as an import with Triton blocked.

The fixture `device` says where the tensors of a kernel's test live; `poisoned_empty` fills fresh memory with NaN.
Every test draws from the same seed, so that it passes always or never; TEST_SEED=7 pytest tests/kernels tries another.
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
    """Where a kernel's test puts its tensors: the GPU where there is one, else the CPU, with Triton's interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    from siglip_kernels.device import interpreting

    assert interpreting(), "Triton was imported before tests/conftest.py could turn its interpreter on"
    return "cpu"


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fresh memory is full of NaN (PyTorch's own means), so that an element which no kernel writes is seen."""
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


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a fresh Python without the interpreter, or with the variables given."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env={**inherited, **environment}, cwd=ROOT)

    return run
