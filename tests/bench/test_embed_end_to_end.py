"""Bulk embedding beside transformers with a DataLoader: rows agree, and a row of numbers is printed."""

import argparse
import json

import pytest

from bench import embed


@pytest.mark.thorough
def test_a_row_with_both_contenders(capsys):
    pytest.importorskip("transformers")
    small = ["--images", "5", "--size", "64x48", "--layers", "1", "--batch-size", "2", "--workers", "1"]
    assert embed.main([*small, "--device", "cpu", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["difference"] < 1e-5 and row["images"] == 5 and row["bound_by"]
    rates = row["images_per_second"]
    assert row["speed_up"] == rates["siglip_model"] / rates["transformers"]
    assert abs(sum(row["shares"].values()) - 1) < 1e-6 and row["environment"]["torch"]


def test_sizes_and_photos(tmp_path):
    from PIL import Image

    assert embed._size("768x512") == (768, 512)
    for text in ("768", "axb", "8x512"):
        with pytest.raises(argparse.ArgumentTypeError):
            embed._size(text)
    paths = embed.write_photos(tmp_path, 2, 96, 64)
    with Image.open(paths[0]) as one, Image.open(paths[1]) as other:
        assert one.size == (96, 64) and one.format == "JPEG" and one.tobytes() != other.tobytes()
