"""What the wheel and the sdist contain, and that the wheel works in a new environment, outside the checkout."""

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DATA = {
    "siglip_kernels/py.typed",
    "siglip_model/py.typed",
    *(
        f"siglip_model/demo/{folder}/{path.name}"
        for folder in ("checkpoint", "pictures")
        for path in (ROOT / "siglip_model/demo" / folder).iterdir()
    ),
}


def build(kind: str, source: Path, target: Path) -> Path:
    """Builds with setuptools as it is installed, without a network; kind is wheel or sdist."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools is {setuptools.__version__}; building needs 77 or later")
    copy = tmp_path_factory.mktemp("checkout") / "checkout"
    unwanted = shutil.ignore_patterns(".git", "*.egg-info", "__pycache__", "build", "dist", ".*_cache", ".venv")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    return build("sdist", copy, copy.parent / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the unpacked sdist, as pip builds it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return build("wheel", sdist.parent / sdist.name.removesuffix(".tar.gz"), sdist.parent)


def modules(*packages: str) -> set[str]:
    """The modules of the checkout's packages, without the recipe of the demo checkpoint."""
    paths = {path.relative_to(ROOT) for package in packages for path in (ROOT / package).rglob("*.py")}
    return {path.as_posix() for path in paths if "recipe" not in path.parts}


def test_the_wheel_holds_the_packages_and_their_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        folder = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert b"siglip = siglip_model.cli.main:main" in archive.read(f"{folder}/entry_points.txt")
    assert names == modules("siglip_kernels", "siglip_model") | DATA
    assert (metadata["Name"], metadata["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert metadata["Requires-Python"] == ">=3.11" and metadata["License-Expression"] == "Apache-2.0"
    pythons = [c.rsplit(" ", 1)[1] for c in metadata.get_all("Classifier") if c.startswith("Programming Language")]
    assert pythons == ["3", "3.11", "3.12", "3.13"]


def test_the_sdist_holds_what_the_wheel_is_built_from_and_no_more(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    names = {name for name in names if ".egg-info/" not in name}
    written = {"PKG-INFO", "setup.cfg"}
    files = {"pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    assert names - written == modules("siglip_kernels", "siglip_model") | DATA | files


@pytest.mark.thorough
def test_the_installed_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In a new environment, which finds the dependencies, and nothing of this project, in the present one."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "new")], check=True)
    scripts = tmp_path / "new" / "bin"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    run(str(scripts / "pip"), "install", "--no-index", "--no-deps", str(wheel))
    folder = run(str(scripts / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(folder) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    code = "import siglip_kernels, siglip_model; print(siglip_kernels.__file__, siglip_model.__file__)"
    assert all(name.startswith(folder) for name in run(str(scripts / "python"), "-c", code).split())
    assert run(str(scripts / "siglip"), "--version") == f"{PROJECT['name']} {PROJECT['version']}"
    found = json.loads(run(str(scripts / "siglip"), "demo", "--json", "--device", "cpu"))
    assert len(found["pictures"]) == found["right"] == 8
