"""Faults planted in kernels: a copy of their module in which one line is another."""

import importlib.util
from pathlib import Path
from types import ModuleType


def with_fault(module: ModuleType, line: str, replacement: str, folder: Path) -> ModuleType:
    """The copy lies in `folder`. The line stands in the module exactly once."""
    source = Path(module.__file__).read_text()
    assert source.count(line) == 1
    copy = folder / "broken_kernels.py"
    copy.write_text(source.replace(line, replacement))
    specification = importlib.util.spec_from_file_location("broken_kernels", copy)
    broken = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(broken)
    return broken
