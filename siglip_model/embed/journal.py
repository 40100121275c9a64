"""Embeddings on disk: a journal that survives a kill, and the .safetensors file written from it.

A .safetensors file states its shapes first and cannot grow, so rows are collected in a journal beside it, `FILE.part`:
an SQLite database, whose transactions are atomic, so that a killed run loses at most its last seconds and a second
process is locked out. The finished file is streamed from the journal row by row and moved into place atomically.

The file holds three tensors. `embeddings` (n, width). `files`, bytes: one line of JSON per row, {"file", "stamp"},
where the stamp (size and modification time) shows whether the file has changed. `failed`, bytes: one line of JSON per
image that could not be read, {"file", "error"}. `load_embeddings` reads all three.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from siglip_model.embed.file import PRODUCER, TENSOR_DTYPES, EmbeddingFileError, read_header, read_lines


class EmbeddingJournal:
    """The finished rows. Starts with the rows of `FILE.part`, else with those of FILE; `write` writes FILE.

    settings: everything that must agree between the rows of one file, as text, including `dtype` ("F32", ...) and
    `width`. overwrite: start without earlier rows.
    Raises EmbeddingFileError if earlier rows were made with other settings, if FILE is another kind of file, or if
    another process is writing it.
    """

    def __init__(self, out: str | os.PathLike[str], settings: Mapping[str, str], *, overwrite: bool = False) -> None:
        self.out = Path(out)
        self.part = self.out.with_name(self.out.name + ".part")
        self.settings = dict(settings)
        self.up_to_date = False  # whether FILE is complete and equal to the journal
        continues_file = self.out.exists() and not self.part.exists() and not overwrite
        if continues_file:
            metadata = read_header(self.out).metadata
            self._check_settings(metadata, self.out)
        try:
            self._open()
            if overwrite:
                self._database.execute("DELETE FROM images")
                self._database.execute("DELETE FROM settings")
            earlier = dict(self._database.execute("SELECT name, value FROM settings"))
            if earlier:
                self._check_settings(earlier, self.part)
            else:
                self._database.executemany("INSERT INTO settings VALUES (?, ?)", self.settings.items())
                if continues_file:
                    self._copy_from_file()
                    self.up_to_date = metadata["complete"] == "true"
            self.commit()
        except EmbeddingFileError:
            self.close()
            raise
        except sqlite3.Error as error:
            self.close()
            # The low byte of an extended result code is the primary one.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise EmbeddingFileError(f"{self.out}: another run is writing it ({self.part} is locked)") from error
            raise EmbeddingFileError(
                f"{self.part}: not the journal of an earlier run ({error}); delete it to start over"
            ) from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._database = sqlite3.connect(self.part, timeout=0, isolation_level=None)
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("PRAGMA cache_size = -8000")  # 8 MB, independent of the number of rows
        self._database.execute("BEGIN EXCLUSIVE")
        self._database.execute("CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT)")
        # Paths are bytes, because names need not be valid Unicode. The implicit rowid keeps the order of insertion.
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS images (path BLOB PRIMARY KEY, stamp TEXT, error TEXT, embedding BLOB)"
        )

    def _check_settings(self, earlier: Mapping[str, str], where: Path) -> None:
        changed = [
            f"{name} was {earlier.get(name)} and is now {value}"
            for name, value in self.settings.items()
            if earlier.get(name) != value and not name.endswith("_name")
        ]
        if changed:
            raise EmbeddingFileError(
                f"{where} was made with other settings ({'; '.join(changed)}); it was not changed."
                " Choose another --out, or --overwrite to start over"
            )

    def _copy_from_file(self) -> None:
        spans = read_header(self.out).spans
        row_bytes = self._row_bytes()
        with open(self.out, "rb") as rows, open(self.out, "rb") as names:
            rows.seek(spans["embeddings"][0])
            for line in read_lines(names, spans["files"]):
                self.add(line["file"], line["stamp"], embedding=rows.read(row_bytes))
            for line in read_lines(names, spans["failed"]):
                self.add(line["file"], "", error=line["error"])

    def _row_bytes(self) -> int:
        return int(self.settings["width"]) * TENSOR_DTYPES[self.settings["dtype"]].itemsize

    def has(self, path: str, stamp: str) -> bool:
        """Whether the image is embedded and its file unchanged."""
        query = "SELECT 1 FROM images WHERE path = ? AND stamp = ? AND embedding IS NOT NULL"
        return self._database.execute(query, (os.fsencode(path), stamp)).fetchone() is not None

    def add(self, path: str, stamp: str, *, embedding: bytes | None = None, error: str | None = None) -> None:
        """Records an image's row or its error, replacing any earlier record of the image."""
        self.up_to_date = False
        self._database.execute(
            "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)", (os.fsencode(path), stamp, error, embedding)
        )

    def commit(self) -> None:
        """Makes all records so far durable."""
        self._database.execute("COMMIT")
        self._database.execute("BEGIN EXCLUSIVE")

    def counts(self) -> tuple[int, int]:
        """(images embedded, images failed), including earlier runs."""
        total, embedded = self._database.execute("SELECT COUNT(*), COUNT(embedding) FROM images").fetchone()
        return embedded, total - embedded

    def write(self, *, complete: bool) -> None:
        """Writes FILE atomically from the rows so far, in constant memory."""
        if complete and self.up_to_date:
            return
        rows, _ = self.counts()
        sizes = [
            rows * self._row_bytes(),
            *(sum(map(len, lines)) for lines in (self._file_lines(), self._failed_lines())),
        ]
        ends = [sum(sizes[: index + 1]) for index in range(3)]
        metadata = {**self.settings, "format": "pt", "producer": PRODUCER, "complete": str(complete).lower()}
        header = {
            "__metadata__": metadata,
            "embeddings": {
                "dtype": self.settings["dtype"],
                "shape": [rows, int(self.settings["width"])],
                "data_offsets": [0, ends[0]],
            },
            "files": {"dtype": "U8", "shape": [sizes[1]], "data_offsets": ends[0:2]},
            "failed": {"dtype": "U8", "shape": [sizes[2]], "data_offsets": ends[1:3]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # aligns the rows
        unfinished = self.out.with_name(f".{self.out.name}.{os.getpid()}.unfinished")
        try:
            with open(unfinished, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                query = "SELECT embedding FROM images WHERE embedding IS NOT NULL ORDER BY rowid"
                for (embedding,) in self._database.execute(query):
                    file.write(embedding)
                for line in self._file_lines():
                    file.write(line)
                for line in self._failed_lines():
                    file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.out)
        finally:
            with suppress(FileNotFoundError):
                unfinished.unlink()

    def _file_lines(self) -> Iterator[bytes]:
        query = "SELECT path, stamp FROM images WHERE embedding IS NOT NULL ORDER BY rowid"
        for path, stamp in self._database.execute(query):
            yield json.dumps({"file": os.fsdecode(path), "stamp": stamp}).encode() + b"\n"

    def _failed_lines(self) -> Iterator[bytes]:
        query = "SELECT path, error FROM images WHERE embedding IS NULL ORDER BY rowid"
        for path, error in self._database.execute(query):
            yield json.dumps({"file": os.fsdecode(path), "error": error}).encode() + b"\n"

    def close(self) -> None:
        database = getattr(self, "_database", None)
        if database is not None:
            with suppress(sqlite3.Error):
                database.execute("COMMIT")
            database.close()

    def remove(self) -> None:
        """Closes and deletes the journal."""
        self.close()
        self.part.unlink(missing_ok=True)
