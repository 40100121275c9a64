"""A run that is stopped at any of its steps loses no finished row, and the next run ends as an undisturbed one.

The steps are the calls of the journal to functions that reach the disk: each statement to SQLite, each commit, write,
fsync, rename and unlink. `at_each_step` counts them; the tests stop a run at step 1, 2, 3 ... until one finishes. Steps
within SQLite are reached by a limit on the size of files, which each write meets.
"""

import contextlib
import errno
import io
import os
import posix
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
from pathlib import Path

import pytest
from colour_embedder import WIDTH, embed_colours, save_colours

from siglip_model.embed import EmbeddingFileError, EmbeddingInterrupted, load_embeddings
from siglip_model.embed import file as embed_file
from siglip_model.embed import journal as embed_journal
from siglip_model.embed import npy as embed_npy
from siglip_model.embed import output as embed_output
from siglip_model.embed import run as embed_run

OUT = "out.safetensors"
SOURCES = (embed_journal.__file__, embed_file.__file__, embed_npy.__file__, embed_output.__file__)
DISK_TYPES = (sqlite3.Connection, sqlite3.Cursor, io.IOBase)


@pytest.fixture
def folder(monkeypatch):
    """Two folders of images, of which old/2.png cannot be read, and a folder for the output."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where thousands of fsyncs take no time
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        save_colours(folder / "old", 4)
        save_colours(folder / "new", 3)
        (folder / "old" / "2.png").write_text("no image")
        (folder / "out").mkdir()
        monkeypatch.setattr(embed_run, "COMMIT_SECONDS", -1.0)  # after each batch
        yield folder


def embed(folder, name, **options):
    return embed_colours([folder / name], folder / "out" / OUT, **options)


def interrupt(*_):
    signal.raise_signal(signal.SIGINT)


def prepare_nothing(folder):
    pass


def prepare_file(folder):
    embed(folder, "old")


def prepare_file_and_journal(folder):
    embed(folder, "old")
    with pytest.raises(EmbeddingInterrupted):
        embed(folder, "new", batch_size=1, on_image=interrupt)
    assert (folder / "out" / f"{OUT}.part").exists()


def prepare_file_of_another_model(folder):
    embed(folder, "old", seed=1)


def prepare_damaged_journal(folder):
    embed(folder, "old", seed=1)
    (folder / "out" / f"{OUT}.part").write_text("no journal" * 100)


def prepare_cut_file_and_journal(folder):
    embed(folder, "old", shard_size=2 * WIDTH * 4)
    with pytest.raises(EmbeddingInterrupted):
        embed(folder, "new", batch_size=1, on_image=interrupt)


CASES = {
    "first run": (prepare_nothing, {}),
    "more images": (prepare_file, {}),
    "resumed": (prepare_file_and_journal, {}),
    "overwrite": (prepare_file_of_another_model, {"overwrite": True}),
    "overwrite a damaged journal": (prepare_damaged_journal, {"overwrite": True}),
    "cut": (prepare_file, {"shard_size": 3 * WIDTH * 4}),
    "cut again": (prepare_cut_file_and_journal, {"shard_size": 3 * WIDTH * 4}),
    "joined": (prepare_cut_file_and_journal, {"shard_size": 2**20}),
}
# Formats and forms of FILE that are several files, so that a run may be stopped between them
SEVERAL = (".npy: resumed", ".npy: overwrite", "cut", "cut again", "joined", ".npy: cut again")


class Case:
    """The folder before the run that is disturbed, and the file that an undisturbed run makes of it."""

    def __init__(self, folder, prepare, options, is_several):
        self.folder, self.options, self.is_several = folder, options, is_several
        self.out = folder / "out" / OUT
        prepare(folder)
        shutil.copytree(folder / "out", folder / "before")
        self.rows = self.rows_of_file()
        self.run()
        self.expected = snapshot(self.out.parent)

    def run(self):
        return embed(self.folder, "new", **self.options)

    def clear(self):
        for path in self.out.parent.iterdir():
            path.unlink()

    def reset(self):
        self.clear()
        shutil.copytree(self.folder / "before", self.folder / "out", dirs_exist_ok=True)

    def rows_of_file(self):
        """None where a run was stopped between several files, and has left its journal."""
        output = embed_output.Output(self.out)
        if not output.is_whole():
            return None if self.out.with_name(f"{self.out.name}.part").exists() else {}
        stored = load_embeddings(self.out)
        assert stored.embeddings.isfinite().all()
        return dict(zip(stored.files, stored.embeddings.tolist(), strict=True))

    def check(self):
        """FILE is whole and has lost nothing; the same run again ends as if it had not been disturbed."""
        rows = self.rows_of_file()
        if rows is None:
            assert self.is_several or not self.rows
        elif self.options.get("overwrite"):
            assert rows == self.rows or self.is_expected(snapshot(self.out.parent))
        else:
            assert rows.items() >= self.rows.items()
        self.run()
        assert snapshot(self.out.parent) == self.expected

    def is_expected(self, found):
        return all(found.get(name) == content for name, content in self.expected.items())


EVERY = [*CASES, ".parquet: resumed", ".npy: resumed", ".npy: overwrite", ".npy: cut again"]


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.thorough] if name in SEVERAL and name != ".npy: resumed" else [])
        for name in EVERY
    ]
)
def case(request, folder, monkeypatch):
    suffix, separator, name = request.param.rpartition(": ")
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    if separator:
        monkeypatch.setattr(sys.modules[__name__], "OUT", f"out{suffix}")
    return Case(folder, *CASES[name], request.param in SEVERAL)


def reaches_the_disk(function):
    owner = getattr(function, "__self__", None)
    return owner is posix or function is sqlite3.connect or isinstance(owner, DISK_TYPES)


def at_each_step(act, run, *, event, of=reaches_the_disk, sources=SOURCES):
    """Runs `run` and calls `act(number, function)` before each step ("c_call") or after it ("c_return")."""
    number = 0

    def on_event(frame, what, function):
        nonlocal number
        if what == event and frame.f_code.co_filename in sources and of(function):
            number += 1
            act(number, function)

    sys.setprofile(on_event)
    try:
        run()
    finally:
        sys.setprofile(None)


def stop_at(step, error, run, **options):
    """Runs `run` and raises error(function) at one step. Returns whether the run came that far."""
    reached = []

    def act(number, function):
        if number == step:
            reached.append(number)
            sys.setprofile(None)
            raise error(function)

    with contextlib.suppress(KeyboardInterrupt, EmbeddingFileError, OSError, sqlite3.OperationalError):
        at_each_step(act, run, **options)
    return bool(reached)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", EVERY, indirect=True)
def test_killed_at_any_step(case):
    """What the disk holds at a step is what a kill at this step leaves."""
    case.reset()
    seen = []

    def act(number, function):
        found = snapshot(case.out.parent)
        if found not in seen:
            seen.append(found)

    at_each_step(act, case.run, event="c_return")
    assert len(seen) > 5
    for found in seen:
        case.clear()
        for name, content in found.items():
            (case.out.parent / name).write_bytes(content)
        case.check()


def stop_at_every_step(case, error, **options):
    step = 0
    stopped = True
    while stopped:
        case.reset()
        step += 1
        stopped = stop_at(step, error, case.run, **options)
        case.check()
    assert step > 30


def interrupt_of(function):
    return KeyboardInterrupt()


def failure_of(function):
    """What the function raises when the disk is full."""
    if isinstance(function.__self__, (sqlite3.Connection, sqlite3.Cursor)) or function is sqlite3.connect:
        return sqlite3.OperationalError("database or disk is full")
    return OSError(errno.ENOSPC, "No space left on device")


def test_interrupted_after_any_step(case):
    stop_at_every_step(case, interrupt_of, event="c_return")


def test_failure_of_any_step(case):
    stop_at_every_step(case, failure_of, event="c_call")


def in_child(run):
    """Runs `run` in a child process. Returns its exit code, or minus the number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except EmbeddingFileError:
            os._exit(2)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("is_killed", [False, True])
def test_disk_full_at_any_size(case, is_killed):
    """Files beyond a limit: the write fails, within SQLite's commits too, or the system ends the process at it."""

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if is_killed else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        case.run()

    codes = []
    while 0 not in codes:
        limit = 1024 * len(codes)
        case.reset()
        codes.append(in_child(run))
        case.check()
    assert set(codes) == {-signal.SIGXFSZ if is_killed else 2, 0} and len(codes) > 10


@pytest.mark.thorough
@pytest.mark.parametrize("event", ["c_call", "c_return"])
def test_interrupted_at_any_call(case, event):
    stop_at_every_step(
        case, interrupt_of, event=event, of=lambda function: True, sources=(*SOURCES, embed_run.__file__)
    )
