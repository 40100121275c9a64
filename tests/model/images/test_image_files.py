"""Listing image files: selection, order, links, and one walk per command."""

import os
import socket
from contextlib import closing

import numpy as np
import pytest
from PIL import Image, ImageOps

from siglip_model.images import files as image_files
from siglip_model.images.files import ImageList, UnreadableImageError, list_images, load_image


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


def reason(path):
    """Why an image cannot be opened; "" if it can."""
    try:
        load_image(path)
    except UnreadableImageError as error:
        assert str(error).startswith(f"{path}: ")
        return str(error).removeprefix(f"{path}: ")
    return ""


def test_each_broken_entry_is_listed_for_itself_and_says_why(tmp_path, monkeypatch):
    folder = tmp_path / "all"
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    (folder / "shut").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "good.png")
    Image.new("RGB", (4, 4)).save(folder / "a" / "good.png")
    Image.new("RGB", (4, 4)).save(os.path.join(os.fsencode(folder), b"z\xff.png"), "PNG")
    (folder / "itself").symlink_to("itself")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "ping").symlink_to("pong")
    (folder / "pong").symlink_to("ping")
    (folder / "gone").symlink_to("nowhere")
    (folder / "a" / "to_b").symlink_to("../b")
    (folder / "b" / "to_a").symlink_to("../a")
    (folder / "up").symlink_to("..")
    (folder / "notes.txt").touch()
    os.mkfifo(folder / "fifo.png")
    os.mkfifo(folder / "fifo")  # neither a folder nor an image by name
    monkeypatch.chdir(folder)  # a socket's address is short
    scandir = os.scandir

    def scan(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(image_files.os, "scandir", scan)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind("socket.png")
        found = {path.removeprefix(f"{folder}/"): reason(path) for path in list_images([folder])}
    loop = "Too many levels of symbolic links"
    assert found == {
        "a/good.png": "",
        "b/to_a/good.png": "",
        "fifo.png": "is a FIFO, not an image",
        "gone": "is a link to a file that does not exist",
        "good.png": "",
        "itself": loop,
        "itself.png": loop,
        "ping": loop,
        "pong": loop,
        "shut": "is a folder that cannot be read (Permission denied)",
        "socket.png": "is a socket, not an image",
        os.fsdecode(b"z\xff.png"): "",
    }


def test_folders_that_link_to_each_other_are_walked_in_bounded_time(tmp_path):
    """Twelve folders, each of which links to all others, have 12! paths."""
    folders = [tmp_path / f"{number:02}" for number in range(12)]
    for folder in folders:
        folder.mkdir()
        (folder / "x.png").touch()
    for folder in folders:
        for other in folders:
            (folder / f"to_{other.name}").symlink_to(other)
    found = list(list_images([tmp_path]))
    assert {os.path.realpath(path) for path in found} == {str(folder / "x.png") for folder in folders}
    assert len(found) <= 2 * len(folders)


def test_folders_deeper_than_python_recurses_are_walked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    open("x.png", "w").close()
    (path,) = list_images([tmp_path])
    assert path == f"{tmp_path}/{'d/' * 1200}x.png"
    os.unlink("x.png")
    for _ in range(1200):  # pytest's own removal recurses
        os.chdir("..")
        os.rmdir("d")


def test_a_file_that_vanishes_after_it_was_listed(tmp_path):
    for name in ("0.png", "1.png", "2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    with closing(ImageList([tmp_path])) as images:
        (tmp_path / "1.png").unlink()
        assert [reason(path)[:12] for path in images] == ["", "no such file", ""]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "MPO"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_is_turned_upright_once_however_often_it_is_loaded(tmp_path, kind, mode):
    if kind == "AVIF" and kind not in image_files._formats():
        pytest.skip("this Pillow reads no AVIF")
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(levels).convert(mode).save(tmp_path / "x", kind, exif=exif)
        # Pillow maps an uncompressed TIFF file given by name into memory, and then turns it wrongly.
        with open(tmp_path / "x", "rb") as file, Image.open(file) as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
            assert np.array_equal(load_image(opened), expected)
        once = load_image(tmp_path / "x")
        assert np.array_equal(once, expected) and np.array_equal(load_image(once), expected)
