"""Tests need no GPU: those that do carry the marker `gpu` and are skipped where there is none.

Without a GPU the kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when it is imported, so
it is set here, before any test or package of ours is.
"""

import os
import signal

import pytest
import torch
import torchvision_operators  # noqa: F401  before anything imports torchvision

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# A process started in the background ignores Ctrl-C and hands that on; the tests that press it start from the usual.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
