"""The launches of each operation that are compiled ahead of time, one module per operation.

A module has a function `launches()`, which yields `Launch(name, call)`, and PUBLISHED, a regular expression that the
names of a few of them contain: every kernel and epilogue of a published model, once. If the operation has kernels for
one of FAMILIES, which run with SIGLIP_KERNELS_<FAMILY>=1, `<family>_launches()` and <FAMILY>_PUBLISHED are theirs, and
"<operation>_<family>" is the name of an operation of its own. LEAST_CAPABILITY is that of the GPUs that run an
operation, unless it runs on all.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType

from bench.compiled.launch import GPUS, Launch

FAMILIES = {"hopper": 9, "blackwell": 10}  # and the major compute capability that they are written for


def operation_names() -> list[str]:
    """Every operation, and "<operation>_<family>" for those with kernels for one architecture."""
    names = []
    for found in pkgutil.iter_modules(__path__):
        names.append(found.name)
        module = importlib.import_module(f"{__name__}.{found.name}")
        names += [f"{found.name}_{family}" for family in FAMILIES if hasattr(module, f"{family}_launches")]
    return sorted(names)


def family_of(operation: str) -> str:
    """One of FAMILIES, or "" for an operation with the portable kernels."""
    return next((family for family in FAMILIES if operation.endswith(f"_{family}")), "")


def portable(operation: str) -> str:
    """The name of the operation without a family."""
    return operation.removesuffix(f"_{family_of(operation)}")


def has_kernels_for(operation: str, gpu: str) -> bool:
    """Whether the operation has kernels for a GPU of GPUS."""
    family, capability = family_of(operation), GPUS[gpu].capability
    if capability < getattr(_module(operation), "LEAST_CAPABILITY", capability):
        return False
    return not family or capability[0] == FAMILIES[family]


def launches_of(operation: str, only: str = "") -> Iterator[Launch]:
    """The launches of one of `operation_names`; one of several with the same name.

    only: a regular expression that their names contain.
    """
    module, family = _module(operation), family_of(operation)
    launches = getattr(module, f"{family}_launches" if family else "launches")()
    yield from {launch.name: launch for launch in launches if re.search(only, launch.name)}.values()


def published(operation: str) -> str:
    """The regular expression `only` for the launches of published models."""
    family = family_of(operation)
    pattern: str = getattr(_module(operation), f"{family.upper()}_PUBLISHED" if family else "PUBLISHED")
    return pattern


def _module(operation: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{portable(operation)}")
