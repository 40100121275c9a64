"""What becomes rows: shards with broken members, parquet columns, texts in several encodings, URLs."""

import builtins
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading

import colour_embedder
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_checkpoint import random_image

from siglip_model import AutoTokenizer
from siglip_model.embed import EmbeddingFileError, embed_images, embed_texts, load_embeddings
from siglip_model.embed.sources import image_sources, named_image, text_sources
from siglip_model.images.files import EncodedImage, UnreadableImageError


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture
def embed(model, image_processor, tmp_path):
    def run(inputs, **options):
        summary = embed_images(model, image_processor, inputs, tmp_path / "out.safetensors", batch_size=4, **options)
        return summary, load_embeddings(tmp_path / "out.safetensors")

    return run


def encoded(seed, **options):
    content = io.BytesIO()
    random_image(seed, **options).save(content, "PNG")
    return content.getvalue()


def write_shard(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))


def outcomes(sources):
    """{name: whether there is content}, with the folder cut off."""
    return {os.path.basename(source.name): not isinstance(source.content, Exception) for source in sources}


@pytest.mark.skipif("GNU tar" not in subprocess.getoutput("tar --version"), reason="needs GNU tar")
@pytest.mark.parametrize("format", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"])
def test_sparse_members(tmp_path, format):
    """`tar --sparse` leaves out holes: such a member is shorter in the shard, and not truncated but where it is."""
    picture, content = Image.new("RGB", (300, 300)), io.BytesIO()
    picture.paste("red", (0, 0, 300, 4))  # at the end of the file
    picture.save(content, "BMP")
    whole = content.getvalue()
    for name in ("a.bmp", "b.bmp"):
        with open(tmp_path / name, "wb") as file:
            file.write(whole[:4096])
            file.seek(len(whole) - 8192)
            file.write(whole[-8192:])
    if (tmp_path / "a.bmp").stat().st_blocks * 512 >= len(whole):
        pytest.skip("files here have no holes")
    command = f"tar --sparse --format={format} -cf s.tar a.bmp b.bmp"
    subprocess.run(command.split(), cwd=tmp_path, check=True)
    shard = tmp_path / "s.tar"
    assert shard.stat().st_size < len(whole)
    assert [source.content.content for source in image_sources([shard])] == [whole] * 2
    assert named_image(f"{shard}#b.bmp").content == whole
    with tarfile.open(shard) as opened:
        last = opened.getmembers()[-1]
    os.truncate(shard, last.offset_data + 600)
    first, second = image_sources([shard])
    assert first.content.content == whole and "is truncated: of " in str(second.content)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_a_shard_are_rows_as_files_are(embed, tmp_path, format):
    long = "ü" * 45 if format == tarfile.USTAR_FORMAT else "ü" * 200
    names = ["000.png", f"{long}.png", "b/002.JPG"]
    members = [(name, encoded(number)) for number, name in enumerate(names)]
    write_shard(tmp_path / "s.tar", [members[0], ("000.txt", b"a caption"), *members[1:]], format)
    summary, stored = embed([tmp_path / "s.tar"])
    assert (summary.embedded, summary.failed) == (3, 0)
    assert stored.files == [f"{tmp_path}/s.tar#{name}" for name in names]
    for number in range(3):
        random_image(number).save(tmp_path / f"{number}.png")
    (tmp_path / "out.safetensors").unlink()
    _, files = embed([tmp_path / f"{number}.png" for number in range(3)])
    torch.testing.assert_close(stored.embeddings, files.embeddings, atol=1e-6, rtol=0)


def test_headers_of_all_members_are_no_damage(tmp_path):
    for number in range(2):  # of which one shard is made, so that such a header is also between members
        with tarfile.open(tmp_path / "one.tar", "w", pax_headers={"comment": "a commit"}) as shard:
            info = tarfile.TarInfo(f"{number}.png")
            info.size = 600
            shard.addfile(info, io.BytesIO(bytes(600)))
        with open(tmp_path / "s.tar", "ab") as shards:
            shards.write((tmp_path / "one.tar").read_bytes())
    assert outcomes(image_sources([tmp_path / "s.tar"])) == {"s.tar#0.png": True, "s.tar#1.png": True}


def test_a_shard_of_webdataset(embed, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as shard:
        for number in range(5):
            shard.write({"__key__": f"{number:05}", "png": random_image(number), "txt": "a caption"})
    summary, stored = embed([tmp_path / "s.tar"])
    assert summary.embedded == 5
    assert [name.partition("#")[2] for name in stored.files] == [f"{number:05}.png" for number in range(5)]


def test_broken_members_are_named_and_the_rest_is_embedded(embed, tmp_path):
    members = [(f"{number}.png", encoded(number)) for number in range(6)]
    members[1] = ("1.png", b"no image")
    shard = tmp_path / "s.tar"
    write_shard(shard, members)
    with tarfile.open(shard) as opened:
        third, last = opened.getmember("3.png"), opened.getmember("5.png")
    content = bytearray(shard.read_bytes())
    content[third.offset : third.offset + 300] = b"\xff" * 300  # its header
    shard.write_bytes(content[: last.offset_data + 100])
    (tmp_path / "no.tar").write_bytes(b"no shard" * 1000)
    (tmp_path / "empty.tar").write_bytes(b"")
    write_shard(tmp_path / "next.tar", [("a.png", encoded(9))])
    told = {}
    summary, stored = embed(
        [shard, tmp_path / "no.tar", tmp_path / "empty.tar", tmp_path / "next.tar"],
        on_image=lambda name, outcome, error: told.update({os.path.basename(name): outcome}),
    )
    whole = ["s.tar#0.png", "s.tar#2.png", "s.tar#4.png", "next.tar#a.png"]
    assert [os.path.basename(name) for name in stored.files] == whole
    failed = {os.path.basename(name): error for name, error in stored.failed.items()}
    assert summary.failed == len(failed) == 5
    assert "not an image" in failed["s.tar#1.png"]
    assert "are not a member" in failed[f"s.tar#{third.offset}"]
    assert "is truncated: of " in failed["s.tar#5.png"]
    assert "are not a member" in failed["no.tar#0"] and "empty file" in failed["empty.tar"]
    assert all(error.startswith(str(tmp_path)) for error in failed.values())
    summary, _ = embed([shard])
    assert (summary.embedded, summary.skipped, summary.failed) == (0, 3, 3)


def test_a_shard_cut_at_any_block_loses_only_what_is_missing(tmp_path):
    shard = tmp_path / "s.tar"
    members = [(f"{number}.png", b"x" * size) for number, size in enumerate((0, 700, 512))]
    write_shard(shard, members, tarfile.USTAR_FORMAT)
    content = shard.read_bytes()
    ends = [512, 1024 + 700, 2048 + 512 + 512]  # of the members' bytes
    for size in range(1, 3100, 37):
        shard.write_bytes(content[:size])
        found = outcomes(image_sources([shard]))
        whole = [f"s.tar#{number}.png" for number in range(3) if size >= ends[number]]
        assert [name for name, is_whole in found.items() if is_whole] == whole
        at_an_end = size >= ends[2] or any(end <= size <= -(-end // 512) * 512 for end in ends)
        assert sum(not is_whole for is_whole in found.values()) == (not at_an_end), size


def write_parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)


def test_parquet_columns_of_bytes_paths_and_hugging_faces_images(embed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = [encoded(number) for number in range(7)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.png").write_bytes(content)
    paths = [f"{number}.png" for number in range(7)]
    write_parquet("bytes.parquet", image=contents, id=list(range(7)))
    _, stored = embed(["bytes.parquet"])
    assert stored.files == [f"{tmp_path}/bytes.parquet#{number}" for number in range(7)]
    os.unlink("out.safetensors")
    write_parquet(
        "hf.parquet", image=[{"bytes": contents[0], "path": None}, {"bytes": None, "path": "1.png"}], n=[1, 2]
    )
    _, two = embed(["hf.parquet"])
    assert two.files == [f"{tmp_path}/hf.parquet#0", f"{tmp_path}/1.png"]
    os.unlink("out.safetensors")
    write_parquet("paths.parquet", file=paths)
    _, by_path = embed(["paths.parquet"])
    assert by_path.files == [f"{tmp_path}/{path}" for path in paths]
    assert torch.equal(stored.embeddings, by_path.embeddings)
    torch.testing.assert_close(two.embeddings, stored.embeddings[:2], atol=1e-6, rtol=0)


def test_nulls_and_broken_rows_of_a_column_are_named(embed, tmp_path):
    write_parquet(tmp_path / "x.parquet", image=[encoded(0), None, b"no image", encoded(3)])
    summary, stored = embed([tmp_path / "x.parquet"])
    assert [name.partition("#")[2] for name in stored.files] == ["0", "3"]
    assert stored.failed[f"{tmp_path}/x.parquet#1"].endswith("its column image is null")
    assert "x.parquet#2: not an image" in stored.failed[f"{tmp_path}/x.parquet#2"] and summary.failed == 2


def test_columns_of_dictionaries_and_views(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    images, texts = [b"one", b"two", b"one"], ["eins", "zwei", "eins"]
    for kind in ("binary", "large_binary", "binary_view", "dictionary"):
        column = pyarrow.array(images) if kind == "dictionary" else pyarrow.array(images, getattr(pyarrow, kind)())
        write_parquet(tmp_path / "x.parquet", x=column.dictionary_encode() if kind == "dictionary" else column)
        assert [source.content.content for source in image_sources([tmp_path / "x.parquet"])] == images
    for kind in ("string", "large_string", "string_view", "dictionary"):
        column = pyarrow.array(texts) if kind == "dictionary" else pyarrow.array(texts, getattr(pyarrow, kind)())
        write_parquet(tmp_path / "x.parquet", x=column.dictionary_encode() if kind == "dictionary" else column)
        assert [source.content for source in text_sources([tmp_path / "x.parquet"])] == texts


def test_a_parquet_file_that_is_not_whole_is_named_and_the_rest_read(tmp_path):
    contents = [np.random.default_rng(number).bytes(3000) for number in range(200)]
    write_parquet(tmp_path / "cut.parquet", image=contents)
    content = bytearray((tmp_path / "cut.parquet").read_bytes())
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    content[400_000:440_000] = b"\xff" * 40_000
    (tmp_path / "damaged.parquet").write_bytes(content)
    (tmp_path / "cut.parquet").write_bytes(content[:300_000])
    write_parquet(tmp_path / "next.parquet", image=[encoded(0)])
    found = list(image_sources([tmp_path / f"{name}.parquet" for name in ("junk", "cut", "damaged", "next")]))
    failed = {
        os.path.basename(source.name): str(source.content) for source in found if isinstance(source.content, Exception)
    }
    assert list(failed)[:2] == ["junk.parquet", "cut.parquet"] and list(failed)[2].startswith("damaged.parquet#")
    assert all("is not a whole parquet file" in problem for problem in failed.values()) and len(failed) == 3
    assert found[-1].name == f"{tmp_path}/next.parquet#0" and found[-1].content.content == encoded(0)


def test_a_compressed_shard_is_named(tmp_path):
    (tmp_path / "s.tar.gz").write_bytes(b"x")
    (source,) = image_sources([tmp_path / "s.tar.gz"])
    assert "is compressed; supported: .tar" in str(source.content)


def test_links_within_a_shard_are_named(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            link = tarfile.TarInfo(f"{kind.decode()}.png")
            link.type, link.linkname = kind, "a.png"
            shard.addfile(link)
    found = list(image_sources([tmp_path / "s.tar"]))
    assert len(found) == 2 and all("is a link to a.png" in str(source.content) for source in found)


def test_columns_that_cannot_be_meant_are_errors(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, image=[b"x"], file=["a.png"], number=[1])
    for column, kinds, message in (
        (
            None,
            image_sources,
            r"no single column of bytes, strings or \{bytes, path\}; name one as column \(--column\); its columns are "
            r"image \(binary\), file \(string\), number \(int64\)",
        ),
        ("number", image_sources, "no such column number; supported: a column of bytes, strings or "),
        ("gone", image_sources, "no such column gone"),
        ("image", text_sources, "supported: a column of strings"),
    ):
        with pytest.raises(ValueError, match=message):
            list(kinds([path], column))
    assert [source.content for source in image_sources([path], "image")] == [EncodedImage(f"{path}#0", b"x")]
    assert [source.content for source in text_sources([path])] == ["a.png"]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    found = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ImportError("No module named 'pyarrow'")
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'siglip-triton\[parquet\]'"):
        list(image_sources([tmp_path / "x.parquet"]))


TEXTS = ["a photo of 2 cats", "zwölf Käse", "一只猫"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("utf-8-sig", "utf-8"),  # which leaves the byte order mark
        ("utf-16", None),
        ("utf-32", None),
        ("gb18030", "gb18030"),
    ],
)
def test_texts_in_several_encodings(tmp_path, written, named, ending):
    path = tmp_path / "x.txt"
    path.write_bytes(ending.join([TEXTS[0], "", TEXTS[1], f"  {TEXTS[2]} "]).encode(written))
    found = [(source.name, source.content) for source in text_sources([path], None, named)]
    assert found == [(TEXTS[0], TEXTS[0]), (f"{path}#2", None), (TEXTS[1], TEXTS[1]), (TEXTS[2], TEXTS[2])]


def test_blank_texts_are_counted_and_have_no_row(model, tokenizer, tmp_path):
    listed, table, out = tmp_path / "x.txt", tmp_path / "x.parquet", tmp_path / "out.safetensors"
    listed.write_text("a cat\n\n \t\nbread\n\n")
    write_parquet(table, text=["", "a dog", " ", "a cat"])
    for again in (False, True):
        summary = embed_texts(model, tokenizer, [listed, table], out)
        assert (summary.blank, summary.failed, summary.rows) == (5, 0, 3)
        assert (summary.embedded, summary.skipped) == ((0, 4) if again else (3, 1))
    assert load_embeddings(out).files == ["a cat", "bread", "a dog"]


def test_one_input_is_no_list_of_letters(tmp_path):
    (tmp_path / "x.txt").write_text("a cat\n")
    (tmp_path / "x.png").write_bytes(encoded(0))
    for name in (str, type(tmp_path)):
        assert outcomes(text_sources(name(tmp_path / "x.txt"))) == {"a cat": True}
        assert outcomes(image_sources(name(tmp_path))) == outcomes(image_sources(name(tmp_path / "x.png")))


def test_another_encoding_and_a_text_without_end(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("Käse\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"x.txt is not encoded in utf-8 .*name its encoding, .* as encoding \(--encoding\)$"
    ):
        list(text_sources([path]))
    path.write_text("x" * 200_000 + "\nnext\n")
    assert outcomes(text_sources([path])) == {"x.txt#1": False, "next": True}


def test_rows_of_texts_are_the_models_features(model, tokenizer, checkpoint, tmp_path):
    listed, out = tmp_path / "x.txt", tmp_path / "out.safetensors"
    listed.write_text("\n".join([*TEXTS, TEXTS[0], "one more " * 100]))
    summary = embed_texts(model, tokenizer, [listed], out, batch_size=3)
    assert (summary.embedded, summary.skipped, summary.rows) == (4, 1, 4)
    stored = load_embeddings(out)
    assert stored.files == [*TEXTS, ("one more " * 100).strip()] and stored.settings["content"] == "texts"
    reference = transformers.SiglipModel.from_pretrained(checkpoint)
    tokens = transformers.AutoTokenizer.from_pretrained(checkpoint)(
        stored.files, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = torch.nn.functional.normalize(reference.get_text_features(**tokens).pooler_output, dim=-1)
    torch.testing.assert_close(stored.embeddings, expected, atol=1e-5, rtol=0)
    with open(listed, "a") as file:
        file.write("\nlast")
    summary = embed_texts(model, tokenizer, [listed], out)
    assert (summary.embedded, summary.rows) == (1, 5) and load_embeddings(out).files[-1] == "last"


def test_images_and_texts_are_not_mixed(embed, model, tokenizer, tmp_path):
    random_image(0).save(tmp_path / "0.png")
    embed([tmp_path / "0.png"])
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(EmbeddingFileError, match="content was images and is now texts"):
        embed_texts(model, tokenizer, [tmp_path / "x.txt"], tmp_path / "out.safetensors")


def test_urls(embed, tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = encoded(1) if self.path in ("/1.png", "/cut.png") else b""
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content) + (self.path == "/cut.png")))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        summary, stored = embed([f"{place}/1.png", f"{place}/gone.png", f"{place}/cut.png"])
        server.shutdown()
    assert stored.files == [f"{place}/1.png"] and "404" in stored.failed[f"{place}/gone.png"] and summary.failed == 2
    length = len(encoded(1))
    assert f"ended after {length:,} of {length + 1:,} bytes" in stored.failed[f"{place}/cut.png"]


MEMORY = """
import io, resource, sys, tarfile
from colour_embedder import embed_colours
content, out, shards = open(sys.argv[1], "rb").read(), sys.argv[2], []
for shard in range(int(sys.argv[3])):
    shards.append(f"{out}.{shard}.tar")
    with tarfile.open(shards[-1], "w") as file:
        for number in range(1000):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
            file.members.clear()
rows = embed_colours(shards, out, batch_size=16, num_workers=2).rows
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("suffix", ["safetensors", "npy", "parquet"])
def test_memory_does_not_grow_with_the_shards(tmp_path, suffix):
    (tmp_path / "x.png").write_bytes(encoded(0, size=(16, 16)))
    support = os.path.dirname(colour_embedder.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), ".", support])}
    peaks = []
    for shards in (1, 20):
        arguments = [tmp_path / "x.png", tmp_path / f"{shards}.{suffix}", shards]
        command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        rows, kibibytes = map(int, printed.split())
        assert rows == 1000 * shards
        peaks.append(kibibytes)
    assert peaks[1] - peaks[0] < 16 * 1024  # KiB; what 19,000 images or their names would take is more


def test_images_are_found_again_by_the_names_of_their_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    from pyarrow import parquet

    contents = [f"image {number}".encode() for number in range(5)]
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f"b#{number}.png")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    table = pyarrow.table({"image": [{"bytes": content, "path": None} for content in contents], "text": ["x"] * 5})
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=2)
    sources = [*image_sources([tmp_path / "a.tar"]), *image_sources([tmp_path / "c.parquet"], "image")]
    assert len(sources) == 10
    for source in sources:
        assert named_image(source.name) == source.content
    for name in ("x.png", "https://a/b.tar#c.png"):
        assert named_image(name) == name
    literal = tmp_path / "c.parquet#1"
    literal.write_bytes(b"a file of this name")
    assert named_image(str(literal)) == str(literal)
    for name, problem in (("a.tar#z.png", "no such member now"), ("c.parquet#5", "no such row now"),
                          ("d.tar#z.png", "No such file"), ("c.parquet#x", "invalid literal")):  # fmt: skip
        with pytest.raises(UnreadableImageError, match=f"{name}: .*{problem}"):
            named_image(str(tmp_path / name))
