"""The rows on their way into FILE: a journal that survives a kill, and the replacement of FILE by what it holds.

FILE states its shapes first and cannot grow, so rows are collected in a journal beside it, `FILE.part`,
an SQLite database. Its life has three states, and each step from one to the next is atomic:

1. None: no `FILE.part`, or one without settings. FILE is the base.
2. Started, by one transaction that writes the settings and copies all rows of FILE. From here on the journal holds
   every row of FILE and more; a run that continues it adds those that FILE has gained otherwise. Only `commit` adds
   rows for good, all others are rolled back. SQLite's lock, held until the journal is closed, keeps other runs out.
3. Finished: FILE was replaced (see `output`) by what is complete and on the disk. The journal is then deleted, while it
   is still locked, so that no other run can begin to use it.

A journal that was started with `overwrite` differs in one point: FILE is not copied, and stays as it is until the new
rows are complete.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from siglip_model.embed.file import (
    BEFORE,
    PRODUCER,
    SUFFIXES,
    TEXT_LIMIT,
    Content,
    EmbeddingFileError,
    RowFormat,
    encode_lines,
    open_embedding_file,
    shortened,
)
from siglip_model.embed.output import LACK_BFLOAT16, Output
from siglip_model.embed.shards import Manifest, Shards

# Paths are bytes, because names need not be valid Unicode. The implicit rowid keeps the order of insertion.
SCHEMA = {
    "settings": "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT)",
    "images": "CREATE TABLE images (path BLOB PRIMARY KEY, stamp TEXT, error TEXT, embedding BLOB)",
}
LONGEST_NAME = 255 - len(".part-journal")  # bytes of FILE's name, to which SQLite's file beside the journal adds
FILE_NAME = f"a file name ending in {' or '.join(SUFFIXES)}"
EMBEDDED = "FROM images WHERE embedding IS NOT NULL ORDER BY rowid"
EMBEDDED_BETWEEN = "FROM images WHERE embedding IS NOT NULL AND rowid BETWEEN ? AND ? ORDER BY rowid"
FIRST_ROWID, LAST_ROWID = -(2**63), 2**63 - 1
ROWS_PER_FILE = "rows_per_file"  # among the settings of a journal: where FILE is cut
OVERWRITES = "overwrites"  # among the settings of a journal: FILE is to be replaced, not continued
BUSY_SECONDS = 0.2  # with less, two runs that start at once may each see the other, and both be refused
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
# Failures of the disk or the system, which say nothing against the journal's content.
SYSTEM = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM,
)


class EmbeddingJournal:
    """The finished rows. Holds those of `FILE.part` and those of FILE; `write` writes FILE.

    out: FILE. A symbolic link is followed: its target is written, and the journal is beside the target.
    settings: everything that must agree between the rows of one file, as text, including `dtype` ("F32", ...) and
    `width`. overwrite: start without earlier rows, and replace FILE once the new ones are complete.
    shard_size: bytes of rows above which FILE is cut into numbered files; by default as FILE was before, else never.
    keeps_failures: write FILE also where it has no row, for the names of those that failed.
    The constructor and every method raise EmbeddingFileError: if earlier rows were made with other settings or are
    damaged, if FILE is another kind of file, if another process is writing it, and if the disk is full.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        settings: Mapping[str, str],
        *,
        overwrite: bool = False,
        shard_size: int | None = None,
        keeps_failures: bool = False,
    ) -> None:
        self.out = resolve_out(out)
        self._keeps_failures = keeps_failures
        if self.out.suffix in LACK_BFLOAT16 and settings["dtype"] == "BF16":
            raise EmbeddingFileError(
                f"{out}: {self.out.suffix[1:]} has no bfloat16; supported: float32, float16, or .safetensors"
            )
        self._output = Output(self.out)
        self.part = self.out.with_name(self.out.name + ".part")
        self.settings = dict(settings)
        self.format = RowFormat(self.settings["dtype"], int(self.settings["width"]))
        self._rows_per_file = None if shard_size is None else max(1, shard_size // self.format.row_bytes)
        self.up_to_date = False  # whether FILE is complete and equal to the journal
        self._database: sqlite3.Connection | None = None
        self._streams: list[sqlite3.Cursor] = []
        self._overwrite = overwrite
        self._state = "unread"  # then "new" until its first transaction is committed, then "started"
        try:
            with self._explained_errors():
                if overwrite:
                    self._discard()
                self._lock()
                self._begin()
        except BaseException:
            if self._state == "new":
                self.remove()
            else:
                self.close()
            raise

    def _lock(self) -> None:
        """Opens the journal, creating an empty one if there is none, and keeps other runs out."""
        while True:
            with suppress(FileExistsError):
                os.close(os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            identity = self._identity()
            self._database = sqlite3.connect(self.part, timeout=BUSY_SECONDS)
            try:
                self._execute("PRAGMA locking_mode = EXCLUSIVE")  # holds the lock across transactions
                self._execute("PRAGMA synchronous = EXTRA")
                self._execute("PRAGMA cache_size = -8000")  # 8 MB, independent of the number of rows
                self._execute("BEGIN EXCLUSIVE")
            except sqlite3.DatabaseError:
                if self._identity() == identity:
                    raise
            else:
                if self._identity() == identity:
                    return
            self.close()  # a run that ended meanwhile has deleted the file that was opened

    def _identity(self) -> tuple[int, int] | None:
        """What tells the journal from a later file of the same name; None if there is none."""
        try:
            status = os.lstat(self.part)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise EmbeddingFileError(f"{self.part} is not a regular file, so the journal cannot be kept; move it away")
        return status.st_dev, status.st_ino

    def _discard(self) -> None:
        """Deletes the journal of an earlier run, readable or not, unless another run holds it."""
        identity = self._identity()
        if identity is None:
            return
        try:
            self._lock()
        except sqlite3.DatabaseError as error:
            if self._identity() != identity:  # another run has replaced it just now
                raise self._busy() from error
            if _code(error) in (*BUSY, *SYSTEM):
                raise
            self._remove_unreadable(identity)
        else:
            self.remove()

    def _remove_unreadable(self, identity: tuple[int, int]) -> None:
        """Deletes a journal that SQLite cannot lock, because it cannot read it, unless another run does so."""
        try:
            descriptor = os.open(self.part, os.O_RDONLY)
        except FileNotFoundError as error:
            raise self._busy() from error
        try:
            with suppress(ImportError):  # Windows, where an open file cannot be deleted
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            if not identity == (status.st_dev, status.st_ino) == self._identity():
                raise self._busy()
            self.remove()
        except BlockingIOError as error:
            raise self._busy() from error
        finally:
            os.close(descriptor)

    def _begin(self) -> None:
        """Continues the journal, or starts it, in one transaction."""
        tables = dict(self._execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        if tables and tables != SCHEMA:
            raise self._damaged("it has other tables")
        earlier = dict(self._execute("SELECT name, value FROM settings")) if tables else {}
        if earlier:
            self._overwrites = earlier.get(OVERWRITES) == "true"
            if problem := self._other_settings(earlier):
                raise self._unusable(problem)
            if self._rows_per_file is None:
                self._rows_per_file = self._stored_rows_per_file(earlier.get(ROWS_PER_FILE))
            self._check_records()
        else:
            self._state = "new"
            self._overwrites = self._overwrite and self._output.exists()
            if self._rows_per_file is None:
                self._rows_per_file = self._output.rows_per_file()
            self._output.check_names(self._rows_per_file is not None, self._overwrite)
            for name, statement in SCHEMA.items():
                self._execute(f"DROP TABLE IF EXISTS {name}")
                self._execute(statement)
            for setting in {**self.settings, OVERWRITES: str(self._overwrites).lower()}.items():
                self._execute("INSERT INTO settings VALUES (?, ?)", setting)
        if self._rows_per_file is not None:
            self._execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (ROWS_PER_FILE, str(self._rows_per_file)))
        # Of a FILE that is not whole, because a run was stopped between its files, an earlier journal has all rows
        if not self._overwrites and (self._output.is_whole() if earlier else self._output.exists()):
            self._copy_file()
        self._connection.commit()
        self._state = "started"

    def _stored_rows_per_file(self, stored: str | None) -> int | None:
        if stored is None:
            return None
        if not (stored.isascii() and stored.isdigit() and len(stored) < 19 and int(stored) > 0):
            raise self._damaged(f"its setting {ROWS_PER_FILE} is {stored!r}")
        return int(stored)

    def _other_settings(self, earlier: Mapping[str, str]) -> str | None:
        changed = [
            _change(name, earlier.get(name, BEFORE.get(name)), value)
            for name, value in self.settings.items()
            if earlier.get(name, BEFORE.get(name)) != value and not name.endswith("_name")
        ]
        return f"was made with other settings ({'; '.join(changed)})" if changed else None

    def _check_records(self) -> None:
        """Raises EmbeddingFileError unless every record of an earlier run can become part of FILE."""
        (problem,) = self._execute("PRAGMA integrity_check(1)").fetchone()
        if problem != "ok":
            raise self._damaged(problem)
        wrong = self._execute(
            "SELECT path, length(embedding) FROM images WHERE NOT ("
            " typeof(path) = 'blob' AND typeof(stamp) IN ('text', 'null') AND typeof(error) IN ('text', 'null')"
            " AND CASE typeof(embedding) WHEN 'blob' THEN length(embedding) = ? AND typeof(stamp) = 'text'"
            " ELSE typeof(embedding) = 'null' AND typeof(error) = 'text' END) LIMIT 1",
            (self.format.row_bytes,),
        ).fetchone()
        if wrong is not None:
            path, length = wrong
            raise self._damaged(f"its row of {path!r} has {length} bytes, expected {self.format.row_bytes}")
        for lines in (encode_lines(self._names(), "stamp"), encode_lines(self._failures(), "error")):
            for line in lines:
                if len(line) > TEXT_LIMIT:
                    raise self._damaged(f"one of its records has {len(line):,} bytes, more than {TEXT_LIMIT:,}")
        if wrong := self._execute("SELECT path FROM images WHERE stamp GLOB '*[^ -~]*' LIMIT 1").fetchone():
            raise self._damaged(f"the stamp of {wrong[0]!r} is not one that a run writes")
        records = self._stream("SELECT path, stamp, error, embedding FROM images")
        while chunk := records.fetchmany(self.format.rows_per_chunk):
            rows = {path: row for path, _, _, row in chunk if row is not None}
            for path, is_finite in zip(rows, self.format.finite(b"".join(rows.values())), strict=True):
                if not is_finite:
                    raise self._damaged(f"its row of {os.fsdecode(path)} is not finite")

    def _copy_file(self) -> None:
        """Adds the rows and failures of FILE, except for images that an earlier run recorded in the journal."""
        (last,) = self._execute("SELECT COALESCE(MAX(rowid), 0) FROM images").fetchone()
        try:
            with self._output.open() as file:
                if problem := self._other_settings(file.metadata):
                    raise file.error(problem)
                for name, stamp, row in file.rows():
                    added = self._execute(
                        "INSERT INTO images (path, stamp, embedding) VALUES (?, ?, ?) ON CONFLICT (path) DO UPDATE"
                        " SET stamp = excluded.stamp, embedding = excluded.embedding WHERE images.embedding IS NULL",
                        (os.fsencode(name), stamp, row),
                    )
                    if added.rowcount == 0 and self._execute(
                        "SELECT rowid > ? FROM images WHERE path = ?", (last, os.fsencode(name))
                    ).fetchone() == (1,):
                        raise file.duplicate(name)
                for name, message in file.failures():
                    self._execute(
                        "INSERT INTO images (path, error) VALUES (?, ?) ON CONFLICT (path) DO UPDATE"
                        " SET error = excluded.error WHERE images.rowid > ?",
                        (os.fsencode(name), _storable(message), last),
                    )
                is_cut_alike = self._rows_per_file == self._output.rows_per_file() or (
                    self.out.exists() and file.count <= (self._rows_per_file or file.count)
                )
                self.up_to_date = last == 0 and file.metadata["complete"] == "true" and is_cut_alike
        except EmbeddingFileError as error:
            raise EmbeddingFileError(
                f"{error}; it was not changed. Choose another --out, or --overwrite to replace it"
            ) from error

    def refusal(self, name: str) -> str | None:
        """Why the format of FILE cannot hold a row of this name; None if it can."""
        if self.out.suffix != ".parquet" or all(not "\ud800" <= letter <= "\udfff" for letter in name):
            return None
        return "its name is not valid Unicode, which parquet requires; rename it, or write .safetensors or .npy"

    def has(self, path: str, stamp: str) -> bool:
        """Whether the image is embedded and its file unchanged."""
        query = "SELECT 1 FROM images WHERE path = ? AND stamp = ? AND embedding IS NOT NULL AND error IS NULL"
        with self._explained_errors():
            return self._execute(query, (os.fsencode(path), stamp)).fetchone() is not None

    def add(self, path: str, stamp: str, *, embedding: bytes | None = None, error: str | None = None) -> None:
        """Records an image's row, which replaces an earlier one, or its error, which leaves an earlier row in place."""
        if embedding is not None and len(embedding) != self.format.row_bytes:
            expected = self.format.row_bytes
            raise EmbeddingFileError(f"{self.part}: the row of {path} has {len(embedding)} bytes, expected {expected}")
        with self._explained_errors():
            self.up_to_date = False
            if embedding is not None:
                self._execute(
                    "INSERT OR REPLACE INTO images (path, stamp, embedding) VALUES (?, ?, ?)",
                    (os.fsencode(path), stamp, embedding),
                )
            else:
                self._execute(
                    "INSERT INTO images (path, error) VALUES (?, ?)"
                    " ON CONFLICT (path) DO UPDATE SET error = excluded.error",
                    (os.fsencode(path), _storable(error or "")),
                )

    def commit(self) -> None:
        """Makes all records so far durable."""
        with self._explained_errors():
            self._connection.commit()

    def counts(self) -> tuple[int, int]:
        """(images embedded, images that failed in their last run), including earlier runs."""
        with self._explained_errors():
            embedded, failed = self._execute("SELECT COUNT(embedding), COUNT(error) FROM images").fetchone()
        return embedded, failed

    def write(self, *, complete: bool) -> bool:
        """Replaces FILE by the rows so far, in constant memory, and returns whether FILE holds them.

        FILE stays as it is if there is no row (see `keeps_failures`), and until the rows that overwrite it are
        complete. Otherwise it is never replaced by fewer rows than it has: EmbeddingFileError is raised if it came to
        have more during the run.
        """
        if self.up_to_date:
            return True
        rows, failed = self.counts()
        is_there = self._output.exists()
        is_empty = rows == 0 and not (failed and self._keeps_failures)
        if is_empty or (is_there and self._overwrites and not complete):
            return False
        with self._explained_errors():
            if not self._overwrites and self._output.is_whole():
                self._check_file(rows)
            elif is_there and self._overwrites and not self._overwrite:
                self._check_overwritten(rows)
            try:
                self._output.replace(self._pieces(rows, complete), self._rows_per_file)
            except ValueError as error:  # of what the format cannot hold
                raise EmbeddingFileError(f"{self.out} was not written: {error}; the rows are in {self.part}") from error
        self.up_to_date = complete
        return True

    def _check_file(self, rows: int) -> None:
        try:
            with self._output.open() as file:
                if file.count > rows:
                    raise file.error(f"has {file.count} rows, more than the {rows} of {self.part}")
        except EmbeddingFileError as error:
            raise EmbeddingFileError(
                f"{error}; it was changed during the run, so it was not replaced. The finished rows are in {self.part}"
            ) from error

    def _check_overwritten(self, rows: int) -> None:
        """Raises EmbeddingFileError where a run that was not asked to overwrite would leave FILE with fewer rows."""
        try:
            with self._output.open() as file:
                count = file.count
        except EmbeddingFileError:  # there is nothing to lose in a file that cannot be read
            return
        if count > rows:
            raise EmbeddingFileError(
                f"{self.out} has {count} rows, more than the {rows} of {self.part}, which an interrupted run with"
                f" --overwrite left; it was not changed. Embed the other images of that run, or delete {self.out} to"
                f" replace it, or {self.part} to continue from it"
            )

    def _pieces(self, rows: int, complete: bool) -> list[Content]:
        """The content of FILE, or of each of its numbered files; the last has the failures."""
        starts, most = [FIRST_ROWID], rows if self._rows_per_file is None else self._rows_per_file
        if rows > most:
            rowids = self._stream(f"SELECT rowid {EMBEDDED}")
            starts = [rowid for number, (rowid,) in enumerate(rowids) if number % most == 0]
        metadata = {**self.settings, "format": "pt", "producer": PRODUCER, "complete": str(complete).lower()}
        ends = [*(start - 1 for start in starts[1:]), LAST_ROWID]
        return [
            Content(
                metadata,
                min(most, rows - number * most),
                partial(self._names, start, end),
                partial(self._rows, start, end),
                self._failures if end == LAST_ROWID else lambda: iter(()),
            )
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]

    def _names(self, start: int = FIRST_ROWID, end: int = LAST_ROWID) -> Iterator[tuple[str, str]]:
        for path, stamp in self._stream(f"SELECT path, stamp {EMBEDDED_BETWEEN}", (start, end)):
            yield os.fsdecode(path), stamp

    def _rows(self, start: int, end: int) -> Iterator[bytes]:
        for (row,) in self._stream(f"SELECT embedding {EMBEDDED_BETWEEN}", (start, end)):
            yield row

    def _failures(self) -> Iterator[tuple[str, str]]:
        for path, error in self._stream("SELECT path, error FROM images WHERE error IS NOT NULL ORDER BY rowid"):
            yield os.fsdecode(path), error

    @property
    def is_open(self) -> bool:
        return self._database is not None

    def close(self) -> None:
        """Releases the journal. What was not committed is rolled back."""
        database, self._database = self._database, None
        if database is not None:
            self._end(database)

    def remove(self) -> None:
        """Closes and deletes the journal."""
        database, self._database = self._database, None
        with self._explained_errors():
            try:
                if database is not None and os.name == "nt":  # where an open file cannot be deleted
                    self._end(database)
                for suffix in ("-journal", "-wal", "-shm", ""):  # SQLite's files beside it; it comes last
                    self.part.with_name(self.part.name + suffix).unlink(missing_ok=True)
            finally:
                if database is not None:
                    self._end(database)

    def _end(self, database: sqlite3.Connection) -> None:
        for cursor in self._streams:  # one that an exception's traceback still holds would keep the lock
            cursor.close()
        database.close()

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._database is None:
            raise ValueError(f"{self.part}: the journal is closed")
        return self._database

    def _execute(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)

    def _stream(self, query: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """A query whose rows are read one by one."""
        cursor = self._execute(query, values)
        self._streams.append(cursor)
        return cursor

    @contextmanager
    def _explained_errors(self) -> Iterator[None]:
        """Turns errors of SQLite and of the system into an EmbeddingFileError that says what is left to do."""
        kept = f"{self.out} was not changed"
        if self._state == "started":
            kept = f"the finished rows are kept: {resuming(self._overwrite)}"
        try:
            yield
        except sqlite3.Error as error:
            if _code(error) in BUSY:
                raise self._busy() from error
            if _code(error) in SYSTEM:
                raise EmbeddingFileError(f"{self.part}: {error}; {kept}") from error
            raise self._damaged(str(error)) from error
        except UnicodeDecodeError as error:  # from the text of SQLite's own message
            raise self._damaged(str(error)) from error
        except OSError as error:
            path = error.filename or self.out
            raise EmbeddingFileError(f"{path}: {error.strerror or error}; {kept}") from error

    def _busy(self) -> EmbeddingFileError:
        return EmbeddingFileError(f"{self.out}: another run is writing it ({self.part} is locked)")

    def _damaged(self, problem: str) -> EmbeddingFileError:
        return self._unusable(f"is not the journal of an earlier run, or is damaged ({' '.join(problem.split())})")

    def _unusable(self, problem: str) -> EmbeddingFileError:
        continued = f"delete it to continue from {self.out}, " if self.out.exists() else ""
        return EmbeddingFileError(
            f"{self.part} {shortened(problem)}; it was not changed."
            f" Choose another --out, {continued}or --overwrite to start over"
        )


class ShardedJournal:
    """The journals of a rank's files as one; methods as those of `EmbeddingJournal`."""

    def __init__(self, shards: Shards, settings: Mapping[str, str], *, overwrite: bool = False) -> None:
        self.settings = dict(settings)
        self._shards = shards
        self._journals: dict[int, EmbeddingJournal] = {}
        try:
            for number in shards.mine:
                self._journals[number] = EmbeddingJournal(
                    shards.path(number), settings, overwrite=overwrite, keeps_failures=True
                )
        except BaseException:
            self.close()
            raise

    def _of(self, name: str) -> EmbeddingJournal:
        return self._journals[self._shards.number(name)]

    def refusal(self, name: str) -> str | None:
        return self._of(name).refusal(name)

    def has(self, path: str, stamp: str) -> bool:
        return self._of(path).has(path, stamp)

    def add(self, path: str, stamp: str, *, embedding: bytes | None = None, error: str | None = None) -> None:
        self._of(path).add(path, stamp, embedding=embedding, error=error)

    def commit(self) -> None:
        for journal in self._journals.values():
            journal.commit()

    def counts(self) -> tuple[int, int]:
        counts = [journal.counts() for journal in self._journals.values()]
        return sum(embedded for embedded, _ in counts), sum(failed for _, failed in counts)

    def write(self, *, complete: bool) -> bool:
        """Writes every file that has a row or a failure, and returns whether the files hold all rows."""
        written = [journal.write(complete=complete) or journal.counts()[0] == 0 for journal in self._journals.values()]
        return all(written)

    def remove(self) -> None:
        for journal in self._journals.values():
            journal.remove()

    @property
    def is_open(self) -> bool:
        return any(journal.is_open for journal in self._journals.values())

    def close(self) -> None:
        for journal in self._journals.values():
            journal.close()


def resolve_out(out: str | os.PathLike[str]) -> Path:
    """The file that is written for `out`: its target if it is a symbolic link, else itself.

    Raises EmbeddingFileError if that is not a regular file or cannot be written.
    """
    path = Path(out)
    _check_name(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
        _check_name(path)
        if path.is_symlink():
            raise EmbeddingFileError(f"{out} is a symbolic link to itself; supported: a file name")
        formats = [name.suffix if name.suffix in LACK_BFLOAT16 else ".safetensors" for name in (Path(out), path)]
        if formats[0] != formats[1]:
            raise EmbeddingFileError(f"{out} is a symbolic link to {path}, whose name does not end in {formats[0]}")
    if path.is_dir():
        raise EmbeddingFileError(f"{path} is a folder; supported: {FILE_NAME}")
    if path.exists() and not path.is_file():
        raise EmbeddingFileError(
            f"{path} is not a regular file; supported: a file name ending in {' or '.join(SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise EmbeddingFileError(f"the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise EmbeddingFileError(f"the folder {path.parent} is not writable")
    if path.exists() and not os.access(path, os.W_OK):
        raise EmbeddingFileError(f"{path} is read-only; make it writable, or choose another --out")
    return path


def computed_in(out: str | os.PathLike[str]) -> str | None:
    """The dtype of the model that made the rows of `out`, finished or in a journal.

    None where there are none, and where they cannot be read, which the run will say.
    """
    with suppress(EmbeddingFileError, OSError, sqlite3.Error):
        path = resolve_out(out)
        numbered = Manifest.read(path).paths() if Manifest.path_of(path).exists() else []
        for file in (path, *numbered):
            part = file.with_name(file.name + ".part")
            if part.is_file() and (found := _stored_dtype(part)) is not None:
                return found
            if file.exists():
                with open_embedding_file(file) as opened:
                    return opened.metadata.get("computed_in")
    return None


def _stored_dtype(part: Path) -> str | None:
    """Opened for writing, so that SQLite can roll back what a killed run has left."""
    with closing(sqlite3.connect(f"{part.absolute().as_uri()}?mode=rw", timeout=BUSY_SECONDS, uri=True)) as database:
        row = database.execute("SELECT value FROM settings WHERE name = 'computed_in'").fetchone()
    return None if row is None else row[0]


def _check_name(path: Path) -> None:
    if (length := len(os.fsencode(path.name))) > LONGEST_NAME:
        raise EmbeddingFileError(f"the name of {path} has {length} bytes; supported: at most {LONGEST_NAME}")


def resuming(overwrite: bool) -> str:
    """Advice after a run that was stopped: `overwrite` would start over again."""
    return f"run the same command again {'without --overwrite ' if overwrite else ''}to resume"


def _change(name: str, was: str | None, now: str) -> str:
    """What changed in a setting: of an object in JSON, the items alone that differ."""
    try:
        before, after = json.loads(was or ""), json.loads(now)
    except (ValueError, RecursionError):  # text
        before = after = None
    if isinstance(before, dict) and isinstance(after, dict):
        texts = [{key: json.dumps(value) for key, value in items.items()} for items in (before, after)]
        names = [key for key in sorted({**before, **after}) if texts[0].get(key) != texts[1].get(key)]
        if names:
            was, now = (", ".join(f"{key}={items.get(key, 'not given')}" for key in names) for items in texts)
    return f"{name} was {was} and is now {now}"


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code: the low byte of the extended one. 0 for errors of Python's module itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _storable(message: str) -> str:
    """A message without the surrogates that stand for bytes of file names, which SQLite's text cannot hold."""
    return message.encode("utf-8", "backslashreplace").decode()
