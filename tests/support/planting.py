"""Plants faults in copies of the sources; the checkout is never edited."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import siglip_kernels


def replace_once(source: str, text: str, replacement: str) -> str:
    """source with the only occurrence of `text` replaced; AssertionError if it does not occur exactly once."""
    assert source.count(text) == 1, f"{text!r} occurs {source.count(text)} times"
    return source.replace(text, replacement)


def with_fault(module: ModuleType, text: str, replacement: str, folder: Path) -> ModuleType:
    """A copy of the module, written to `folder`, with the only occurrence of `text` replaced."""
    copy = folder / "broken_kernels.py"
    copy.write_text(replace_once(Path(module.__file__).read_text(), text, replacement))
    specification = importlib.util.spec_from_file_location("broken_kernels", copy)
    broken = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(broken)
    return broken


def package_with_fault(file: str, text: str, replacement: str, folder: Path) -> None:
    """Copies siglip_kernels to `folder` with the only occurrence of `text` in one of its files replaced."""
    package = folder / "siglip_kernels"
    shutil.copytree(Path(siglip_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = (package / file).read_text()
    (package / file).write_text(replace_once(source, text, replacement))
