"""Runs transformers' own SigLIP tests against this project, with only the import changed, beside transformers' result.

    TRANSFORMERS_SOURCE=~/transformers python tests/support/transformers_suite.py [--list] [pytest arguments]
    TRANSFORMERS_SOURCE=~/transformers python tests/support/transformers_suite.py -n 2 -k "modeling and not export"

TRANSFORMERS_SOURCE: a checkout of transformers at the installed version, of which this needs the folders `tests` and
`utils`. Its test suite needs the packages parameterized, requests and httpx. The tests are copied to a temporary
folder, where every name that a SigLIP test file imports from transformers and that `siglip_model` has is imported from
there instead. With HF_HUB_OFFLINE=1 they find a tokenizer with the vocabulary of transformers' fixtures in place of the
Hub's. Prints the counts of both runs and the tests that pass with transformers and not here; --list adds the tests that
fail with transformers. KEEP_OUTPUT=FOLDER keeps what pytest wrote.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import torchvision_operators
import transformers

ROOT = Path(__file__).parents[2]
FOLDER = Path("tests/models/siglip")
LINKED = ("fixtures",)
CHECKPOINT = "google/siglip-base-patch16-224"  # whose tokenizer the tests load; a folder of this name wins over the Hub


def copy_tests(source: Path, destination: Path) -> None:
    """Copy the tests without those of other models; files that they only read are linked."""

    def others(folder: str, names: list[str]) -> set[str]:
        models = Path(folder).name == "models"
        return {name for name in names if name in LINKED or (models and name not in ("__init__.py", FOLDER.name))}

    shutil.copytree(source / "tests", destination / "tests", ignore=others)
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copyfile(source / name, destination / name)
    for name in ("utils", *(f"tests/{linked}" for linked in LINKED)):
        (destination / name).symlink_to(source.resolve() / name)
    (destination / "src").mkdir()
    (destination / "src/transformers").symlink_to(Path(transformers.__file__).parent)  # whose version is tested


def save_tokenizer(source: Path, destination: Path) -> None:
    """A tokenizer where tests that run in `destination` look for the Hub's."""
    vocabulary = source / "tests/fixtures/test_sentencepiece.model"
    transformers.SiglipTokenizer(str(vocabulary)).save_pretrained(destination / CHECKPOINT)


def with_import_changed(code: str, names: set[str]) -> str:
    """The code, with these of the names that it imports from transformers imported from siglip_model."""

    class Change(ast.NodeTransformer):
        def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.stmt]:
            if node.level or (node.module or "").partition(".")[0] != "transformers":
                return [node]
            here = [alias for alias in node.names if alias.name in names]
            there = [alias for alias in node.names if alias.name not in names]
            imports = [(node.module, there), ("siglip_model", here)]
            return [ast.ImportFrom(module, aliases, 0) for module, aliases in imports if aliases]

    return ast.unparse(ast.fix_missing_locations(Change().visit(ast.parse(code))))


def outcomes(root: Path, arguments: list[str]) -> dict[str, str]:
    """passed, failed or skipped, by test."""
    report = root / "report.xml"
    paths = [str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    plugins = ("-p", "torchvision_operators", "-p", "no:cacheprovider")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *plugins,
        f"--junitxml={report}",
        "--tb=short",
        "--continue-on-collection-errors",
    ]
    done = subprocess.run(
        [*command, str(FOLDER), *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    if not report.exists():
        raise SystemExit(done.stdout + done.stderr)
    (root / "output.txt").write_text(done.stdout + done.stderr)
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        for child in case:
            if child.get("message") == "collection failure":  # a missing package would hide all tests of a file
                raise SystemExit(f"{case.get('name')} was not collected: {child.text}")
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = kind
    return found


def main(arguments: list[str]) -> int:
    import siglip_model

    torchvision_operators.declare_if_missing()
    source = Path(os.environ["TRANSFORMERS_SOURCE"]).expanduser()
    listed = "--list" in arguments
    arguments = [argument for argument in arguments if argument != "--list"]
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("transformers", "siglip_model"):
            root = Path(folder) / name
            copy_tests(source, root)
            if os.environ.get("HF_HUB_OFFLINE") == "1":
                save_tokenizer(source, root)
            if name == "siglip_model":
                for path in (root / FOLDER).glob("test_*.py"):
                    path.write_text(with_import_changed(path.read_text(), set(siglip_model.__all__)))
            results[name] = outcomes(root, arguments)
            counts = Counter(results[name].values())
            print(f"{name}: {len(results[name])} tests, {dict(counts)}", flush=True)
            if keep := os.environ.get("KEEP_OUTPUT"):
                shutil.copyfile(root / "output.txt", Path(keep) / f"{name}.txt")
    theirs, ours = results["transformers"], results["siglip_model"]
    lost = sorted(test for test, result in theirs.items() if result == "passed" and ours.get(test) != "passed")
    print(f"{len(lost)} tests pass with transformers and not here:")
    for test in lost:
        print(f"  {ours.get(test, 'missing'):8} {test}")
    if listed:
        for test in sorted(test for test, result in theirs.items() if result == "failed"):
            print(f"  fails with transformers, {ours.get(test, 'missing')} here: {test}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
