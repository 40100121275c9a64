from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from planting import with_fault


@pytest.fixture
def hopper_selected(monkeypatch):
    """SIGLIP_KERNELS_HOPPER is on, and torch.empty is filled with NaN."""
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "1")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def plant(tmp_path, monkeypatch) -> Callable[..., None]:
    """Plants a fault, a text and its replacement, in one of the modules, each of which may import those before it, and
    makes the launcher launch these kernels of the last of them.
    """

    def planted(fault: tuple[str, str], modules: list[ModuleType], launcher: ModuleType, *kernels: str) -> None:
        broken = with_fault(modules, *fault, tmp_path)
        for kernel in kernels:
            monkeypatch.setattr(launcher, kernel, getattr(broken, kernel))

    return planted
