"""Checkpoints of a run, written by torch.distributed.checkpoint while training continues.

A checkpoint is a folder step-N. Its `.metadata` is written last, by a rename: a folder without it is what an
interrupted run left, and is removed.
"""

from __future__ import annotations

import concurrent.futures
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from siglip_model.checkpoints.atomic import atomic_write
from siglip_model.training.processes import Processes

CHECKPOINTS, FACTS, METADATA = "checkpoints", "run.json", ".metadata"


class TrainingState:
    """The tensors of a run: weights, moments, averages."""

    def __init__(self, module: nn.Module, optimizers: list[Optimizer], average: AveragedModel | None) -> None:
        self.module, self.optimizers, self.average = module, optimizers, average

    def tensors(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.module, self.optimizers)
        state = {"weights": weights, "moments": moments}
        if self.average is not None:
            averages, _ = get_state_dict(self.average.module, [])
            state |= {"averages": averages, "averaged": self.average.n_averaged}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.module, self.optimizers, model_state_dict=state["weights"], optim_state_dict=state["moments"]
        )
        if self.average is not None:
            set_state_dict(self.average.module, [], model_state_dict=state["averages"], optim_state_dict={})
            self.average.n_averaged.copy_(state["averaged"])


class Checkpoints:
    """The checkpoints in a folder, which all ranks share; the newest `keep` stay."""

    def __init__(self, folder: Path, processes: Processes, keep: int) -> None:
        self.folder, self.processes, self.keep = folder, processes, keep
        self.running: concurrent.futures.Future[Any] | None = None

    def resume(self, state: TrainingState, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Restores the newest complete checkpoint and returns its facts; None if there is none.

        Raises ValueError if it belongs to another run.
        """
        found = None
        if self.processes.rank == 0:
            for path in self._incomplete():
                shutil.rmtree(path)
            found = max(self._complete(), default=None)
        found = self.processes.gather(found)[0]
        if found is None:
            return None
        with _named(f"{found} cannot be read; remove it to resume from the one before it"):
            facts = json.loads((found / FACTS).read_text())
            dcp.FileSystemReader(found).read_metadata()  # where `load` would print the traceback of its failure
        check_identity(found, facts["identity"], identity)
        tensors = state.tensors()
        with _named(f"{found} cannot be read; remove it to resume from the one before it"):
            dcp.load(tensors, checkpoint_id=found, **self._group(self.processes.control))
        state.restore(tensors)
        return facts

    def save(self, step: int, state: TrainingState, facts: dict[str, Any]) -> None:
        """Starts writing a checkpoint, after the one before is complete. facts: JSON, from rank 0."""
        self.wait()
        path = self.folder / f"step-{step:08}"
        if self.processes.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            atomic_write(path / FACTS, json.dumps({"step": step, **facts}).encode())
        writer = dcp.FileSystemWriter(path, sync_files=True)
        self.running = dcp.async_save(  # type: ignore[assignment]
            state.tensors(), storage_writer=writer, **self._group(self.processes.background)
        )

    def wait(self) -> None:
        """Returns when the checkpoint is complete and older ones are removed. Raises what stopped its writing."""
        if self.running is None:
            return
        running, self.running = self.running, None
        with _named(f"{self.folder}: the checkpoint cannot be written"):
            running.result()
        if self.processes.rank == 0:
            for path in sorted(self._complete())[: -self.keep]:
                (path / METADATA).unlink(missing_ok=True)  # first: what is removed in part is not complete
                shutil.rmtree(path)

    def close(self) -> None:
        """Returns when nothing is being written, also where training ended by an exception: another run in this process
        would find a checkpoint in the making. Several processes do not wait, of which one may be dead.
        """
        if self.running is not None and self.processes.world == 1:
            concurrent.futures.wait([self.running])

    def _complete(self) -> list[Path]:
        return [path for path in self._folders() if (path / METADATA).exists()]

    def _incomplete(self) -> list[Path]:
        """What `save` and `wait` leave if they are killed; other things may lie beside it."""
        folders = [path for path in self._folders() if not (path / METADATA).exists()]
        return [path for path in folders if (path / FACTS).exists() or not any(path.iterdir())]

    def _folders(self) -> list[Path]:
        return [path for path in self.folder.glob("step-" + "[0-9]" * 8) if path.is_dir()]

    def _group(self, group: dist.ProcessGroup | None) -> dict[str, Any]:
        return {"no_dist": True} if group is None else {"process_group": group}


@contextmanager
def _named(problem: str) -> Iterator[None]:
    """Failures within the block as an OSError. torch.distributed.checkpoint's own are no Exceptions."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        reason = str(cause).partition("\n")[0]
        raise OSError(f"{problem} ({type(cause).__name__}{': ' * bool(reason)}{reason})") from error


def has_checkpoints(directory: Path) -> bool:
    """Whether the folder of a run holds checkpoints."""
    return any((directory / CHECKPOINTS).glob(f"step-*/{METADATA}"))


def check_identity(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError that names what differs between a saved run and the wanted one."""
    differing = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if differing:
        changed = ", ".join(f"{name} was {saved.get(name)}, is {wanted.get(name)}" for name in differing)
        raise ValueError(f"{path} is of another run ({changed}); use another folder or remove it")
