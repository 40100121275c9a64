"""The launches of each operation that are compiled ahead of time, one module per operation.

A module has a function `launches()`, which yields `Launch(name, call)`, and PUBLISHED, a regular expression that the
names of a few of them contain: every kernel and epilogue of a published model, once. If the operation has kernels for
Hopper, which run with SIGLIP_KERNELS_HOPPER=1, `hopper_launches()` and HOPPER_PUBLISHED are theirs.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterator

from bench.compiled.launch import Launch

HOPPER = "_hopper"  # suffix of the names of operations with the kernels for Hopper (compute capability 9)


def operation_names() -> list[str]:
    """Every operation, and "<operation>_hopper" for those with kernels for Hopper."""
    names = []
    for found in pkgutil.iter_modules(__path__):
        names.append(found.name)
        if hasattr(importlib.import_module(f"{__name__}.{found.name}"), "hopper_launches"):
            names.append(found.name + HOPPER)
    return sorted(names)


def launches_of(operation: str, only: str = "") -> Iterator[Launch]:
    """The launches of one of `operation_names`; one of several with the same name.

    only: a regular expression that their names contain.
    """
    module = importlib.import_module(f"{__name__}.{operation.removesuffix(HOPPER)}")
    launches = module.hopper_launches() if operation.endswith(HOPPER) else module.launches()
    yield from {launch.name: launch for launch in launches if re.search(only, launch.name)}.values()


def published(operation: str) -> str:
    """The regular expression `only` for the launches of published models."""
    module = importlib.import_module(f"{__name__}.{operation.removesuffix(HOPPER)}")
    pattern: str = module.HOPPER_PUBLISHED if operation.endswith(HOPPER) else module.PUBLISHED
    return pattern
