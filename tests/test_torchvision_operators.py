"""conftest.py asks whether torchvision imports: whichever way it is installed, importing it afterwards works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision_operators

TESTS = Path(__file__).parent
ENVIRONMENT = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", torchvision_operators.MISSING)}

# What an installed torchvision does when it is imported. The first registers operators of its own, whatever its library
# is called; the second is a wheel whose library does not load.
FITS = """
import torch, triton
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor boxes) -> Tensor")
loaded = True
"""
DOES_NOT_FIT = """
import torch
from torchvision.extension import loaded
@torch.library.register_fake("torchvision::nms")
def nms(): ...
"""
BROKEN = "import a_module_that_is_not_there"


def in_new_process(code: str, path: Path, **variables: str) -> subprocess.CompletedProcess:
    folders = os.pathsep.join(map(str, (path, TESTS, TESTS / "support", TESTS.parent)))
    environment = {**ENVIRONMENT, "PYTHONPATH": folders, **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def install(source: str, path: Path) -> None:
    package = path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    (package / "extension.py").write_text("loaded = False\n")


@pytest.mark.parametrize(("source", "loaded"), [(FITS, "True"), (DOES_NOT_FIT, "False")], ids=["fits", "does not fit"])
@pytest.mark.parametrize("inherits", [False, True], ids=["asks", "inherits the answer"])
def test_torchvision_imports_once_conftest_was_imported(source, loaded, inherits, tmp_path):
    install(source, tmp_path)
    code = "import torchvision, torch; print(torchvision.loaded, hasattr(torch.ops.torchvision, 'nms'))"
    if inherits:
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import torchvision_operators; {code}'])"
        code = code.replace("'nms'", '"nms"')
    done = in_new_process(f"import conftest; {code}", tmp_path)
    assert (done.stdout, done.returncode) == (f"{loaded} True\n", 0), done.stderr


def test_a_broken_torchvision_reports_its_own_error(tmp_path):
    install(BROKEN, tmp_path)
    done = in_new_process("import conftest; import torchvision", tmp_path)
    assert "No module named 'a_module_that_is_not_there'" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off on a GPU")
def test_triton_is_imported_with_its_interpreter_on(tmp_path):
    install(FITS, tmp_path)  # it imports Triton, as torchvision does
    done = in_new_process("import conftest, triton; print(triton.knobs.runtime.interpret)", tmp_path)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
