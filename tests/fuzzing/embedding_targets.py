"""A file of embeddings, and the journal of a run that resumes it or replaces it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_targets import WIDTH, build_siglip
from mutations import json_lines, raw, safetensors_file, sqlite_file
from target import Result, Target, run_command

from siglip_model import SiglipModel
from siglip_model.demo import PICTURES
from siglip_model.embed import EmbeddingFileError, EmbeddingInterrupted, embed_images, load_embeddings
from siglip_model.images.tensor import SiglipImageProcessor

IMAGES = sorted(str(path) for path in PICTURES.glob("*.png"))
FINISHED, ADDED = IMAGES[:4], IMAGES[3:]  # ADDED is embedded after the damage; its first row is there already
OUT, PART = "out.safetensors", "out.safetensors.part"
NPY_FILES = {"out.npy": raw, "out.names.jsonl": json_lines, "out.run.jsonl": json_lines}
WITHIN_HEADER = ("offsets", "dtype", "shape", "name", "length", "padding", "more")  # damages that leave the rows alone


def build_output(folder: Path) -> None:
    """A file with rows of FINISHED and a failure, and the checkpoint that made them."""
    folder.mkdir()
    build_siglip(folder / "checkpoint")
    embed(folder, [*FINISHED, "/nonexistent/picture.png"])


def build_npy_output(folder: Path) -> None:
    """As `build_output`, in the three files of numpy's format."""
    folder.mkdir()
    build_siglip(folder / "checkpoint")
    (folder / "out.npy").touch()  # tells `out_of`
    embed(folder, [*FINISHED, "/nonexistent/picture.png"], overwrite=True)


def out_of(folder: Path) -> Path:
    """The output, whichever of its files the damage has left."""
    is_npy = any(os.path.lexists(folder / name) for name in NPY_FILES)
    return folder / ("out.npy" if is_npy else OUT)


def build_journal(folder: Path) -> None:
    """As `build_output`, and the journal of a run that was killed after one more image."""
    build_output(folder)
    _leave_journal(folder, overwrite=False)


def build_overwriting(folder: Path) -> None:
    """As `build_output`, and the journal of a run that was killed while it was replacing the file."""
    build_output(folder)
    _leave_journal(folder, overwrite=True)


def _leave_journal(folder: Path, overwrite: bool) -> None:
    finished = (folder / OUT).read_bytes()

    def interrupt(*_: str) -> None:
        raise KeyboardInterrupt

    try:
        embed(folder, [IMAGES[4]], on_image=interrupt, overwrite=overwrite)
    except EmbeddingInterrupted:
        (folder / OUT).write_bytes(finished)  # which a killed run does not replace
        return
    raise AssertionError("the run was not interrupted")


def embed(folder: Path, images: list[str], **options: Any) -> None:
    model = SiglipModel.from_pretrained(folder / "checkpoint")
    processor = SiglipImageProcessor.from_pretrained(folder / "checkpoint")
    options = {"num_workers": 0, "model_name": "tiny", **options}
    embed_images(model, processor, images, out_of(folder), **options)


def _rows(folder: Path, least: int) -> Result:
    """The content of the file. least: the rows that it has to have."""
    stored = load_embeddings(out_of(folder))
    return {
        "least": least,
        "shape": list(stored.embeddings.shape),
        "finite": bool(stored.embeddings.isfinite().all()),
        "rows": dict(zip(stored.files, stored.embeddings.tolist(), strict=True)),
    }


def _least(folder: Path) -> int:
    """The rows that a file has to have after a run over ADDED: finished ones stay, if there is a file."""
    return len({*ADDED, *(FINISHED if out_of(folder).exists() else [])})


def use_load(folder: Path) -> Result:
    return _rows(folder, len(FINISHED))


def use_embed_images(folder: Path) -> Result:
    least = _least(folder)
    embed(folder, ADDED)
    return _rows(folder, least)


def use_embed_command(folder: Path) -> Result:
    least = _least(folder)
    words = ["--model", str(folder / "checkpoint"), "--device", "cpu", "--json", "--out", str(out_of(folder))]
    run_command(["embed", *ADDED, *words])
    return _rows(folder, least)


def use_overwrite(folder: Path) -> Result:
    """Starts again, whatever the files hold; only what is no regular file may be refused."""
    files = [folder / name for name in (OUT, PART, *NPY_FILES)]
    regular = all(path.is_file() or not os.path.lexists(path) for path in files)
    try:
        embed(folder, ADDED, overwrite=True)
    except EmbeddingFileError as error:
        if regular:
            raise AssertionError("overwrite does not start again") from error
        raise
    return _rows(folder, len(ADDED))


def _without_earlier_rows(use: Callable[[Path], Result]) -> Callable[[Path], Result]:
    """A run that continues one with overwrite may end with the new rows alone."""

    def without(folder: Path) -> Result:
        return {**use(folder), "least": len(ADDED)}

    return without


def rows_problem(result: Result, whole: Result, done: str) -> str:
    """No row is lost; those of this run are right, the others also unless their bytes were damaged; all are finite."""
    rows = result["rows"]
    if result["shape"] != [len(rows), WIDTH] or not result["finite"]:
        return f"shape {result['shape']}, finite: {result['finite']}"
    if len(rows) < result["least"]:
        return f"rows were lost: {len(rows)} of {result['least']}"
    certain = set(whole["rows"]) - (set() if done.startswith(WITHIN_HEADER) else set(FINISHED))
    wrong = sorted(
        path for path in certain if path not in rows or not np.allclose(rows[path], whole["rows"][path], atol=1e-5)
    )
    return f"no row or another for {wrong}" if wrong else ""


EMBED_WAYS = {
    "embed_images": use_embed_images,
    "siglip embed": use_embed_command,
    "embed_images, overwrite": use_overwrite,
}
OVERWRITING_WAYS = {way: _without_earlier_rows(use) for way, use in EMBED_WAYS.items()}
EMBED_ERRORS = ("EmbeddingFileError", "FileNotFoundError")
OUTPUT = Target(
    "output",
    build_output,
    {OUT: safetensors_file},
    {"load_embeddings": use_load, **EMBED_WAYS},
    EMBED_ERRORS,
    rows_problem,
)
NPY_OUTPUT = Target(
    "npy output",
    build_npy_output,
    NPY_FILES,
    {"load_embeddings": use_load, **EMBED_WAYS},
    EMBED_ERRORS,
    rows_problem,
)
JOURNAL_FILES = {PART: sqlite_file, OUT: safetensors_file}
JOURNAL = Target("journal", build_journal, JOURNAL_FILES, EMBED_WAYS, EMBED_ERRORS, rows_problem)
OVERWRITING = Target("overwriting", build_overwriting, JOURNAL_FILES, OVERWRITING_WAYS, EMBED_ERRORS, rows_problem)
