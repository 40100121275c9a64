"""Makes torchvision importable with a build of torch that its wheel was not built for, such as a CPU build.

There its operators do not load, so that importing it fails, and with it timm, open_clip and transformers' image
processors, although no test calls such an operator. This module declares the missing operators' names.
"""

import importlib.util
from pathlib import Path

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


def _real_ones_load() -> bool:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return True  # nothing will ask for them
    try:
        torch.ops.load_library(Path(found.origin).parent / "_C.so")
    except OSError:
        return False
    return True


library = torch.library.Library("torchvision", "FRAGMENT")  # kept: its operators go with it

if not _real_ones_load():
    for name in OPERATORS:
        library.define(f"{name}() -> ()")
