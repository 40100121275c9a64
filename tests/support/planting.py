"""Plants faults in copies of the sources; the checkout is never edited."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import siglip_kernels


def replace_once(source: str, text: str, replacement: str) -> str:
    """source with the only occurrence of `text` replaced; AssertionError if it does not occur exactly once."""
    assert source.count(text) == 1, f"{text!r} occurs {source.count(text)} times"
    return source.replace(text, replacement)


def with_fault(modules: list[ModuleType], text: str, replacement: str, folder: Path) -> ModuleType:
    """A copy of the last module, written to `folder`, with the only occurrence of `text` in any of them replaced.

    Each module may import from those before it.
    """
    sources = [Path(module.__file__).read_text() for module in modules]
    assert sum(source.count(text) for source in sources) == 1, (
        f"{text!r} occurs {[s.count(text) for s in sources]} times"
    )
    for i, (module, source) in enumerate(zip(modules, sources, strict=True)):
        source = source.replace(text, replacement)
        for before in modules[:i]:
            package, name = before.__name__.rsplit(".", 1)
            source = source.replace(f"from {before.__name__} import", f"from broken_{name} import")
            source = source.replace(f"from {package} import {name}\n", f"import broken_{name} as {name}\n")
        copy = _load(f"broken_{module.__name__.rsplit('.', 1)[1]}", source, folder)
    return copy


def _load(name: str, source: str, folder: Path) -> ModuleType:
    (folder / f"{name}.py").write_text(source)
    specification = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    sys.modules[name] = loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)
    return loaded


def package_with_fault(file: str, text: str, replacement: str, folder: Path) -> None:
    """Copies siglip_kernels to `folder` with the only occurrence of `text` in one of its files replaced."""
    package = folder / "siglip_kernels"
    shutil.copytree(Path(siglip_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = (package / file).read_text()
    (package / file).write_text(replace_once(source, text, replacement))
