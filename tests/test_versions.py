"""The sets of versions of .ci/versions: within what pyproject.toml supports, and shown in the tests' README."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "versions"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETS = re.findall(r"^(torch-\S+) (\S+) (.+)$", SCRIPT.read_text(), re.MULTILINE)


def test_every_set_is_supported() -> None:
    required = map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
    specifiers = {requirement.name: requirement.specifier for requirement in required}
    assert len(SETS) >= 3
    for _, python, packages in SETS:
        assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
        versions = dict(package.split("==") for package in packages.split())
        assert versions.keys() >= {"torch", "torchvision", "triton", "transformers"}
        for name, version in versions.items():
            assert specifiers[name].contains(version), (name, version)


def test_the_small_part_exists() -> None:
    paths = re.findall(r"^ +(tests\S*)$", SCRIPT.read_text(), re.MULTILINE)
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readme_shows_every_set() -> None:
    readme = (ROOT / "tests/README.md").read_text()
    for name, python, packages in SETS:
        versions = dict(package.split("==") for package in packages.split())
        shown = [python, *(versions[package] for package in ("torch", "triton", "transformers"))]
        assert f"| `{name}` | {' | '.join(shown)} |" in readme


@pytest.mark.parametrize("arguments", [[], ["torch-2"], ["torch"]])
def test_an_unknown_set_is_refused_by_name(arguments: list[str]) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and f"NAME is '{''.join(arguments)}'; supported:" in done.stderr
    assert all(name in done.stderr for name, _, _ in SETS)
