"""Limits on decoded pixels, per image and in flight, on kinds of files, and on downloads."""

import base64
import gc
import http.server
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
import zlib
from contextlib import closing, contextmanager, suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from siglip_model.images import files as image_files
from siglip_model.images.batches import Batch, Failure, read_batches
from siglip_model.images.files import UnreadableImageError, load_image, open_image
from siglip_model.images.limits import MAX_PIXELS, PixelBudget


def encoded(image, kind, **options):
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def png(width, height, rows=0):
    """A black PNG file of 1 bit per pixel that holds the first rows alone."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(rows * ((width + 7) // 8 + 1)), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiled_tiff(width, height, tile_width, tile_height):
    """A grey TIFF file of one tile."""
    data = zlib.compress(bytes(tile_width * tile_height))
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile_width, 323: tile_height}
    tags |= {324: 8 + 2 + 12 * 10 + 4, 325: len(data)}  # where the tile is, after header and directory, and its length
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM", "JPEG2000", "MPO", "TGA"])
def test_an_image_over_the_limit_is_refused_naming_file_size_limit_and_option(tmp_path, kind):
    if kind == "AVIF" and not image_files._formats().count("AVIF"):
        pytest.skip("this Pillow reads no AVIF")
    path = tmp_path / "large"
    frames = {"save_all": True, "append_images": [Image.new("L", (40, 30), 9)]} if kind in ("GIF", "MPO") else {}
    path.write_bytes(encoded(Image.new("RGB", (40, 30)), kind, **frames))
    times = {"WEBP": 2, "AVIF": 2, "JPEG2000": 3}.get(kind, 1)
    limit = times * 1200
    remark = f" of mode RGB in {kind}, which count {times} times," if times > 1 else ""
    refusal = f"40 x 30 pixels{remark} exceed the limit of {limit - 1:,}; raise it with --max-"
    for source in (str(path), base64.encodebytes(path.read_bytes()).decode()):
        with pytest.raises(UnreadableImageError, match=refusal):
            load_image(source, max_pixels=limit - 1)
    with pytest.raises(UnreadableImageError, match=f"^{path}: 40 x 30"):
        load_image(path, max_pixels=limit - 1)
    assert load_image(path, max_pixels=limit).size == (40, 30)


@pytest.mark.filterwarnings("ignore:Image size")
def test_the_default_limit_holds_before_and_after_pillows(tmp_path):
    for width, size in ((13_000, "13000 x 13000"), (40_000, "1,600,000,000")):
        path = tmp_path / f"{width}.png"
        path.write_bytes(png(width, width))
        with pytest.raises(UnreadableImageError, match=f"^{path}: {size} pixels exceed the limit of {MAX_PIXELS:,}"):
            load_image(path)


def test_a_limit_above_pillows_suspends_it_for_this_image(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = tmp_path / "x.png"
    path.write_bytes(encoded(Image.new("L", (40, 30)), "PNG"))
    with pytest.raises(UnreadableImageError, match="exceeds limit of 200 pixels"):  # as its user set it
        load_image(path)
    assert load_image(path, max_pixels=10**9).size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_sizes_that_the_header_does_not_tell_count_as_well(tmp_path):
    """An icon's directory and a tiled TIFF's header name fewer pixels than decoding takes."""
    icon = bytearray(encoded(Image.new("RGB", (16, 16)), "ICO"))
    inner = encoded(Image.new("RGB", (300, 300)), "PNG")
    icon[14:22] = struct.pack("<II", len(inner), 22)
    (tmp_path / "x.ico").write_bytes(bytes(icon[:22]) + inner)
    (tmp_path / "x.tif").write_bytes(tiled_tiff(16, 16, 256, 256))
    assert load_image(tmp_path / "x.tif").size == (16, 16)
    for name in ("x.ico", "x.tif"):
        with pytest.raises(UnreadableImageError, match="pixels exceed the limit of 20,000"):
            load_image(tmp_path / name, max_pixels=20_000)
    with PixelBudget(10**5) as budget, open_image(str(tmp_path / "x.ico"), None, budget) as icon_image:
        assert icon_image.size == (300, 300) and budget._room.value == 0


@pytest.mark.filterwarnings("ignore:images of mode")
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_count_twice(tmp_path, mode):
    Image.new(mode, (40, 30)).save(tmp_path / "x.tif")
    with pytest.raises(
        UnreadableImageError, match=f"40 x 30 pixels of mode {mode} in TIFF, which count 2 times, exceed"
    ):
        load_image(tmp_path / "x.tif", max_pixels=2399)
    assert load_image(tmp_path / "x.tif", max_pixels=2400).mode == "RGB"


PEAK = """
import sys
from siglip_model.images.files import load_image
from PIL import Image
Image.init()
def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1])
load_image(sys.argv[1])
before = peak()
load_image(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "1"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("TIFF", "F"), ("TIFF", "I"), ("TIFF", "CMYK"),
     ("WEBP", "RGB"), ("WEBP", "RGBA"), ("AVIF", "RGB"), ("JPEG2000", "RGB"), ("JPEG", "RGB"), ("GIF", "P")],
)  # fmt: skip
def test_no_kind_of_file_takes_more_than_eight_bytes_per_counted_pixel(tmp_path, kind, mode):
    if kind not in image_files._formats():
        pytest.skip(f"this Pillow reads no {kind}")
    image = Image.new(mode, (4000, 3000))
    if mode in ("RGBA", "RGB", "CMYK"):
        image.getexif()[0x0112] = 6
    slow = {"WEBP": {"lossless": True, "method": 0}, "AVIF": {"speed": 10}, "TIFF": {"compression": "tiff_deflate"}}
    options = {"exif": image.getexif()} if kind in ("PNG", "JPEG", "WEBP") and mode in ("RGB", "RGBA") else {}
    for name, size in (("small", (16, 16)), ("large", image.size)):
        image.resize(size).save(tmp_path / name, kind, **options, **slow.get(kind, {}))
    command = [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    with Image.open(tmp_path / "large") as opened:
        assert growth * 1024 < 8 * image_files._size_of(opened)[0] + 2**24


def test_pil_images_are_not_refused_and_nothing_is_copied_in_vain():
    image = Image.new("RGB", (40, 30))
    assert load_image(image, max_pixels=10) is image
    with PixelBudget(10) as budget:
        with open_image(image, None, budget) as opened:
            assert opened is image and budget._room.value == 0
        assert image.getpixel((0, 0)) == (0, 0, 0) and budget._room.value == 10  # it was not closed
        with open_image(image.convert("L"), None, budget) as opened:
            assert opened.mode == "RGB"
        with pytest.raises(ValueError):
            opened.load()


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "9"])
def test_limits_that_are_no_count_are_refused(value):
    with pytest.raises(ValueError, match="max_pixels is .*; supported: a whole number from 1"):
        PixelBudget(value)


@pytest.mark.parametrize("workers", [0, 1, 8])
@pytest.mark.parametrize("max_pixels", [100, 250, 10_000])
def test_pixels_in_flight_stay_below_the_limit_over_all_workers(workers, max_pixels):
    """Also where the limit is smaller than a batch, and where some workers fail."""
    budget, lock = PixelBudget(max_pixels), threading.Lock()
    in_flight, most = 0, 0

    def read(number):
        nonlocal in_flight, most
        with budget.reserve(100):
            with lock:
                in_flight += 100
                most = max(most, in_flight)
            time.sleep(0.002)
            with lock:
                in_flight -= 100
            if number % 5 == 0:
                raise OSError(str(number))
        return number

    with budget:
        outcomes = list(read_batches(range(40), read, batch_size=16, workers=workers))
    read_numbers = [item for outcome in outcomes if isinstance(outcome, Batch) for item in outcome.items]
    assert read_numbers == [number for number in range(40) if number % 5]
    assert sum(isinstance(outcome, Failure) for outcome in outcomes) == 8
    assert most <= max_pixels and budget._room.value == max_pixels
    if workers == 8:
        assert most > 100 or max_pixels < 200


def test_closing_ends_workers_that_wait_for_room():
    budget, decoded = PixelBudget(10), []

    def read(number):
        with budget.reserve(10):
            decoded.append(number)
            time.sleep(0.05)

    batches = read_batches(range(100), read, batch_size=1, workers=8)
    with pytest.raises(KeyboardInterrupt), closing(batches), budget:
        while not decoded:
            next(batches)
        raise KeyboardInterrupt
    done = len(decoded)
    for thread in threading.enumerate():
        if thread.name.startswith("read_ahead"):
            thread.join(timeout=10)
            assert not thread.is_alive()
    assert len(decoded) <= done + 1


def test_a_failed_image_is_not_kept_until_it_is_reported(tmp_path):
    (tmp_path / "broken.png").write_bytes(png(400, 400, rows=400)[:-24])
    seen = []

    def read(path):
        with Image.open(path) as image:
            seen.append(weakref.ref(image))
            image.load()

    (failure,) = read_batches([tmp_path / "broken.png"], read, batch_size=1, workers=1)
    assert isinstance(failure.error, OSError)
    gc.collect()
    assert seen[0]() is None


MEMORY = """
import sys, torch, numpy
from PIL import Image
from siglip_model.images.batches import read_batches
from siglip_model.images.files import open_image
from siglip_model.images.limits import PixelBudget
from siglip_model.images.tensor import SiglipImageProcessor
Image.init()
processor, budget = SiglipImageProcessor(size={"height": 64, "width": 64}), PixelBudget(int(sys.argv[1]))
def read(path):
    with open_image(path, None, budget) as image:
        return processor(images=[image], return_tensors="pt")["pixel_values"]
def peak():  # of this process; getrusage also counts what started it
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1])
before = peak()
count = sum(len(batch.values) for batch in read_batches(sys.argv[2:], read, batch_size=4, workers=8)
            if hasattr(batch, "values"))
print(count, peak() - before)
"""


def growth_of_memory(max_pixels, paths):
    """(images read, KiB by which the peak of resident memory grew) of eight workers in a new process."""
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(max_pixels), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    count, growth = map(int, done.stdout.split())
    return count, growth


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and malloc_trim are Linux's")
@pytest.mark.parametrize("rows", ["whole", "truncated"])
@pytest.mark.parametrize(
    ("width", "copies"), [(4200, 10), pytest.param(13_000, 9, marks=pytest.mark.thorough)], ids=["small", "large"]
)
def test_eight_workers_take_the_memory_of_one_large_image(tmp_path, width, copies, rows):
    """A bilevel image takes one byte per pixel where Pillow decodes it, and four more as RGB."""
    whole = rows == "whole"
    paths = [tmp_path / f"{number}.png" for number in range(copies)]
    content = png(width, width, rows=width)
    paths[0].write_bytes(content if whole else content[:-24])
    for path in paths[1:]:
        os.link(paths[0], path)
    count, growth = growth_of_memory(width * width, paths)
    assert count == (copies if whole else 0)
    assert growth * 1024 < 7 * width * width + 2**25


def test_what_is_no_file_is_refused_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "file").touch()
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(tmp_path)  # a socket's address is short
    with closing(listener):
        listener.bind("socket.png")
        for name, reason in [
            ("fifo.png", "is a FIFO, not an image"),
            ("socket.png", "is a socket, not an image"),
            ("/dev/zero", "is a device, not an image"),
            ("folder.png", "is a folder, not an image"),
            ("loop.png", "Too many levels of symbolic links"),
            ("dangling.png", "is a link to a file that does not exist"),
            ("gone.png", "no such file"),
            ("file/x.png", "no such file"),
            ("nul\0.png", "no such file"),
            (os.fsdecode(b"\xff.png"), "no such file"),
        ]:
            with pytest.raises(UnreadableImageError, match=reason):
                load_image(name)


def test_a_folder_without_permission_says_so(tmp_path, monkeypatch):
    """Whoever runs the tests may have every permission, so the system's answer is replaced."""
    path = str(tmp_path / "shut" / "x.png")
    status = os.stat

    def refuse(name, *arguments, **options):
        if name == path:
            raise PermissionError(13, "Permission denied", name)
        return status(name, *arguments, **options)

    monkeypatch.setattr(image_files.os, "stat", refuse)
    with pytest.raises(UnreadableImageError, match="Permission denied"):
        load_image(path)


def test_postscript_is_not_run(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n")
    with pytest.raises(UnreadableImageError, match="not an image, or in an unsupported format"):
        load_image(path)


def test_an_image_within_another_of_one_pixel_is_not_decoded(tmp_path):
    """Pillow opens an IPTC file as what it holds, whatever size it states."""
    inner = BytesIO()
    Image.new("1", (4000, 4000)).save(inner, "PNG")

    def field(record, dataset, content):
        return struct.pack(">BBBH", 0x1C, record, dataset, len(content)) + content

    headers = field(3, 60, b"\1\0") + field(3, 65, b"\1") + field(3, 20, b"\0\1") + field(3, 30, b"\0\1")
    path = tmp_path / "x.png"
    path.write_bytes(headers + field(3, 120, b"\5") + field(8, 10, inner.getvalue()))
    with pytest.raises(UnreadableImageError, match="not an image, or in an unsupported format"):
        load_image(path, max_pixels=2**20)


@contextmanager
def server(send):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                send(self.wfile.write)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/x.png"
        running.shutdown()


def test_downloads_are_limited_in_size_and_time(monkeypatch):
    monkeypatch.setattr(image_files, "DOWNLOAD_BYTES", 2**20)
    content = encoded(Image.new("RGB", (40, 30), "red"), "PNG")
    with server(lambda write: write(content)) as url:
        assert np.array_equal(load_image(url, timeout=10), Image.new("RGB", (40, 30), "red"))
        with pytest.raises(UnreadableImageError, match=f"^{url}: 40 x 30 pixels exceed"):
            load_image(url, timeout=10, max_pixels=99)
    endless = server(lambda write: [write(bytes(2**16)) for _ in range(100)])
    with endless as url, pytest.raises(UnreadableImageError, match=f"^{url}: is larger than 1 MiB"):
        load_image(url, timeout=10)

    def drip(write):
        for byte in content:
            write(bytes([byte]))
            time.sleep(0.05)

    with server(drip) as url, pytest.raises(UnreadableImageError, match=f"^{url}: the download was not complete"):
        load_image(url, timeout=0.3)
    with server(lambda write: time.sleep(2)) as url, pytest.raises(UnreadableImageError, match=f"^{url}: .*timed out"):
        load_image(url, timeout=0.2)
