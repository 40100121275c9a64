"""The environment of a measurement: machine, versions, commit, and whether other work disturbed it."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def version(distribution: str) -> str | None:
    """The installed version; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def process_environment(**variables: str) -> dict[str, str]:
    """This process's environment variables, with which another process can import this code from any directory."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **variables}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def in_repository() -> bool:
    """Whether this code is a checkout of the project rather than a copy."""
    return (ROOT / "pyproject.toml").exists() and _git("rev-parse", "--git-dir") is not None


@functools.cache
def commit() -> tuple[str, bool | None]:
    """The commit of this code, and whether tracked files differ from it (results and the README do not count).

    A digest of the differences follows the commit: 5c8d394+9f86d0. For a copy without its repository the variable
    SIGLIP_BENCH_COMMIT names the commit; if it is not set, a digest of the code stands for it.
    """
    if not in_repository():
        named = os.environ.get("SIGLIP_BENCH_COMMIT")
        return (named, None) if named else (f"code {_digest_of_the_code()}", None)
    sha = _git("rev-parse", "--short", "HEAD") or "unknown"
    changes = _git("diff", "HEAD", "--", ".", ":!bench/results", ":!README.md")
    return (f"{sha}+{hashlib.sha256(changes.encode()).hexdigest()[:6]}", True) if changes else (sha, False)


def _digest_of_the_code() -> str:
    digest = hashlib.sha256()
    for package in ("bench", "siglip_kernels", "siglip_model"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def hardware() -> str:
    """The GPU's name, or the processor as `cpu (name, threads)`."""
    if device() == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        models = (line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("model name"))
        name = next(models, "") or name
    return f"cpu ({name}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)})"


def is_gpu(hardware: str) -> bool:
    """Whether the name of a machine, a row's `gpu`, is that of a GPU."""
    return not hardware.startswith("cpu")


@functools.cache
def environment() -> dict[str, Any]:
    """The fields that every row carries."""
    on_gpu = device() == "cuda"
    sha, dirty = commit()
    return {
        "gpu": hardware(),
        "driver": _driver() if on_gpu else None,
        "cuda": (torch.version.cuda or f"rocm {torch.version.hip}") if on_gpu else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": sha,
        "dirty": dirty,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _driver() -> str | None:
    if _nvml() is not None:
        return str(_nvml().nvmlSystemGetDriverVersion())
    return _nvidia_smi("driver_version")


def _nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "-i", str(_index())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _index() -> str:
    """The current GPU's index among all GPUs, which nvidia-smi counts; CUDA counts the visible ones."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    return visible or str(torch.cuda.current_device())


@functools.cache
def _nvml() -> Any:
    """NVIDIA's management library (pip install nvidia-ml-py); None if it is not usable."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    except Exception:  # not installed, no driver or no permission
        return None


# Reasons for a reduced clock (NVML's nvmlClocksEventReasons); the others mean idle or requested.
_REASONS = {
    0x04: "power cap", 0x08: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake",
}  # fmt: skip


class Watch:
    """Watches for other work and throttling while contenders are timed."""

    def __init__(self) -> None:
        self.reasons: set[str] = set()
        self.load = 0.0

    def look(self) -> None:
        """Samples the machine's state; cheap enough for every round."""
        if device() == "cpu":
            self.load = max(self.load, os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0.0
            return
        library = _nvml()
        if library is None:
            return
        try:
            handle = _handle(library)
            ask = getattr(library, "nvmlDeviceGetCurrentClocksEventReasons", None)
            ask = ask or library.nvmlDeviceGetCurrentClocksThrottleReasons
            active = int(ask(handle))
            others = len(library.nvmlDeviceGetComputeRunningProcesses(handle)) > 1
        except Exception:  # virtual GPUs answer some queries only
            return
        self.reasons.update(f"throttled: {what}" for bit, what in _REASONS.items() if active & bit)
        if others:
            self.reasons.add("busy: other processes compute on this GPU")

    def note(self) -> str:
        """The disturbance, for the rows; empty if there was none, or if the machine cannot report it."""
        cores = os.cpu_count() or 1
        if self.load > 1.2 * cores:
            return f"busy: load {self.load:.0f} on {cores} cores"
        return "; ".join(sorted(self.reasons))


@functools.cache
def _handle(library: Any) -> Any:
    identifier = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return library.nvmlDeviceGetHandleByUUID(f"GPU-{identifier}".encode())
