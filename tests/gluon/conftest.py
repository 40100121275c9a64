import pytest
import torch


@pytest.fixture
def hopper_selected(monkeypatch):
    """SIGLIP_KERNELS_HOPPER is on, and torch.empty is filled with NaN."""
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "1")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
