"""The launches of each operation that are compiled ahead of time, without a GPU.

A module has a function `launches()` that yields `Launch(name, call)` and, where the operation has kernels for Hopper,
`hopper_launches()`: what runs with SIGLIP_KERNELS_HOPPER=1.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.compiled.ahead_of_time import Launch

HOPPER = "_hopper"  # ends the names of operations whose kernels are for compute capability 9 alone


def operation_names() -> list[str]:
    """Every operation, and "<operation>_hopper" for those with kernels for Hopper."""
    names = []
    for found in pkgutil.iter_modules(__path__):
        names.append(found.name)
        if hasattr(importlib.import_module(f"{__name__}.{found.name}"), "hopper_launches"):
            names.append(found.name + HOPPER)
    return sorted(names)


def launches_of(operation: str, only: str = "") -> "Iterator[Launch]":
    """The launches of an operation of `operation_names`. only: those whose name contains this."""
    module = importlib.import_module(f"{__name__}.{operation.removesuffix(HOPPER)}")
    launches = module.hopper_launches() if operation.endswith(HOPPER) else module.launches()
    return (launch for launch in launches if only in launch.name)
