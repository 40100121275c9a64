"""`siglip embed`: resuming, settings, and interruption by signals."""

import json
import signal
import subprocess
import sys

import pytest
from command_line import one_line
from tiny_checkpoint import random_image

from siglip_model.embed import load_embeddings
from siglip_model.embed import run as embed_run


def test_embed_and_resume(siglip, images, tmp_path):
    out = tmp_path / "out.safetensors"
    (images / "3.png").write_text("no image")
    result = siglip("embed", images, "--out", out)
    assert result.exit_code == 1
    assert "4 rows of width 32; 4 embedded now" in result.stdout and "1 failed" in result.stdout
    assert "3.png: not an image" in result.stderr and "1 of 5 images failed" in result.stderr
    random_image(3).save(images / "3.png")
    result = siglip("embed", images, "--out", out, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert (report["embedded"], report["skipped"], report["rows"], report["failures"]) == (1, 4, 5, [])
    assert "blank" not in report
    assert load_embeddings(out).embeddings.norm(dim=-1).sub(1).abs().max() < 1e-5
    assert "5 rows of width 32; 0 embedded now, 5 already present" in siglip("embed", images, "--out", out).stdout
    result = siglip("embed", images, "--out", out, "--no-normalize")
    assert result.exit_code == 2 and one_line(result.stderr) and "normalize was true and is now false" in result.stderr
    result = siglip("embed", images, "--out", out, "--no-normalize", "--overwrite", "--dtype", "bfloat16")
    assert result.exit_code == 0
    stored = load_embeddings(out)
    assert str(stored.embeddings.dtype) == "torch.bfloat16" and stored.settings["computed_in"] == "bfloat16"


INTERRUPTED_RUN = """
import sys, time
from siglip_model.cli import main as cli
from siglip_model.cli import terminal
from siglip_model.embed import run as embed_run
note = embed_run._Run._note
def note_and_say(self, *arguments, **options):
    note(self, *arguments, **options)
    print("noted", flush=True)
    time.sleep(0.05)
embed_run._Run._note = note_and_say
sys.argv = ["siglip", *sys.argv[1:]]
cli.main()
"""


def test_ctrl_c_keeps_the_finished_rows(siglip, many, tmp_path, checkpoint):
    out = tmp_path / "out.safetensors"
    arguments = ["embed", str(many), "--out", str(out), "--model", str(checkpoint), "--batch-size", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(7):
        assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert one_line(stderr) and "of 40 images; run the same command again to resume" in stderr
    rows = len(load_embeddings(out).files)
    assert 6 <= rows < 40
    report = json.loads(siglip("embed", many, "--out", out, "--json").stdout)
    assert (report["skipped"], report["rows"]) == (rows, 40)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_an_embedding_with_130_and_the_finished_rows(siglip, many, tmp_path, number, monkeypatch):
    out = tmp_path / "out.safetensors"
    note, handler = embed_run._Run._note, signal.getsignal(signal.SIGTERM)

    def note_and_interrupt(run, *arguments, **options):
        note(run, *arguments, **options)
        if run.embedded == 6:
            signal.raise_signal(number)

    monkeypatch.setattr(embed_run._Run, "_note", note_and_interrupt)
    result = siglip("embed", many, "--out", out, "--batch-size", 2, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 130 and one_line(result.stderr) and "interrupted after 6 of 40" in result.stderr
    assert (report["rows"], report["complete"]) == (6, False) and len(load_embeddings(out).files) == 6
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_damaged_file_or_journal_ends_with_2_and_is_kept(siglip, images, tmp_path):
    out = tmp_path / "out.safetensors"
    part = tmp_path / "out.safetensors.part"
    assert siglip("embed", images, "--out", out).exit_code == 0
    whole = out.read_bytes()
    damaged = {
        "was not written by `siglip embed`": whole.replace(b'"producer"', b'"products"'),
        "is damaged: line 1 of its tensor `files` cannot be read": whole.replace(b"0.png", b"\xff.png"),
        "is truncated": whole[:-1],
    }
    for problem, content in damaged.items():
        out.write_bytes(content)
        for _ in range(2):
            result = siglip("embed", images, "--out", out)
            assert result.exit_code == 2 and one_line(result.stderr), result.stderr
            assert f"{out} {problem}" in result.stderr
            assert out.read_bytes() == content and not part.exists()
    out.write_bytes(whole)
    part.write_text("no journal" * 100)
    for _ in range(2):
        result = siglip("embed", images, "--out", out)
        assert result.exit_code == 2 and one_line(result.stderr) and "resume" not in result.stderr
        assert f"{part} is not the journal of an earlier run" in result.stderr
        assert out.read_bytes() == whole
    result = siglip("embed", images, "--out", out, "--overwrite")
    assert result.exit_code == 0 and "5 embedded now" in result.stdout and not part.exists()


def test_an_interrupted_overwrite_keeps_the_old_file_and_is_resumed_without_it(siglip, many, tmp_path, monkeypatch):
    out = tmp_path / "link.safetensors"
    out.symlink_to("out.safetensors")
    assert siglip("embed", many, "--out", out).exit_code == 0
    old = out.read_bytes()
    note = embed_run._Run._note

    def note_and_interrupt(run, *arguments, **options):
        note(run, *arguments, **options)
        if run.embedded == 6:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(embed_run._Run, "_note", note_and_interrupt)
        result = siglip("embed", many, "--out", out, "--overwrite", "--no-normalize", "--batch-size", 2)
    assert result.exit_code == 130 and "run the same command again without --overwrite to resume" in result.stderr
    assert f"{out} is kept until all new rows are finished; 6 are" in result.stdout
    assert out.read_bytes() == old
    result = siglip("embed", many, "--out", out, "--no-normalize", "--json")
    report = json.loads(result.stdout)
    assert (report["skipped"], report["rows"], report["written"]) == (6, 40, True)
    assert load_embeddings(out).settings["normalize"] == "false" and out.is_symlink()


def test_texts_from_a_file_and_from_stdin(siglip, tmp_path):
    out, listed = tmp_path / "out.safetensors", tmp_path / "x.txt"
    listed.write_bytes("a rocket\n\nein Käse\na rocket\n".encode("latin-1"))
    result = siglip("embed", "--texts", listed, "--out", out)
    assert result.exit_code == 2 and one_line(result.stderr) and "x.txt is not encoded in utf-8" in result.stderr
    result = siglip("embed", "--texts", listed, "--out", out, "--encoding", "latin-1")
    assert (
        result.exit_code == 0 and "2 rows of width 32; 2 embedded now" in result.stdout and "texts/s" in result.stdout
    )
    assert "left out 1 blank text\n" in result.stderr
    result = siglip("embed", "--texts", "-", "--out", out, "--json", stdin="\n \na rocket\n")
    assert json.loads(result.stdout)["blank"] == 2 and "left out 2 blank texts\n" in result.stderr
    result = siglip("embed", "--texts", "-", "--out", out, stdin="a rocket\n2 cats\n" + "x" * 70_000)
    assert result.exit_code == 1 and "1 of 3 texts failed" in result.stderr
    assert load_embeddings(out).files == ["a rocket", "ein Käse", "2 cats"]
    found = siglip("search", out, "a rocket", "--json", "--top", 1, "--device", "cpu")
    (query,) = json.loads(found.stdout)
    assert query["results"][0]["name"] == "a rocket" and "score" not in query["results"][0]
    picture = tmp_path / "0.png"
    random_image(0).save(picture)
    found = siglip("search", out, "--image", picture, "--json", "--device", "cpu")
    assert 0 < json.loads(found.stdout)[0]["results"][0]["score"] < 1
    result = siglip("search", out, "a rocket", "--plot", tmp_path / "x.png", "--device", "cpu")
    assert result.exit_code == 2 and "are texts" in result.stderr


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_texts_on_stdin_are_read_as_their_byte_order_mark_says(siglip, tmp_path, encoding):
    out = tmp_path / "out.safetensors"
    result = siglip("embed", "--texts", "-", "--out", out, stdin="a rocket\nKäse\n".encode(encoding))
    assert result.exit_code == 0 and load_embeddings(out).files == ["a rocket", "Käse"], result.stderr


def test_a_broken_image_of_one_rank_does_not_end_the_others(siglip, images, tmp_path, monkeypatch):
    """torchrun ends all ranks when one ends with another code than 0."""
    for path in images.iterdir():
        path.write_text("no image")
    monkeypatch.setenv("WORLD_SIZE", "2")
    failed = 0
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        result = siglip("embed", images, "--out", tmp_path / "out.safetensors")
        assert result.exit_code == 0, result.stderr
        failed += result.stderr.count("not an image")
        assert f"images failed on rank {rank}" in result.stderr or "not an image" not in result.stderr
    assert failed == 5


def test_wrong_sizes_are_found_before_the_model_is_loaded(siglip, images, tmp_path):
    for words, message in (
        (["--shard-size", "2XB"], "--shard-size is '2XB'; supported: a whole number of bytes"),
        (["--shard-size", "0"], "--shard-size is '0'"),
        (["--shard-size", "2GB", "--shards", "2"], "--shard-size cuts the output of one process"),
    ):
        result = siglip("embed", images, "--out", tmp_path / "out.npy", "--model", tmp_path / "none", *words)
        assert result.exit_code == 2 and one_line(result.stderr) and message in result.stderr, result.stderr


def test_wrong_use_of_texts_ends_with_2(siglip, images, tmp_path):
    listed = tmp_path / "x.txt"
    listed.write_text("x")
    for words, message in (
        ([], "there is nothing to embed"),
        ([images, "--texts", listed], "embed images and texts into different files"),
        (["--texts", tmp_path / "gone.txt"], "--texts: no such file"),
        (["--texts", listed, "--encoding", "latin-99"], "--encoding: unknown encoding: latin-99"),
        (["--texts", listed, "--decode", "processes"], "--decode is for images, not for --texts"),
        (["--texts", listed, "--max-pixels", "9"], "--max-pixels is for images, not for --texts"),
        ([images, "--encoding", "latin-1"], "--encoding is that of --texts"),
        ([images, "--column", "image"], "--column is that of .parquet files"),
    ):
        result = siglip("embed", *words, "--out", tmp_path / "out.safetensors")
        assert result.exit_code == 2 and one_line(result.stderr) and message in result.stderr, result.stderr


def test_profile_prints_the_stages(siglip, images, tmp_path):
    result = siglip("embed", images, "--out", tmp_path / "a.safetensors", "--profile", "--workers", 3)
    assert result.exit_code == 0 and "\nbound by " in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()[1:-1]]
    assert [line[0] for line in lines] == ["list", "decode", "copy", "compute", "write", "rest"]
    assert 97 <= sum(int(line[-1].removesuffix("%")) for line in lines) <= 103
    report = json.loads(siglip("embed", images, "--out", tmp_path / "b.safetensors", "--profile", "--json").stdout)
    assert report["profile"]["bound_by"] and report["profile"]["total"] > 0
    report = json.loads(siglip("embed", images, "--out", tmp_path / "b.safetensors", "--json").stdout)
    assert "profile" not in report


def test_inputs_that_hold_nothing_are_an_error_that_names_them(siglip, tmp_path):
    out, listed = tmp_path / "out.safetensors", tmp_path / "x.txt"
    for content, said in (("", ""), (" \n\n", "siglip: left out 2 blank texts\n")):
        listed.write_text(content)
        for words, place in (
            (["--texts", listed], listed),
            (["--texts", listed, "--json"], listed),
            (["--texts", "-"], "the list on stdin"),
        ):
            result = siglip("embed", *words, "--out", out, stdin=content)
            assert (result.exit_code, result.stdout) == (2, "")
            assert result.stderr == f"{said}siglip: error: no texts in {place}\n"
            assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    (tmp_path / "x.tar").write_bytes(bytes(10240))
    result = siglip("embed", tmp_path / "x.tar", "--out", out)
    assert result.exit_code == 2 and result.stderr == f"siglip: error: no images in {tmp_path / 'x.tar'}\n"


def test_ranks_say_which_they_are(siglip, images, tmp_path, monkeypatch):
    out, listed = tmp_path / "out.safetensors", tmp_path / "x.txt"
    listed.write_text("a rocket\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shown = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        result = siglip("embed", "--texts", listed, "--out", out)
        assert result.exit_code == 0 and result.stdout.startswith(f"rank {rank} of 2: "), result.stderr
        shown.append(result.stdout.partition(": ")[2])
    assert sorted(text.startswith("no text was embedded") for text in shown) == [False, True]
