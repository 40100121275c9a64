"""Exact search equals a comparison with every row in fp64, whatever the blocks, and keeps the order of equal rows."""

import sys

import pytest
import torch
from embedding_files import write_rows

from bench.measure.timing import forget_peak, peak_resident_bytes
from siglip_model.embed import EmbeddingFileError
from siglip_model.retrieval import Collection, collection, nearest


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_brute_force(queries, rows, top):
    cosines = torch.nn.functional.cosine_similarity(queries.double()[:, None], rows.double()[None], dim=-1)
    return cosines.sort(dim=1, descending=True, stable=True).indices[:, :top], cosines


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "block", "top"), [(1000, 64, 10), (37, 1000, 37), (5, 2, 10), (100, 7, 1)])
def test_equals_brute_force(rows, block, top, dtype):
    stored = (3 * draw(rows, 48)).to(dtype)  # not of unit length
    queries = torch.nn.functional.normalize(draw(6, 48, seed=1), dim=-1)
    found, places = nearest(queries, stored.split(block), top)
    expected, cosines = by_brute_force(queries, stored, top)
    assert torch.equal(places, expected)
    assert places.shape == (6, min(rows, top))
    assert (found - cosines.gather(1, places)).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_equal_cosines_keep_the_order_of_the_rows():
    row = torch.nn.functional.normalize(draw(1, 8), dim=-1)
    stored = torch.cat([-row, row.expand(50, -1), draw(3, 8, seed=2), row.expand(20, -1)])
    _, places = nearest(row, stored.split(16), 60)
    assert places[0].tolist() == [*range(1, 51), *range(54, 64)]


def test_rows_of_zeros_and_rows_that_are_nearly_so_have_cosine_zero():
    rows = draw(4, 8)
    rows[1], rows[2] = 0, rows[2] * 1e-30
    cosines, places = nearest(torch.nn.functional.normalize(draw(1, 8, seed=1), dim=-1), [rows], 4)
    by_row = dict(zip(places[0].tolist(), cosines[0].tolist(), strict=True))
    assert by_row[1] == 0 and abs(by_row[2]) < 1e-6 and max(map(abs, by_row.values())) <= 1


def test_no_row_and_no_query():
    cosines, places = nearest(draw(3, 8), [], 5)
    assert cosines.shape == places.shape == (3, 0)
    cosines, places = nearest(draw(0, 8), [draw(4, 8)], 5)
    assert cosines.shape == places.shape == (0, 4)


def test_a_collection_numbers_the_rows_of_its_files_through(tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "BLOCK_BYTES", 700)
    monkeypatch.setattr(collection, "QUERIES_AT_ONCE", 2)
    rows = draw(61, 16)
    names = [f"/ü\n/{number}.png" for number in range(61)]
    parts = {"a": slice(0, 20), "empty": slice(0, 0), "b": slice(20, 61)}
    files = [tmp_path / f"{name}.safetensors" for name in parts]
    for file, part in zip(files, parts.values(), strict=True):
        if part.stop:
            write_rows(file, rows[part], names=names[part])
    queries = torch.nn.functional.normalize(draw(5, 16, seed=3), dim=-1)
    with Collection([files[0], files[2]]) as stored:
        assert len(stored) == 61
        found = stored.nearest(queries, 7)
        expected, _ = by_brute_force(queries, rows, 7)
        assert [[row for _, row in query] for query in found] == expected.tolist()
        assert stored.names(expected.flatten().tolist()) == {row: names[row] for row in expected.flatten().tolist()}
        assert torch.equal(stored.rows([60, 3, 20]), rows[[60, 3, 20]])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    rows = torch.ones(1, 4096).expand(2**13, -1)  # 128 MiB
    with Collection(write_rows(tmp_path / "x.safetensors", rows)) as stored:
        nearest(draw(1, 4096), [rows[:1024].contiguous()], 3)  # loads libraries
        forget_peak()
        before = peak_resident_bytes()
        stored.nearest(draw(1, 4096), 3)
        assert peak_resident_bytes() - before < 4 * collection.BLOCK_BYTES


def test_a_folder_stands_for_its_embedding_files(tmp_path):
    for name in ("b", "a", ".hidden"):
        write_rows(tmp_path / f"{name}.safetensors", draw(3, 8))
    (tmp_path / "notes.txt").touch()
    with Collection(tmp_path) as stored:
        assert [file.path.name for file in stored.files] == ["a.safetensors", "b.safetensors"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmbeddingFileError, match="empty is a folder without a file that ends in .safetensors"):
        Collection(tmp_path / "empty")


def test_files_of_other_models_and_damaged_rows_are_named(tmp_path):
    one = write_rows(tmp_path / "one.safetensors", draw(4, 8), model_name="google/a")
    two = write_rows(tmp_path / "two.safetensors", draw(4, 8), model="two", model_name="google/b")
    with pytest.raises(EmbeddingFileError, match="two.safetensors was made with google/b .*one.safetensors.*google/a"):
        Collection([one, two])
    with pytest.raises(ValueError, match="files is empty"):
        Collection([])
    rows = draw(4, 8)
    rows[2, 3] = float("nan")
    damaged = write_rows(tmp_path / "damaged.safetensors", rows)
    with Collection(damaged) as stored, pytest.raises(EmbeddingFileError, match="damaged.safetensors: row 2 is not"):
        stored.nearest(draw(1, 8), 2)
