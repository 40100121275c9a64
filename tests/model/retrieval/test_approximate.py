"""The index beside a file: its recall, its exact cosines, damage, and that it is built again when the file changes."""

import os

import pytest
import torch
from embedding_files import write_rows

from siglip_model.embed import EmbeddingFileError
from siglip_model.embed.file import Content, write_safetensors
from siglip_model.retrieval import ApproximateIndex, Collection
from siglip_model.retrieval.approximate import DIGEST_BYTES, HEADER_BYTES, VALUE_BYTES, VERSION, recall

pytest.importorskip("usearch", reason="the extra `search` is not installed")


def draw(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_recall_and_exact_cosines(tmp_path, capsys):
    files = [
        write_rows(tmp_path / f"{seed}.safetensors", draw(rows, 32, seed=seed)) for seed, rows in enumerate((1500, 700))
    ]
    queries = draw(16, 32, seed=9)
    with Collection(files) as stored:
        exact = stored.nearest(queries, 10)
        found = ApproximateIndex(stored).nearest(queries, 10)
    share = recall(found, exact)
    print(f"recall@10 of usearch over 2,200 random rows of width 32: {share:.3f}")
    assert share > 0.9
    for some, every in zip(found, exact, strict=True):
        assert some == sorted(some, key=lambda pair: -pair[0]) and len(some) == 10
        cosines = {row: cosine for cosine, row in every}
        for cosine, row in some:
            if row in cosines:
                assert abs(cosine - cosines[row]) < 1e-6


def test_recall_counts_rows():
    exact = [[(0.9, 1), (0.8, 2)], [(0.7, 3), (0.6, 4)]]
    assert recall([[(0.9, 1), (0.8, 5)], [(0.6, 4), (0.7, 3)]], exact) == 0.75
    assert recall([[]], [[]]) == 1.0


def test_an_index_is_used_again_until_its_file_changes(tmp_path):
    file = write_rows(tmp_path / "x.safetensors", draw(50, 8))
    built = []
    with Collection(file) as stored:
        (path,) = ApproximateIndex(stored, built.append).paths
    assert built == [path] and path.parent == tmp_path
    with Collection(file) as stored:
        assert ApproximateIndex(stored, built.append).paths == [path] and built == [path]
    other = tmp_path / "x.safetensors.backup.usearch"
    other.write_text("not ours")
    write_rows(file, draw(80, 8, seed=1), names=[f"/more/{number}.png" for number in range(80)])
    with Collection(file) as stored:
        (later,) = ApproximateIndex(stored, built.append).paths
        exact = stored.nearest(draw(3, 8, seed=2), 5)
        assert recall(ApproximateIndex(stored).nearest(draw(3, 8, seed=2), 5), exact) > 0.9
    assert built == [path, later] and later != path
    assert sorted(name for name in os.listdir(tmp_path) if name.endswith(".usearch")) == sorted(
        [later.name, other.name]
    )


def test_a_damaged_index_is_named(tmp_path):
    file = write_rows(tmp_path / "x.safetensors", draw(50, 8))
    with Collection(file) as stored:
        (path,) = ApproximateIndex(stored).paths
        path.write_bytes(b"junk" * 100)
        with pytest.raises(EmbeddingFileError, match=r"usearch is not a usable index of .*delete it to build it again"):
            ApproximateIndex(stored)


def test_an_index_of_an_older_version_is_named_so(tmp_path):
    file = write_rows(tmp_path / "x.safetensors", draw(50, 8))
    with Collection(file) as stored:
        (path,) = ApproximateIndex(stored).paths
        content = path.read_bytes()
        end = len(content) - len(VERSION) - DIGEST_BYTES
        for older in (content[:end], content[:end] + content[-DIGEST_BYTES:]):
            path.write_bytes(older)
            with pytest.raises(EmbeddingFileError, match=r"built by an older version.*; delete it to build it again"):
                ApproximateIndex(stored)


def test_a_changed_bit_of_the_graph_is_found_and_one_of_a_row_costs_recall_at_most(tmp_path):
    """usearch follows the graph unchecked, out of its memory."""
    file = write_rows(tmp_path / "x.safetensors", draw(50, 8))
    with Collection(file) as stored:
        (path,) = ApproximateIndex(stored).paths
        whole, graph = path.read_bytes(), HEADER_BYTES + 50 * 8 * VALUE_BYTES
        places = (0, graph, graph + 100, (graph + len(whole)) // 2, len(whole) - len(VERSION) - DIGEST_BYTES - 1)
        for place in (*places, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
            with pytest.raises(EmbeddingFileError, match="its graph is damaged"):
                ApproximateIndex(stored)
        nan = b"\xff\x7f" * 8 * 10
        path.write_bytes(whole[:HEADER_BYTES] + nan + whole[HEADER_BYTES + len(nan) :])
        exact = stored.nearest(draw(3, 8, seed=2), 5)
        assert recall(ApproximateIndex(stored).nearest(draw(3, 8, seed=2), 5), exact) > 0.3


def test_rows_that_are_not_finite_and_files_without_rows(tmp_path):
    rows = draw(5, 8)
    rows[3, 1] = float("inf")
    with (
        Collection(write_rows(tmp_path / "x.safetensors", rows)) as stored,
        pytest.raises(EmbeddingFileError, match="x.safetensors is damaged: row 3 is not finite"),
    ):
        ApproximateIndex(stored)
    assert not list(tmp_path.glob("*.usearch"))
    metadata = {"producer": "siglip embed", "dtype": "F32", "width": "8", "complete": "true"}
    with open(tmp_path / "empty.safetensors", "wb") as empty:
        write_safetensors(empty, Content(metadata, 0, lambda: iter(()), lambda: iter(()), lambda: iter(())))
    with Collection(tmp_path / "empty.safetensors") as stored:
        assert ApproximateIndex(stored).nearest(draw(2, 8), 5) == stored.nearest(draw(2, 8), 5) == [[], []]
