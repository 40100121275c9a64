"""Embeddings written as parquet: read by pyarrow alone, resumed, and refused when damaged."""

import json
import os

import pytest
import torch
from colour_embedder import WIDTH, embed_colours
from embedding_files import write_rows
from PIL import Image

from siglip_model.embed import EmbeddingFileError, load_embeddings
from siglip_model.embed import parquet as embed_parquet
from siglip_model.retrieval import Collection

pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [1, 3, 100])
def test_it_holds_what_the_safetensors_file_holds(folder, tmp_path, dtype, group, monkeypatch):
    monkeypatch.setattr(embed_parquet, "GROUP_BYTES", group * WIDTH * dtype.itemsize)
    out = tmp_path / "out.parquet"
    summary = embed_colours([folder], out, dtype=dtype)
    assert (summary.rows, summary.failed, summary.written) == (8, 1, True)
    embed_colours([folder], tmp_path / "out.safetensors", dtype=dtype)
    one, other = load_embeddings(out), load_embeddings(tmp_path / "out.safetensors")
    assert torch.equal(one.embeddings, other.embeddings) and one.embeddings.dtype == dtype
    assert (one.files, one.failed, one.settings) == (other.files, other.failed, other.settings)
    table = parquet.read_table(out)
    assert table.column_names == ["id", "path", "stamp", "embedding"]
    assert table["id"].to_pylist() == list(range(8)) and table["path"].to_pylist() == one.files
    assert table["embedding"].type.list_size == WIDTH
    assert table["embedding"].to_pylist() == one.embeddings.tolist()
    assert parquet.ParquetFile(out).num_row_groups == -(-8 // group)
    with Collection(out) as stored:
        assert stored.names([7, 0, 4]) == {row: one.files[row] for row in (0, 4, 7)}
        assert torch.equal(stored.rows([4]), one.embeddings[4:5].float())


def test_it_is_resumed_and_grows(folder, tmp_path):
    out = tmp_path / "out.parquet"
    embed_colours([folder], out)
    before = out.read_bytes()
    assert embed_colours([folder], out).skipped == 8 and out.read_bytes() == before
    Image.new("RGB", (1, 1), (9, 9, 9)).save(folder / "3.png")
    summary = embed_colours([folder], out)
    assert (summary.embedded, summary.rows) == (1, 9)
    assert load_embeddings(out).files[-1] == str(folder / "3.png") and load_embeddings(out).failed == {}
    with pytest.raises(EmbeddingFileError, match="normalize was true and is now false"):
        embed_colours([folder], out, normalize=False)


def test_shards_are_parquet_too(folder, tmp_path):
    out = tmp_path / "out.parquet"
    embed_colours([folder], out, shards=2)
    assert {path.suffix for path in tmp_path.glob("out-*")} == {".parquet"}
    with Collection(out) as stored:
        assert len(stored) == 8


def test_what_parquet_cannot_hold_is_named(folder, tmp_path):
    out = tmp_path / "out.parquet"
    with pytest.raises(EmbeddingFileError, match="parquet has no bfloat16"):
        embed_colours([folder], out, dtype=torch.bfloat16)
    name = os.fsdecode(os.fsencode(folder) + b"/\xff.png")
    Image.new("RGB", (1, 1)).save(name)
    assert embed_colours([folder], out).rows == 8, "the run goes on"
    assert (
        "not valid Unicode, which parquet requires; rename it" in load_embeddings(out).failed[f"{folder}/\\udcff.png"]
    )
    out.unlink()
    with pytest.raises(EmbeddingFileError, match="is not valid Unicode, which parquet requires"):
        write_rows(out, torch.ones(1, 4), names=[name])
    assert not out.exists()


def test_damaged_and_other_files_are_refused(folder, tmp_path):
    out = tmp_path / "out.parquet"
    embed_colours([folder], out)
    whole = out.read_bytes()
    table, stored = parquet.read_table(out), parquet.read_metadata(out).metadata
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        out.write_bytes(whole[:size])
        with pytest.raises(EmbeddingFileError, match="is not a whole parquet file"):
            load_embeddings(out)
        with pytest.raises(EmbeddingFileError, match="is not a whole parquet file .*it was not changed"):
            embed_colours([folder], out)
        assert out.read_bytes() == whole[:size]
    parquet.write_table(pyarrow.table({"a": [1]}), out)
    with pytest.raises(EmbeddingFileError, match="was not written by `siglip embed`"):
        load_embeddings(out)
    content = json.loads(stored[b"siglip"])
    for change, message in (
        ({"settings": {**content["settings"], "width": "5"}}, "is damaged: its columns are"),
        ({"settings": {**content["settings"], "dtype": "BF16"}}, "in its header `dtype` is BF16"),
        ({"settings": {**content["settings"], "producer": "x"}}, "was not written by"),
        ({"failed": [["x"]]}, "among its failures"),
    ):
        damaged = table.replace_schema_metadata({b"siglip": json.dumps({**content, **change})})
        parquet.write_table(damaged, out)
        with pytest.raises(EmbeddingFileError, match=message):
            load_embeddings(out)
    values = table["embedding"].combine_chunks().flatten().to_numpy().copy()
    values[5] = float("nan")
    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), type=table.schema.field("embedding").type)
    damaged = table.set_column(3, table.schema.field("embedding"), rows).replace_schema_metadata(stored)
    parquet.write_table(damaged, out)
    with pytest.raises(EmbeddingFileError, match=r"the row of .*1.png is not finite"):
        load_embeddings(out)
