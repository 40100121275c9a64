"""Makes torchvision importable with a build of torch that its wheel was not built for, such as a CPU build.

There its operators do not load, so that importing it fails, and with it timm, open_clip and transformers' image
processors, although no test calls such an operator. This module declares the missing operators' names.

Whether they are missing is asked once per session, by conftest.py. Processes that the session starts inherit the answer
in an environment variable; those without a conftest.py import this module before torchvision.
"""

import os
import sys

import torch

OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "qroi_align",
    "_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
)
MISSING = "TORCHVISION_OPERATORS_MISSING"
_library = torch.library.Library("torchvision", "FRAGMENT")  # kept: its operators go with it


def _missing() -> bool:
    try:
        import torchvision  # noqa: F401
    except ImportError:  # not installed, or broken in a way that no declaration mends
        return False
    except (RuntimeError, AttributeError):  # "operator torchvision::nms does not exist"
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return True
    return False


def _declare() -> None:
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            _library.define(f"{name}() -> ()")


def declare_if_missing() -> None:
    """Asks by importing torchvision, which imports Triton: call it after TRITON_INTERPRET is set."""
    if MISSING not in os.environ:
        os.environ[MISSING] = str(int(_missing()))
        if os.environ[MISSING] == "1":
            _declare()


if os.environ.get(MISSING) == "1":
    _declare()
