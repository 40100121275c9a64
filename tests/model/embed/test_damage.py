"""Damaged files and journals: one clear error, nothing replaced, and `overwrite` as the way out."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import struct
import tracemalloc

import pytest
import torch
from colour_embedder import WIDTH, embed_colours, save_colours

from siglip_model.embed import EmbeddingFileError, EmbeddingInterrupted, load_embeddings
from siglip_model.embed import file as embed_file
from siglip_model.embed.journal import EmbeddingJournal, resuming

ROW = 4 * WIDTH  # bytes
NAN = struct.pack("<f", float("nan"))


class Parts:
    """An embedding file taken apart, to be damaged and put together again."""

    def __init__(self, content):
        (length,) = struct.unpack("<Q", content[:8])
        self.header = json.loads(content[8 : 8 + length])
        self.data = content[8 + length :]

    def lines(self, tensor):
        start, end = self.header[tensor]["data_offsets"]
        return self.data[start:end].splitlines(keepends=True)

    def replace(self, tensor, content):
        """Another content for a tensor of bytes, with a header that agrees."""
        start, end = self.header[tensor]["data_offsets"]
        self.data = self.data[:start] + content + self.data[end:]
        self.header[tensor]["shape"] = [len(content)]
        shift = len(content) - (end - start)
        for name in ("files", "failed"):
            offsets = self.header[name]["data_offsets"]
            self.header[name]["data_offsets"] = [offset + shift * (offset >= end) for offset in offsets]

    def joined(self):
        text = json.dumps(self.header).encode()
        return struct.pack("<Q", len(text)) + text + self.data


DAMAGES = {}


def damage(problem):
    def register(function):
        DAMAGES[function.__name__] = (function, problem)
        return function

    return register


@damage("was not written by `siglip embed`")
def producer_renamed(parts):
    parts.header["__metadata__"]["Producer"] = parts.header["__metadata__"].pop("producer")


@damage("header `files` is missing")
def tensor_renamed(parts):
    parts.header["Files"] = parts.header.pop("files")


@damage("header `more` is ")
def tensor_added(parts):
    parts.header["more"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


@damage("header `complete` is missing")
def complete_missing(parts):
    del parts.header["__metadata__"]["complete"]


@damage("header `width` is -4")
def width_negative(parts):
    parts.header["__metadata__"]["width"] = "-4"


@damage("header `width` is 999999999")
def width_of_gigabytes(parts):
    parts.header["__metadata__"]["width"] = "999999999"


@damage("header `files` is ")
def header_deeply_nested(parts):
    parts.header["files"] = json.loads("[" * 900 + "]" * 900)


@damage("header `dtype` is F64")
def dtype_unknown(parts):
    parts.header["__metadata__"]["dtype"] = "F64"


@damage("header `model` is 7")
def setting_not_text(parts):
    parts.header["__metadata__"]["model"] = 7


@damage("header `embeddings` is ")
def shape_of_another_width(parts):
    parts.header["embeddings"]["shape"] = [8, WIDTH // 2]


@damage("header `embeddings` is ")
def row_count_of_text(parts):
    parts.header["embeddings"]["shape"] = ["4", WIDTH]


@damage("header `files` is ")
def offsets_moved(parts):
    parts.header["files"]["data_offsets"] = [offset - 1 for offset in parts.header["files"]["data_offsets"]]


@damage("header `embeddings` is ")
def offsets_exchanged(parts):
    parts.header["embeddings"]["data_offsets"].reverse()


@damage("header `embeddings` is ")
def more_rows_than_bytes(parts):
    parts.header["embeddings"]["shape"][0] = 2**62


@damage("it has 3 rows and the names of 2")
def name_missing(parts):
    parts.replace("files", b"".join(parts.lines("files")[:-1]))


@damage("it has 3 rows and the names of more")
def name_added(parts):
    parts.replace("files", b"".join(parts.lines("files")) + b'{"file": "/x.png", "stamp": ""}\n')


@damage("1.png has two rows")
def name_twice(parts):
    one, two, _ = parts.lines("files")
    parts.replace("files", one + two + two)


@damage("line 2 of its tensor `files` cannot be read")
def name_not_utf_8(parts):
    one, two, three = parts.lines("files")
    parts.replace("files", one + two.replace(b"1.png", b"\xff\xfe.png") + three)


@damage("line 2 of its tensor `files` cannot be read")
def name_of_lone_surrogate(parts):
    one, two, three = parts.lines("files")
    parts.replace("files", one + two.replace(b"1.png", rb"\ud800.png") + three)


@damage("line 1 of its tensor `files` cannot be read")
def stamp_missing(parts):
    parts.replace("files", re.sub(b'"stamp": "[^"]*"', b'"stamps": ""', b"".join(parts.lines("files"))))


@damage("line 1 of its tensor `files` cannot be read")
def names_deeply_nested(parts):
    parts.replace("files", b"[" * 100_000 + b"\n")


@damage("line 3 of its tensor `files` cannot be read")
def last_line_open(parts):
    parts.replace("files", b"".join(parts.lines("files"))[:-1])


@damage("line 1 of its tensor `failed` cannot be read")
def failure_not_text(parts):
    parts.replace("failed", b'{"file": "/x.png", "error": 3}\n')


@damage("the row of .*1.png is not finite")
def row_of_nan(parts):
    parts.data = parts.data[:ROW] + NAN + parts.data[ROW + 4 :]


@damage("the row of .*2.png is not finite")
def row_of_infinity(parts):
    parts.data = parts.data[: 3 * ROW - 4] + struct.pack("<f", float("-inf")) + parts.data[3 * ROW :]


@damage("is truncated: it has .* bytes")
def truncated(parts):
    parts.data = parts.data[:-1]


@damage("bytes, 3 more than its header says")
def extended(parts):
    parts.data += b"abc"


@pytest.fixture
def images(tmp_path):
    """Three images and one file that is none."""
    save_colours(tmp_path / "images", 3)
    (tmp_path / "images" / "3.png").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.safetensors"


@pytest.fixture
def part(out):
    return out.with_name("out.safetensors.part")


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(images, out, problem, **options):
    """Two runs fail with the same clear error and change nothing."""
    before = content_of(out.parent)
    for _ in range(2):
        with pytest.raises(EmbeddingFileError, match=problem) as caught:
            embed_colours([images], out, **options)
        assert str(out) in str(caught.value) and "resume" not in str(caught.value)
        assert content_of(out.parent) == before
    return str(caught.value)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_and_kept(images, out, name):
    change, problem = DAMAGES[name]
    embed_colours([images], out)
    parts = Parts(out.read_bytes())
    change(parts)
    out.write_bytes(parts.joined())
    with pytest.raises(EmbeddingFileError, match=problem) as caught:
        load_embeddings(out)
    assert str(caught.value).startswith(f"{out} ")
    assert "--overwrite to replace it" in refused(images, out, problem)
    assert embed_colours([images], out, overwrite=True).rows == 3
    assert len(load_embeddings(out).files) == 3


def test_taking_a_file_apart_does_not_damage_it(images, out):
    embed_colours([images], out)
    out.write_bytes(Parts(out.read_bytes()).joined())
    assert len(load_embeddings(out).files) == 3 and embed_colours([images], out).skipped == 3


def test_every_flipped_byte_is_noticed_or_harmless(images, out):
    embed_colours([images], out)
    whole = out.read_bytes()
    expected = load_embeddings(out).embeddings
    for position in range(len(whole)):
        flipped = whole[position] ^ 1 << position % 8
        out.write_bytes(whole[:position] + bytes([flipped]) + whole[position + 1 :])
        with contextlib.suppress(EmbeddingFileError):
            stored = load_embeddings(out)
            assert stored.embeddings.shape == expected.shape and len(stored.files) == 3


def test_every_truncation_is_noticed(images, out):
    embed_colours([images], out)
    whole = out.read_bytes()
    for length in range(len(whole)):
        out.write_bytes(whole[:length])
        with pytest.raises(EmbeddingFileError):
            load_embeddings(out)


def test_a_long_header_is_not_read(out):
    for length in (2**25, 2**40):
        with open(out, "wb") as file:
            file.write(struct.pack("<Q", length) + b'{"a":')
            file.truncate(2**26)
        with pytest.raises(EmbeddingFileError, match="was not written by"):
            load_embeddings(out)


def test_messages_do_not_repeat_what_is_long(images, out):
    embed_colours([images], out)
    parts = Parts(out.read_bytes())
    parts.header["__metadata__"]["model"] = "x" * 10**6
    out.write_bytes(parts.joined())
    assert len(refused(images, out, "model was x.* and is now|1000.*characters")) < 6000
    parts.header["x" * 10**6] = parts.header.pop("files")
    out.write_bytes(parts.joined())
    assert len(refused(images, out, "x* is missing|header `files` is missing")) < 6000


def test_loaded_rows_outlive_their_file_and_can_be_changed(images, out):
    embed_colours([images], out)
    before = out.read_bytes()
    rows = load_embeddings(out).embeddings
    expected = rows.clone()
    rows.add_(1)
    assert out.read_bytes() == before
    os.unlink(out)
    torch.testing.assert_close(rows, expected + 1)


def test_what_is_no_file_is_refused(images, out, tmp_path):
    os.mkfifo(out)
    with pytest.raises(EmbeddingFileError, match="is not a regular file"):
        load_embeddings(out)
    for overwrite in (False, True):
        with pytest.raises(EmbeddingFileError, match=r"out\.safetensors is not a regular file"):
            embed_colours([images], out, overwrite=overwrite)
    out.unlink()
    out.mkdir()
    with pytest.raises(EmbeddingFileError, match="is a folder without a file that ends in"):
        load_embeddings(out)
    for overwrite in (False, True):
        with pytest.raises(EmbeddingFileError, match=r"out\.safetensors is a folder"):
            embed_colours([images], out, overwrite=overwrite)
    with pytest.raises(EmbeddingFileError, match="does not exist; create it first"):
        embed_colours([images], tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(FileNotFoundError):
        load_embeddings(tmp_path / "nowhere.safetensors")


def test_a_read_only_file_is_refused(images, out, monkeypatch):
    embed_colours([images], out)
    before = out.read_bytes()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and path != out)  # root may write anything
    for overwrite in (False, True):
        with pytest.raises(EmbeddingFileError, match="is read-only; make it writable"):
            embed_colours([images], out, overwrite=overwrite)
    assert content_of(out.parent) == {out.name: before}


def test_a_symlink_is_written_through(images, out, tmp_path):
    """Also one to a file that does not exist yet. The journal is beside the target, so that all links share it."""
    target = tmp_path / "disk" / "rows.safetensors"
    target.parent.mkdir()
    out.symlink_to(os.path.relpath(target, out.parent))
    for expected in (0, 3):
        assert embed_colours([images], out).skipped == expected
        assert out.is_symlink() and content_of(target.parent).keys() == {target.name}
        assert load_embeddings(out).files == load_embeddings(target).files
    journals = []
    embed_colours(
        [images],
        out,
        overwrite=True,
        on_image=lambda *_: journals.append([path.name for path in target.parent.iterdir()]),
    )
    assert out.is_symlink() and "rows.safetensors.part" in journals[0]
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    target.unlink()
    target.parent.rmdir()
    with pytest.raises(EmbeddingFileError, match=r"disk does not exist; create it first"):
        embed_colours([images], out)
    out.unlink()
    out.symlink_to(out.name)
    with pytest.raises(EmbeddingFileError, match="is a symbolic link to itself"):
        embed_colours([images], out)


def foreign_database(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE songs (name TEXT)")
        database.execute("INSERT INTO songs VALUES ('one')")
    database.close()


def changed_record(statement, *values):
    def change(path):
        with sqlite3.connect(path) as database:
            database.execute(statement, values)
        database.close()

    return change


def cut_to(length):
    return lambda path: os.truncate(path, length)


DAMAGED_JOURNALS = {
    "text": lambda path: path.write_text("no journal" * 1000),
    "short text": lambda path: path.write_text("no"),
    "zero bytes": lambda path: path.write_bytes(bytes(5000)),
    "cut in its header": cut_to(50),
    "cut in its first page": cut_to(2000),
    "cut to two pages": cut_to(8192),
    "cut at its end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "foreign": lambda path: (path.unlink(), foreign_database(path)),
    "other columns": changed_record("ALTER TABLE images ADD COLUMN more"),
    "another table": changed_record("CREATE TABLE songs (name TEXT)"),
    "a trigger": changed_record("CREATE TRIGGER t AFTER INSERT ON images BEGIN DELETE FROM images; END"),
    "short row": changed_record("UPDATE images SET embedding = ? WHERE rowid = 1", b"short"),
    "long row": changed_record("UPDATE images SET embedding = ? WHERE rowid = 1", bytes(ROW + 1)),
    "row of text": changed_record("UPDATE images SET embedding = ? WHERE rowid = 1", "x" * ROW),
    "row of NaN": changed_record("UPDATE images SET embedding = ? WHERE rowid = 1", NAN * WIDTH),
    "neither row nor error": changed_record("UPDATE images SET embedding = NULL, error = NULL WHERE rowid = 1"),
    "no stamp": changed_record("UPDATE images SET stamp = NULL WHERE rowid = 1"),
    "name of text": changed_record("UPDATE images SET path = 'x' WHERE rowid = 1"),
    "error of bytes": changed_record("UPDATE images SET error = ? WHERE rowid = 1", b"\xff"),
    "error not UTF-8": changed_record("UPDATE images SET error = CAST(? AS TEXT) WHERE rowid = 1", b"\xff"),
}


def interrupted(images, out, after=2, **options):
    """A run that Ctrl-C stops after so many images; returns its summary."""
    seen = []

    def on_image(*outcome):
        seen.append(outcome)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(EmbeddingInterrupted) as caught:
        embed_colours([images], out, batch_size=1, on_image=on_image, **options)
    return caught.value.summary


@pytest.mark.parametrize("with_file", [False, True])
@pytest.mark.parametrize("name", DAMAGED_JOURNALS)
def test_a_damaged_journal_is_refused_and_overwritten_on_request(images, out, part, name, with_file):
    interrupted(images, out)
    if not with_file:
        out.unlink()
    DAMAGED_JOURNALS[name](part)
    message = refused(images, out, "is not the journal of an earlier run, or is damaged")
    assert ("delete it to continue from" in message) == with_file and "--overwrite to start over" in message
    assert embed_colours([images], out, overwrite=True).rows == 3
    assert content_of(out.parent).keys() == {out.name} and len(load_embeddings(out).files) == 3


@pytest.mark.parametrize("with_file", [False, True])
def test_deleting_a_damaged_journal_continues_from_the_file(images, out, part, with_file):
    interrupted(images, out)
    part.write_text("no journal")
    part.unlink()
    summary = embed_colours([images], out)
    assert (summary.skipped, summary.rows) == (2, 3)


@pytest.mark.parametrize("content", ["empty", "no tables", "no settings"])
def test_a_journal_without_settings_is_none(images, out, part, content):
    """Also one with rows: FILE is the base."""
    embed_colours([images], out)
    before = out.read_bytes()
    part.touch()
    if content == "no tables":
        changed_record("PRAGMA user_version = 3")(part)
    elif content == "no settings":
        journal = EmbeddingJournal(out, load_embeddings(out).settings)
        journal.close()
        changed_record("DELETE FROM settings")(part)
        changed_record("DELETE FROM images WHERE rowid > 1")(part)
    summary = embed_colours([images], out)
    assert (summary.skipped, summary.rows) == (3, 3)
    assert content_of(out.parent) == {out.name: before}


def test_a_journal_that_lacks_rows_of_the_file_is_completed(images, out, part):
    """As one that was started before FILE was put into its place."""
    embed_colours([images], out)
    with_all = load_embeddings(out)
    shutil.move(out, out.with_suffix(".moved"))
    save_colours(images.parent / "more", 2)
    interrupted(images.parent / "more", out, after=1)
    shutil.move(out.with_suffix(".moved"), out)
    summary = embed_colours([images.parent / "more"], out)
    assert summary.rows == 5
    stored = load_embeddings(out)
    assert set(with_all.files) < set(stored.files) and stored.failed == with_all.failed


def test_a_file_that_grew_during_the_run_is_not_replaced(images, out, part):
    embed_colours([images], out)
    larger = out.read_bytes()
    out.unlink()
    with pytest.raises(EmbeddingFileError, match=r"has 3 rows, more than the 1 .*; it was changed during the run"):
        embed_colours([images / "0.png"], out, on_image=lambda *_: out.write_bytes(larger))
    assert out.read_bytes() == larger
    summary = embed_colours([images / "0.png"], out)
    assert (summary.skipped, summary.rows) == (1, 3)


@pytest.mark.parametrize("kind", ["folder", "pipe", "symlink", "dangling symlink"])
def test_a_journal_that_is_no_file_is_refused(images, out, part, kind, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    if kind == "folder":
        part.mkdir()
    elif kind == "pipe":
        os.mkfifo(part)
    else:
        part.symlink_to(elsewhere)
    if kind == "symlink":
        foreign_database(elsewhere)
    before = elsewhere.read_bytes() if elsewhere.exists() else None
    for overwrite in (False, True):
        with pytest.raises(EmbeddingFileError, match=r"\.part is not a regular file"):
            embed_colours([images], out, overwrite=overwrite)
    assert os.path.lexists(part) and (elsewhere.read_bytes() if elsewhere.exists() else None) == before


@pytest.mark.parametrize("length", [0, ROW - 4, ROW + 4])
def test_a_row_of_the_wrong_length_is_refused_before_it_is_stored(images, out, length):
    embed_colours([images], out)
    journal = EmbeddingJournal(out, load_embeddings(out).settings)
    with pytest.raises(EmbeddingFileError, match=rf"row of /x\.png has {length} bytes, expected {ROW}"):
        journal.add("/x.png", "", embedding=bytes(length))
    assert journal.counts() == (3, 1)
    journal.close()


def test_overwriting_keeps_the_file_until_the_new_rows_are_complete(images, out, part):
    embed_colours([images], out, seed=1)
    before = out.read_bytes()
    for after in (1, 2):
        summary = interrupted(images, out, overwrite=after == 1, after=after)
        assert not summary.written and summary.rows == after and out.read_bytes() == before
    with pytest.raises(EmbeddingFileError, match=r"other settings.*delete it to continue from"):
        embed_colours([images], out, seed=1)
    summary = embed_colours([images], out)
    assert summary.written and (summary.skipped, summary.rows) == (2, 3)
    assert (
        load_embeddings(out).settings["model"] != json.loads(json.dumps(Parts(before).header))["__metadata__"]["model"]
    )


@pytest.mark.parametrize("damage", ["stamp = '12\u00e9'", "error = printf('%.*c', 17000000, 'x')"])
def test_a_journal_whose_records_a_file_cannot_hold(images, out, part, damage):
    embed_colours([images / "0.png", images / "1.png"], out)
    interrupted(images, out, after=1)
    before = out.read_bytes()
    with contextlib.closing(sqlite3.connect(part)) as database:
        database.execute(f"UPDATE images SET {damage} WHERE rowid = 1")
        database.commit()
    for _ in range(2):
        with pytest.raises(EmbeddingFileError, match=r"\.part .* is damaged"):
            embed_colours([images], out)
        assert out.read_bytes() == before
    assert embed_colours([images], out, overwrite=True).rows == 3


def test_a_name_too_long_for_the_journal(images, tmp_path):
    for length, fits in ((242, True), (243, False), (300, False)):
        out = tmp_path / ("x" * (length - 12) + ".safetensors")
        if fits:
            assert embed_colours([images], out).rows == 3
        else:
            with pytest.raises(EmbeddingFileError, match=f"has {length} bytes; supported: at most 242"):
                embed_colours([images], out)
    assert len(list(tmp_path.glob("x*"))) == 1


def test_an_interrupted_overwrite_does_not_cost_rows_later(images, out, part):
    """A run without --overwrite was not asked to leave fewer rows, whatever the run before it was asked."""
    embed_colours([images], out)
    before = out.read_bytes()
    interrupted(images, out, overwrite=True, after=1)
    for _ in range(2):
        with pytest.raises(EmbeddingFileError, match=r"has 3 rows, more than the 1 .* --overwrite left; it was not"):
            embed_colours([images / "0.png"], out)
        assert out.read_bytes() == before and part.exists()
    assert embed_colours([images], out).rows == 3 and not part.exists()


def test_an_overwritten_file_that_was_deleted_is_written_when_interrupted(images, out, part):
    embed_colours([images], out, seed=1)
    assert not interrupted(images, out, overwrite=True, after=1).written
    out.unlink()
    assert interrupted(images, out, after=2).written
    assert len(load_embeddings(out).files) == 2 and part.exists()


def test_a_row_is_kept_when_its_image_cannot_be_read_any_more(images, out):
    embed_colours([images], out)
    before = load_embeddings(out)
    content = (images / "1.png").read_bytes()
    (images / "1.png").unlink()
    summary = embed_colours([images / "0.png", images / "1.png"], out)
    assert (summary.failed, summary.rows) == (1, 3)
    stored = load_embeddings(out)
    assert stored.files == before.files and torch.equal(stored.embeddings, before.embeddings)
    assert str(images / "1.png") in stored.failed
    (images / "1.png").write_bytes(content)
    assert embed_colours([images], out).embedded == 1
    assert str(images / "1.png") not in load_embeddings(out).failed


def test_an_unreadable_image_with_a_name_that_is_not_unicode(images, out):
    name = os.path.join(os.fsencode(images), b"\xff.png")
    try:
        with open(name, "wb") as file:
            file.write(b"no image")
    except OSError:
        pytest.skip("this file system only accepts Unicode names")
    assert embed_colours([images], out).failed == 2
    assert os.fsdecode(name) in load_embeddings(out).failed
    assert embed_colours([images], out).failed == 2


def test_a_locked_journal_is_not_overwritten(images, out, part):
    refusals = []

    def on_image(*_):
        before = part.stat().st_ino
        for overwrite in (False, True):
            with pytest.raises(EmbeddingFileError, match="another run is writing it") as caught:
                embed_colours([images], out, overwrite=overwrite)
            refusals.append(str(caught.value))
        assert part.stat().st_ino == before

    assert embed_colours([images], out, on_image=on_image).rows == 3
    assert len(refusals) == 8


def test_advice_to_resume_fits_the_command():
    assert resuming(False) == "run the same command again to resume"
    assert resuming(True) == "run the same command again without --overwrite to resume"


@pytest.mark.parametrize("start", ["nothing", "file", "damaged journal"])
def test_two_runs_that_start_at_once(images, out, part, start):
    """One is refused, or finishes after the other; the file is whole."""
    embed_colours([images], out)
    expected = out.read_bytes()
    for _ in range(10):
        out.unlink()
        if start != "nothing":
            embed_colours([images / "0.png"], out)
        if start == "damaged journal":
            part.write_text("no journal" * 1000)
        children = []
        for _ in range(2):
            children.append(os.fork())
            if children[-1] == 0:
                try:
                    embed_colours([images], out, overwrite=start == "damaged journal")
                    os._exit(0)
                except EmbeddingFileError as error:
                    os._exit(2 if "another run is writing it" in str(error) else 3)
                finally:
                    os._exit(1)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        if codes == [2, 2] and start == "damaged journal":  # SQLite cannot lock it, so each may yield to the other
            embed_colours([images], out, overwrite=True)
        else:
            assert codes in ([0, 0], [0, 2])
        assert content_of(out.parent) == {out.name: expected}


def test_memory_does_not_grow_with_the_rows_that_are_checked(out, monkeypatch):
    """Peaks of Python's allocations when the rows of FILE are copied and when those of a journal are continued."""
    monkeypatch.setattr(embed_file, "CHUNK", 4096)
    settings = {"dtype": "F32", "width": str(WIDTH)}
    peaks = []
    for count in (1000, 1000, 5000):  # the first is a warm-up
        journal = EmbeddingJournal(out, settings, overwrite=True)
        for number in range(count):
            journal.add(f"/{number:06}.png", "", embedding=bytes(ROW))
        journal.write(complete=True)
        journal.remove()
        tracemalloc.start()
        for _ in range(2):
            EmbeddingJournal(out, settings).close()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 4000 * 2
