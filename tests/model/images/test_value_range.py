"""Images and arrays of other value ranges than 8 bits: scaled from their own range, announced once, else refused."""

import io
import json
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_samples import MODES, WIDE_MODES, picture
from PIL import Image
from typer.testing import CliRunner

from siglip_model import AutoProcessor, SiglipImageProcessor, SiglipImageProcessorPil, pipeline
from siglip_model.cli.main import app
from siglip_model.demo import CHECKPOINT, PICTURES
from siglip_model.embed import load_embeddings
from siglip_model.images import value_range
from siglip_model.images.files import UnreadableImageError, load_image

PROCESSORS = [SiglipImageProcessorPil(do_resize=False), SiglipImageProcessor(do_resize=False)]
LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)  # a ramp from black to white
EXPECTED = (LEVELS / 127.5 - 1)[None].repeat(3, axis=0)


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    """Every test starts as a fresh process does, and hears no warning that it does not ask for."""
    value_range.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ramp(mode: str, white: float) -> Image.Image:
    """`LEVELS` in another mode, with the given value for white."""
    values = LEVELS * (white / 255)
    stored = {"F": "=f4", "I": "=i4", "I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    return Image.frombytes(mode, (16, 16), values.astype(stored).tobytes())


def tiff(values: bytes, size: tuple[int, int], *, bits: int, photometric: int = 1, signed: bool = False) -> io.BytesIO:
    """An uncompressed grey TIFF file; Pillow writes neither 12 bits nor signed samples."""
    entries = [
        *((256, 3, size[0]), (257, 3, size[1]), (258, 3, bits), (259, 3, 1), (262, 3, photometric)),
        *((273, 4, 8 + 2 + 12 * 9 + 4), (278, 3, size[1]), (279, 4, len(values)), (339, 3, 2 if signed else 1)),
    ]
    header = b"II*\0" + struct.pack("<IH", 8, len(entries))
    fields = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return io.BytesIO(header + fields + struct.pack("<I", 0) + values)


def pixels(image: Any, **options: Any) -> list[np.ndarray]:
    """The image's pixel values by both processors, as an object and, for a PIL image, through `load_image`."""
    sources = [image, load_image(image)] if isinstance(image, Image.Image) else [image]
    return [
        processor(source, return_tensors="np", **options).pixel_values[0]
        for processor in PROCESSORS
        for source in sources
    ]


class TestPillowModes:
    @pytest.mark.parametrize(
        ("mode", "white"),
        [*((mode, 65535) for mode in WIDE_MODES if mode != "F"), ("I", 255), ("F", 1), ("F", 255)],
    )
    def test_a_ramp_from_black_to_white(self, mode: str, white: float) -> None:
        for result in pixels(ramp(mode, white)):
            np.testing.assert_allclose(result, EXPECTED, atol=1e-6)
        for result in pixels(ramp(mode, white), do_convert_rgb=False, image_mean=0.5, image_std=0.5)[::2]:
            np.testing.assert_allclose(result, EXPECTED[:1], atol=1e-6)

    @pytest.mark.parametrize("mode", WIDE_MODES)
    def test_resized_like_the_same_image_in_8_bits(self, mode: str) -> None:
        image = picture(mode)
        scale = 255 if mode == "F" else 255 / 65535
        levels = Image.fromarray(np.rint(np.asarray(image) * scale).astype(np.uint8))
        for cls in (SiglipImageProcessorPil, SiglipImageProcessor):
            wide, narrow = (cls()(one, return_tensors="pt").pixel_values for one in (image, levels))
            assert torch.equal(wide, narrow)

    def test_values_between_levels_are_rounded(self) -> None:
        image = Image.fromarray(np.array([[0, 128, 129, 65407, 65406, 65535]], np.uint16))
        assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 0, 1, 255, 254, 255]

    @pytest.mark.parametrize("mode", MODES)
    def test_modes_of_8_bits_are_unchanged(self, mode: str) -> None:
        image = picture(mode)
        assert value_range.to_8_bits(image) is image

    def test_white_in_one_bit_without_conversion(self) -> None:
        image = Image.fromarray(LEVELS > 127)
        for processor in PROCESSORS:
            result = processor(image, do_convert_rgb=False, image_mean=0.5, image_std=0.5, return_tensors="np")
            assert np.array_equal(result.pixel_values[0, 0], np.where(LEVELS > 127, 1.0, -1.0))

    @pytest.mark.parametrize(
        ("mode", "values", "seen"),
        [
            ("F", [-0.5, 1.0], r"\[-0.5, 1.0\]"),
            ("F", [0.0, 255.5], r"\[0.0, 255.5\]"),
            ("F", [0.0, np.nan], r"nan"),
            ("F", [0.0, np.inf], r"inf"),
            ("I", [-1, 255], r"\[-1, 255\]"),
            ("I", [0, 65536], r"\[0, 65536\]"),
        ],
    )
    def test_unknown_ranges_are_refused(self, mode: str, values: list[float], seen: str, tmp_path: Path) -> None:
        Image.fromarray(np.array([values], np.float32 if mode == "F" else np.int32)).save(tmp_path / "x.tiff")
        with Image.open(tmp_path / "x.tiff") as opened:
            for attempt in (
                lambda: load_image(tmp_path / "x.tiff"),
                lambda: PROCESSORS[0](str(tmp_path / "x.tiff")),
                lambda: PROCESSORS[0](opened),
                lambda: PROCESSORS[1](opened, do_convert_rgb=False),
            ):
                with pytest.raises(
                    UnreadableImageError, match=rf"x\.tiff: mode {mode} .*{seen}.*supported: \[0, "
                ) as e:
                    attempt()
                assert isinstance(e.value, ValueError)


class TestFiles:
    @pytest.mark.parametrize("suffix", ["png", "tiff", "pgm", "jp2"])
    def test_sixteen_bits(self, suffix: str, tmp_path: Path) -> None:
        """Of any brightness: a dark 16-bit image is no 8-bit image."""
        for scale in (1, 1 / 257):
            values = np.rint(np.linspace(0, 65535, 4096).reshape(64, 64) * scale).astype(np.uint16)
            if suffix == "pgm":  # which older versions of Pillow do not write
                (tmp_path / "x.pgm").write_bytes(b"P5 64 64 65535\n" + values.astype(">u2").tobytes())
            else:
                Image.fromarray(values).save(tmp_path / f"x.{suffix}")
            expected = np.rint(values / 257)[:, :, None].repeat(3, axis=2)
            assert np.array_equal(np.asarray(load_image(tmp_path / f"x.{suffix}")), expected)
            for processor in PROCESSORS:
                with Image.open(tmp_path / f"x.{suffix}") as opened:
                    for source in (opened, str(tmp_path / f"x.{suffix}")):
                        result = processor(source, return_tensors="np").pixel_values[0]
                        np.testing.assert_allclose(result, np.moveaxis(expected, -1, 0) / 127.5 - 1, atol=1e-6)

    def test_an_older_pillow_opens_sixteen_bit_png_in_mode_i(self) -> None:
        image = Image.fromarray(np.array([[0, 200]], np.int32))
        image.format = "PNG"
        assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 1]

    def test_colour_of_sixteen_bits(self) -> None:
        """Pillow opens it in 8 bits, by the high byte."""
        values = np.array([[[0, 32768, 65535]]], "<u2")
        image = Image.frombytes("RGB", (1, 1), values.tobytes(), "raw", "RGB;16L")
        assert np.asarray(load_image(image)).tolist() == [[[0, 128, 255]]]

    def test_twelve_bits(self) -> None:
        with Image.open(tiff(bytes((0x00, 0x0F, 0xFF, 0x80, 0x00, 0x10)), (2, 2), bits=12)) as image:
            assert np.asarray(image).tolist() == [[0, 4095], [2048, 16]]
            assert np.asarray(load_image(image))[:, :, 0].tolist() == [[0, 255], [128, 1]]

    @pytest.mark.parametrize("turned", [False, True])
    def test_zero_is_white(self, turned: bool) -> None:
        values = np.array([[0, 65535, 257]], "<u2")
        with Image.open(tiff(values.tobytes(), (3, 1), bits=16, photometric=0)) as image:
            if turned:
                image.getexif()[0x0112] = 3
            levels = np.asarray(load_image(image))[0, :, 0].tolist()
        assert levels == ([254, 0, 255] if turned else [255, 0, 254])

    def test_signed_samples(self) -> None:
        for values, refused in (([0, 32767], False), ([-1, 5], True)):
            stored = np.array([values], "<i2").tobytes()
            with Image.open(tiff(stored, (2, 1), bits=16, signed=True)) as image:
                if refused:
                    with pytest.raises(UnreadableImageError, match="mode I"):
                        load_image(image)
                else:
                    assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 127]

    def test_transparency(self) -> None:
        """The one value that is transparent becomes white; its neighbours in the same level do not."""
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint16))
        image.info["transparency"] = 1  # as Pillow reads it from a PNG file
        for result in pixels(image):
            assert np.array_equal(result[:, 0], [[-1, 1, -1]] * 3)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation(self, orientation: int, tmp_path: Path) -> None:
        upright = []
        for image in (ramp("I;16", 65535), Image.fromarray(LEVELS)):
            exif = Image.Exif()
            exif[0x0112] = orientation
            image.save(tmp_path / "x.png", exif=exif)
            upright.append(np.asarray(load_image(tmp_path / "x.png")))
        assert np.array_equal(*upright)


class TestArrays:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("first", [True, False])
    def test_sixteen_bits(self, channels: int, first: bool) -> None:
        levels = np.random.default_rng(0).integers(0, 256, (channels, 9, 7) if first else (9, 7, channels))
        wide, narrow = (levels * 257).astype(np.uint16), levels.astype(np.uint8)
        for processor in (SiglipImageProcessorPil(), SiglipImageProcessor()):
            expected = processor(narrow, return_tensors="pt").pixel_values
            for array in (wide, wide.astype(">u2"), torch.from_numpy(wide), wide[None], [wide, torch.from_numpy(wide)]):
                result = processor(array, return_tensors="pt").pixel_values
                assert torch.equal(result, expected.expand_as(result))

    def test_the_input_is_not_changed(self) -> None:
        tensor = torch.full((3, 4, 4), 65535, dtype=torch.uint16)
        for processor in PROCESSORS:
            assert processor(tensor, return_tensors="pt").pixel_values.eq(1).all()
        assert tensor.to(torch.int32).eq(65535).all()

    def test_an_explicit_factor_is_taken_literally(self) -> None:
        array = np.full((3, 4, 4), 65535, np.uint16)
        for processor in PROCESSORS:
            result = processor(array, rescale_factor=1 / 65535, return_tensors="np").pixel_values
            np.testing.assert_allclose(result, 1, atol=1e-6)
            raw = processor(array, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
            assert (raw == 65535).all()

    def test_other_devices(self) -> None:
        for dtype in (torch.uint16, torch.float32, torch.bool):
            batch = PROCESSORS[1](torch.zeros(3, 4, 4, dtype=dtype, device="meta"), return_tensors="pt")
            assert batch.pixel_values.is_meta


class TestWarnings:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ramp("I;16", 65535), "mode I;16: .*0 .black. to 65535 .white."),
            (lambda: ramp("I", 65535), "mode I: .*65535"),
            (lambda: ramp("I", 255), "mode I: .*255"),
            (lambda: ramp("F", 1), "mode F: .*to 1 "),
            (lambda: ramp("F", 255), "mode F: .*255"),
            (lambda: np.zeros((3, 4, 4), np.uint16), "dtype uint16: .*65535"),
            (lambda: torch.zeros(3, 4, 4, dtype=torch.uint16), "dtype uint16: .*65535"),
            (lambda: np.ones((3, 4, 4), bool), "dtype bool"),
            (lambda: np.full((3, 4, 4), 0.5), "dtype float64: .*do_rescale=False"),
            (lambda: torch.full((3, 4, 4), 0.5, dtype=torch.bfloat16), "dtype bfloat16: .*do_rescale=False"),
            (lambda: np.full((3, 4, 4), -0.5, np.float32), r"dtype float32: .*outside \[0, 255\]"),
            (lambda: np.full((3, 4, 4), np.nan, np.float32), "dtype float32: .*not finite"),
            (lambda: np.full((3, 4, 4), 256), r"dtype int64: .*outside \[0, 255\]"),
        ],
    )
    def test_each_kind_is_said_once(self, make: Any, message: str) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                for processor in PROCESSORS:
                    processor([make(), make()])
        assert len(said) == 1 and re.search(message, str(said[0].message))

    def test_levels_are_silent(self) -> None:
        silent = [picture(mode) for mode in MODES if mode != "1"]
        silent += [np.full((3, 4, 4), 200, np.uint8), np.full((3, 4, 4), 200), np.full((3, 4, 4), 200.5)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for processor in PROCESSORS:
                processor(silent)
                processor(np.full((3, 4, 4), 0.5), do_rescale=False)


class TestEveryWayIn:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """The same picture in 8 bits, 16 bits and floating point, and one whose range is unknown."""
        with Image.open(PICTURES / "rocket.png") as opened:
            grey = opened.convert("L")
        levels = np.asarray(grey)
        grey.save(tmp_path / "8.png")
        Image.fromarray(levels * np.uint16(257)).save(tmp_path / "16.png")
        Image.fromarray(levels / np.float32(255)).save(tmp_path / "unit.tiff")
        Image.fromarray(levels.astype(np.float32)).save(tmp_path / "levels.tiff")
        Image.fromarray(levels * np.int32(257)).save(tmp_path / "integers.tiff")
        return tmp_path

    NAMES = ("8.png", "16.png", "unit.tiff", "levels.tiff", "integers.tiff")

    def test_processor_and_pipeline(self, folder: Path) -> None:
        processor, classify = AutoProcessor.from_pretrained(CHECKPOINT), pipeline(model=CHECKPOINT, device="cpu")
        first, *others = (processor(images=str(folder / name), return_tensors="pt").pixel_values for name in self.NAMES)
        assert all(torch.equal(first, other) for other in others)
        paths = [str(folder / name) for name in self.NAMES]
        for sources in (paths, [Image.open(path) for path in paths]):
            first, *others = classify(sources, candidate_labels=["rocket", "cat face"])
            assert all(first == other for other in others)

    def test_commands(self, folder: Path) -> None:
        Image.fromarray(np.array([[0.0, 1000.0]], np.float32)).save(folder / "unknown.tiff")
        (folder / "again.png").write_bytes((folder / "16.png").read_bytes())
        with Image.open(folder / "16.png") as opened:
            mode_of_png = opened.mode  # I;16, or I before Pillow 10.3
        out = folder / "embeddings.safetensors"
        for arguments in (["classify", "--labels", "rocket", "cat face", "--json"], ["embed", "--out", str(out)]):
            value_range.warn_once.cache_clear()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                run = CliRunner().invoke(app, [arguments[0], str(folder), "--device", "cpu", *arguments[1:]])
            assert run.exit_code == 1, run.stderr
            assert "unknown.tiff: mode F with values of [0.0, 1000.0]; supported: [0, 1] or [0, 255]" in run.stderr
            modes = [re.findall("mode (.*):.*to (.*) ", str(warning.message))[0] for warning in said]
            assert sorted(modes) == sorted({("F", "1"), ("F", "255"), ("I", "65535"), (mode_of_png, "65535")})
            if arguments[0] == "classify":
                results = {Path(entry["image"]).name: entry for entry in json.loads(run.stdout)}
                scores = torch.tensor([[each["score"] for each in results[name]["predictions"]] for name in self.NAMES])
                torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=1e-5, atol=0)
        loaded = load_embeddings(out)
        rows = dict(zip((Path(name).name for name in loaded.files), loaded.embeddings, strict=True))
        for name in self.NAMES:
            torch.testing.assert_close(rows["8.png"], rows[name], rtol=0, atol=1e-6)
