"""Listing image files: selection, order, links, and one walk per command."""

import os

import pytest

from siglip_model.images import files as image_files
from siglip_model.images.files import ImageList, list_images


def test_folders_are_listed_in_order_following_links_without_cycles(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("z.PNG", "a.jpg", "b/deep/x y.webp", "b/ü\n.gif", "notes.txt", ".c.png", ".hidden/d.png", "no_suffix"):
        (tmp_path / name).touch()
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    (tmp_path / "c.png").symlink_to(tmp_path / "gone")
    elsewhere = tmp_path.with_name(tmp_path.name + "_elsewhere")
    elsewhere.mkdir()
    (elsewhere / "far.tiff").touch()
    (tmp_path / "link").symlink_to(elsewhere)
    names = [path.removeprefix(f"{tmp_path}/") for path in list_images([tmp_path])]
    assert names == ["a.jpg", "b/deep/x y.webp", "b/ü\n.gif", "c.png", "link/far.tiff", "z.PNG"]
    assert list(list_images(["https://x.org/a.png", str(tmp_path / "notes.txt")])) == [
        "https://x.org/a.png",
        str(tmp_path / "notes.txt"),
    ]


@pytest.mark.parametrize("in_memory", [0, 10, 2**24])
def test_an_image_list_walks_each_folder_once(tmp_path, monkeypatch, in_memory):
    """Its length and every pass come from one walk, whether the list is in memory or on disk."""
    (tmp_path / "below").mkdir()
    names = ["a.png", "below/new\nline.png", os.fsdecode(b"below/\xff.png"), "below/\u00fc.jpg"]
    for name in names:
        try:
            (tmp_path / name).touch()
        except OSError:
            pytest.skip("this file system only takes Unicode names")
    monkeypatch.setattr(image_files, "LISTED_IN_MEMORY", in_memory)
    walked = []
    scandir = os.scandir
    monkeypatch.setattr(image_files.os, "scandir", lambda folder: walked.append(folder) or scandir(folder))
    images = ImageList([str(tmp_path), "https://x.org/a.png"])
    expected = [*(str(tmp_path / name) for name in sorted(names)), "https://x.org/a.png"]
    assert len(images) == 5 and list(images) == expected and list(images) == expected
    assert walked == [str(tmp_path), str(tmp_path / "below")]
    images.close()
