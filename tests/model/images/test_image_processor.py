"""Bit for bit what transformers' Pillow-based processor computes; the tensor path within its stated tolerance of it."""

import base64
import io
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from siglip_model.batch import BatchFeature
from siglip_model.images.auto import load_image_processor
from siglip_model.images.fast import SiglipImageProcessorFast
from siglip_model.images.pillow import SiglipImageProcessor
from siglip_model.images.processor import ImageProcessor

SIZE = {"height": 24, "width": 20}
NEW_ENOUGH = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Any:
    """transformers warns of shapes in which either dimension could hold channels."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(mode: str, size: tuple[int, int] = (31, 17)) -> Image.Image:
    """An image of any mode, alpha and all; "P+" and the like have transparency in their info instead."""
    width, height = size
    colour = Image.fromarray(noise(height, width, 4), "RGBA")
    if mode == "I;16":
        return Image.fromarray(np.random.default_rng(1).integers(0, 65536, (height, width)).astype(np.uint16))
    if mode == "I":
        return Image.fromarray(np.random.default_rng(1).integers(-300, 70_000, (height, width)).astype(np.int32))
    if mode == "F":
        return Image.fromarray((np.random.default_rng(1).random((height, width)) * 400 - 60).astype(np.float32))
    if mode in ("P", "PA", "P+index", "P+bytes"):
        palette = colour.convert("RGB").convert("P")
        if mode == "P+index":
            palette.info["transparency"] = palette.getpixel((0, 0))
        if mode == "P+bytes":
            palette.info["transparency"] = bytes(noise(256))
        return palette.convert("PA") if mode == "PA" else palette
    if mode in ("RGB+", "L+"):
        opaque = colour.convert(mode[:-1])
        opaque.info["transparency"] = opaque.getpixel((0, 0))
        return opaque
    if mode in ("RGBA", "LA", "RGBa"):
        return colour.convert(mode)
    return colour.convert("RGB").convert(mode)


MODES = ["1", "L", "L+", "LA", "P", "P+index", "P+bytes", "PA", "RGB", "RGB+", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
         "HSV", "LAB", "I;16", "I", "F"]  # fmt: skip


def assert_equal(images: Any, make: Any = None, **options: Any) -> None:
    """The same kind, dtype, shape and bits."""
    if not NEW_ENOUGH:
        pytest.skip("transformers before 5.23 treats alpha and single channels otherwise")
    make = make or {"size": SIZE}
    ours, theirs = SiglipImageProcessor(**make), SiglipImageProcessorPil(**make)
    got, expected = (processor(images, **options)["pixel_values"] for processor in (ours, theirs))
    assert type(got) is type(expected) and len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


class TestPillowModes:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_mode(self, mode: str) -> None:
        for size in ((31, 17), (1, 1), (2, 40)):
            image = picture(mode, size)
            assert_equal(image, return_tensors="pt")
            assert_equal(image, do_resize=False, return_tensors="np")
            assert_equal(image, do_convert_rgb=False, do_normalize=False, do_resize=mode not in ("I;16", "I", "F"))

    def test_premultiplied_grey_is_refused(self) -> None:
        for processor in (SiglipImageProcessor(), SiglipImageProcessorPil(), SiglipImageProcessorFast()):
            with pytest.raises(ValueError, match="La"):
                processor(picture("LA").convert("La"))

    def test_orientation_is_left_alone(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        picture("RGB").save(tmp_path / "turned.jpg", exif=exif)
        with Image.open(tmp_path / "turned.jpg") as image:
            assert_equal(image, do_resize=False)
        assert_equal(str(tmp_path / "turned.jpg"), do_resize=False)  # but what is loaded by name is turned, as there
        upright = SiglipImageProcessor(do_resize=False)(tmp_path / "turned.jpg")["pixel_values"][0]
        assert upright.shape == (3, 31, 17)

    @pytest.mark.parametrize("size", [(10_000, 3), (3, 10_000), (1, 1), (1, 500), (20, 24)])
    def test_extreme_sizes(self, size: tuple[int, int]) -> None:
        assert_equal(picture("RGB", size), return_tensors="pt")
        fast = SiglipImageProcessorFast(size=SIZE)(picture("RGB", size), return_tensors="pt")
        assert fast.pixel_values.shape == (1, 3, 24, 20)


def arrays() -> list[tuple[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    cases = []
    for channels, first in itertools.product((1, 3, 4), (True, False)):
        shape = (channels, 13, 9) if first else (13, 9, channels)
        place = f"{channels} {'first' if first else 'last'}"
        cases += [
            (f"uint8 {place}", generator.integers(0, 256, shape, dtype=np.uint8)),
            (f"float32 {place}", generator.random(shape).astype(np.float32)),
            (f"float64 {place}", generator.random(shape)),
            (f"float16 {place}", generator.random(shape).astype(np.float16)),
            (f"int64 {place}", generator.integers(0, 256, shape)),
            (f"bool {place}", generator.random(shape) < 0.5),
        ]
        if channels < 4:
            cases.append((f"whole floats {place}", generator.integers(0, 256, shape).astype(np.float32)))
    return cases


ARRAYS = arrays()


class TestArrays:
    @pytest.mark.parametrize("array", [array for _, array in ARRAYS], ids=[name for name, _ in ARRAYS])
    def test_numpy_and_torch(self, array: np.ndarray) -> None:
        for image in (array, torch.from_numpy(array.copy())):
            assert_equal(image, return_tensors="pt")
            assert_equal(image, do_resize=False)
            assert_equal(image, do_resize=False, do_rescale=False)
            assert_equal(image, do_resize=False, do_rescale=False, do_normalize=False)
            assert_equal(image, do_convert_rgb=False, do_normalize=False)
        assert_equal(array[:, ::-1])

    @pytest.mark.parametrize("shape", [(3, 7, 3), (1, 5, 3), (4, 5, 1), (3, 3, 4), (1, 1, 1), (3, 1, 1), (1, 1, 4)])
    def test_ambiguous_shapes(self, shape: tuple[int, ...]) -> None:
        assert_equal(noise(*shape))
        assert_equal(noise(*shape), input_data_format="channels_first")
        if shape[2] == 3:
            assert_equal(noise(*shape), input_data_format="channels_last")
            assert_equal(noise(*shape), input_data_format=transformers.image_utils.ChannelDimension.LAST)

    def test_batches_and_lists(self) -> None:
        first, last = noise(2, 3, 8, 6), noise(2, 8, 6, 3, seed=1)
        mixed = [picture("RGBA"), noise(3, 8, 6), torch.from_numpy(noise(8, 6, 3)), picture("L")]
        nested = [mixed[:1], [], mixed[1:]]
        for images in (first, last, torch.from_numpy(first), [first, last], mixed, tuple(mixed), nested):
            for kind in ("pt", "np", None):
                assert_equal(images, return_tensors=kind)

    def test_graphs_and_half_precision(self) -> None:
        image = torch.rand(3, 8, 6, requires_grad=True)
        exact = SiglipImageProcessor(size=SIZE)(image.detach(), return_tensors="pt").pixel_values
        assert torch.equal(SiglipImageProcessor(size=SIZE)(image, return_tensors="pt").pixel_values, exact)
        for processor in (SiglipImageProcessor(size=SIZE), SiglipImageProcessorFast(size=SIZE)):
            assert processor(image.bfloat16(), return_tensors="pt").pixel_values.dtype == torch.float32
            assert not processor(image, return_tensors="pt").pixel_values.requires_grad

    def test_the_input_is_not_changed(self) -> None:
        for options in ({}, {"do_resize": False}, {"do_resize": False, "do_rescale": False, "do_normalize": False}):
            for processor in (SiglipImageProcessor(size=SIZE), SiglipImageProcessorFast(size=SIZE)):
                array = np.random.default_rng(0).random((3, 24, 20)).astype(np.float32)
                tensor, before = torch.from_numpy(array.copy()), array.copy()
                processor([array, tensor], return_tensors="pt", **options).pixel_values.add_(1)
                assert np.array_equal(array, before) and np.array_equal(tensor.numpy(), before)


OPTIONS: list[dict[str, Any]] = [
    {"size": 12}, {"size": {"shortest_edge": 12}}, {"size": {"shortest_edge": 12, "longest_edge": 16}},
    {"size": {"shortest_edge": 31, "longest_edge": 32}}, {"size": {"max_height": 10, "max_width": 50}},
    {"size": (9, 14)},
    {"size": [9, 14]}, {"size": 12, "default_to_square": True}, {"size": {"height": 17, "width": 31}},
    *({"resample": number} for number in range(6)), {"resample": Image.Resampling.LANCZOS}, {"do_resize": False},
    {"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"do_normalize": False},
    {"image_mean": 0.3, "image_std": 0.2},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": (0.4, 0.5, 0.6)}, {"do_rescale": False, "do_normalize": False},
    {"do_resize": False, "do_rescale": False, "do_normalize": False}, {"do_convert_rgb": False},
]  # fmt: skip


class TestOptions:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_each_as_argument_and_as_attribute(self, options: dict[str, Any]) -> None:
        for image in (picture("RGB"), picture("RGB", (17, 31)), noise(3, 31, 31)):
            assert_equal(image, options)
            if "default_to_square" not in options:
                assert_equal(image, **options)
        if options != {"do_convert_rgb": False}:
            assert_equal(picture("RGBA"), {**options, "size": options.get("size", SIZE)}, return_tensors="pt")

    def test_attributes_can_be_set(self) -> None:
        processor = SiglipImageProcessor(size=SIZE)
        assert processor.size["height"] == 24
        processor.size, processor.do_normalize = {"height": 4, "width": 5}, False
        assert processor(picture("RGB"), return_tensors="pt").pixel_values.shape == (1, 3, 4, 5)
        assert processor(picture("RGB"), return_tensors="pt").pixel_values.min() >= 0

    def test_preprocess_and_result(self) -> None:
        processor = SiglipImageProcessor()
        batch = processor.preprocess(images=picture("RGB"), return_tensors="pt")
        assert isinstance(batch, BatchFeature) and list(batch) == processor.model_input_names == ["pixel_values"]
        assert batch.pixel_values.shape == (1, 3, 224, 224) and batch.pixel_values.dtype == torch.float32
        assert isinstance(processor(picture("RGB"))["pixel_values"], list)

    @pytest.mark.parametrize("cls", [SiglipImageProcessor, SiglipImageProcessorFast])
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"sise": 4}, TypeError, "sise"),
            ({"size": 0}, ValueError, "size is 0"),
            ({"size": {"height": 4}}, ValueError, "size is"),
            ({"size": {"height": 4.5, "width": 4}}, ValueError, "size is"),
            ({"size": {"longest_edge": 4}}, ValueError, "size is"),
            ({"size": "large"}, ValueError, "size is 'large'"),
            ({"resample": 9}, ValueError, "resample is 9"),
            ({"resample": "cubic"}, ValueError, "resample is 'cubic'"),
            ({"do_resize": "yes"}, ValueError, "do_resize is 'yes'"),
            ({"rescale_factor": "1/255"}, ValueError, "rescale_factor"),
            ({"image_mean": [0.5, 0.5]}, ValueError, "image_mean has 2"),
            ({"image_std": [0.5, 0.5, 0.0]}, ValueError, "image_std"),
            ({"image_std": "half"}, ValueError, "image_std"),
            ({"input_data_format": "first"}, ValueError, "input_data_format"),
            ({"data_format": "channels_last"}, ValueError, "data_format"),
            ({"return_tensors": "tf"}, ValueError, "return_tensors"),
        ],
    )
    def test_bad_options(self, cls: Any, options: dict[str, Any], error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            cls()(picture("RGB"), **options)
        if not {"input_data_format", "data_format", "return_tensors", "image_mean"} & set(options):
            with pytest.raises(error, match=message):
                cls(**options)

    def test_device_of_the_pillow_path(self) -> None:
        assert SiglipImageProcessor()(picture("RGB"), device="cpu")
        with pytest.raises(ValueError, match="SiglipImageProcessorFast"):
            SiglipImageProcessor()(picture("RGB"), device="cuda")


@pytest.mark.parametrize("cls", [SiglipImageProcessor, SiglipImageProcessorFast])
class TestInputs:
    def test_names_and_base64(self, cls: Any, tmp_path: Path) -> None:
        image = picture("RGBA")
        image.save(tmp_path / "image.png")
        expected = cls()(image.convert("RGB"), return_tensors="pt").pixel_values  # alpha is dropped there, as there
        encoded = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
        for source in (
            str(tmp_path / "image.png"),
            tmp_path / "image.png",
            encoded,
            f"data:image/png;base64,{encoded}",
        ):
            assert torch.equal(cls()(source, return_tensors="pt").pixel_values, expected)
        both = cls()([str(tmp_path / "image.png"), image], return_tensors="pt").pixel_values
        assert torch.equal(both[:1], expected)
        theirs = SiglipImageProcessorPil()(str(tmp_path / "image.png"), return_tensors="pt").pixel_values
        assert (theirs - expected).abs().max() <= 2 / 127.5

    @pytest.mark.parametrize("name", ["text.png", "empty.jpg", "cut.jpg", "cut.png", "missing.png", "folder.png"])
    def test_no_image(self, cls: Any, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        if name == "text.png":
            path.write_text("this is no image")
        elif name == "empty.jpg":
            path.touch()
        elif name.startswith("cut"):
            whole = io.BytesIO()
            Image.fromarray(noise(64, 64, 3)).save(whole, "jpeg" if name.endswith("jpg") else "png")
            path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        elif name == "folder.png":
            path.mkdir()
        with pytest.raises(OSError, match=name):
            cls()(str(path))
        with pytest.raises(OSError, match=name):
            cls()([picture("RGB"), path])

    def test_broken_image_that_was_opened(self, cls: Any, tmp_path: Path) -> None:
        Image.fromarray(noise(64, 64, 3)).save(tmp_path / "whole.png")
        content = (tmp_path / "whole.png").read_bytes()
        (tmp_path / "broken.png").write_bytes(content[: len(content) // 2])
        with Image.open(tmp_path / "broken.png") as image, pytest.raises(OSError, match=r"broken\.png"):
            cls()(image)

    @pytest.mark.parametrize(
        ("images", "error"),
        [
            (None, TypeError), (3, TypeError), ([3], TypeError), (b"bytes", TypeError), ({"image": 1}, TypeError),
            ([], ValueError), ([[]], ValueError), (noise(5, 5), ValueError), (noise(2, 5, 5), ValueError),
            (noise(5, 5, 2), ValueError), (noise(1, 2, 3, 4, 5), ValueError), (noise(3, 0, 5), ValueError),
            ([[[noise(3, 5, 5)]]], ValueError), ([noise(3, 5, 5), [noise(3, 5, 5)]], ValueError),
            (np.full((4, 5, 5), 2.0), ValueError), (np.array(["a", "b"]), ValueError),
        ],
        ids=lambda value: getattr(value, "__name__", None) or str(getattr(value, "shape", value))[:20],
    )  # fmt: skip
    def test_bad_images(self, cls: Any, images: Any, error: type) -> None:
        with pytest.raises(error, match="images"):
            cls()(images)

    def test_sizes_that_make_no_tensor(self, cls: Any) -> None:
        images = [picture("RGB"), picture("RGB", (5, 5))]
        assert len(cls()(images, do_resize=False)["pixel_values"]) == 2
        for kind in ("pt", "np"):
            with pytest.raises(ValueError, match="do_resize"):
                cls()(images, do_resize=False, return_tensors=kind)


class TestPillowLimits:
    @pytest.mark.parametrize("image", [np.full((3, 4, 4), 0.5) + 1, np.full((3, 4, 4), -1), np.full((3, 4, 4), 300),
                                       np.full((3, 4, 4), np.nan)])  # fmt: skip
    def test_values_that_pillow_cannot_keep(self, image: np.ndarray) -> None:
        with pytest.raises(ValueError, match="Pillow cannot resize"):
            SiglipImageProcessor()(image)
        assert SiglipImageProcessorFast()(image, return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)


class TestFast:
    SIZES = ((224, 224), (64, 48), (37, 300), (300, 37), (2, 2), (20, 24), (90, 91))

    @pytest.mark.parametrize("resample", [2, 3])
    @pytest.mark.parametrize("kind", ["noise", "black and white", "smooth"])
    def test_tolerance(self, resample: int, kind: str) -> None:
        tolerance = SiglipImageProcessorFast.TOLERANCE_LEVELS / 127.5 + 1e-6
        for (width, height), target in itertools.product(self.SIZES, (SIZE, {"height": 96, "width": 128})):
            pixels = noise(height, width, 3)
            if kind == "black and white":
                pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
            if kind == "smooth":
                pixels = np.array(Image.fromarray(noise(5, 6, 3)).resize((width, height)))
            exact, fast = (
                cls(size=target, resample=resample)(pixels, input_data_format="channels_last", return_tensors="pt")
                for cls in (SiglipImageProcessor, SiglipImageProcessorFast)
            )
            assert (exact.pixel_values - fast.pixel_values).abs().max() <= tolerance

    @pytest.mark.parametrize("mode", MODES)
    def test_modes(self, mode: str) -> None:
        exact, fast = (
            cls(size=SIZE)(picture(mode), return_tensors="np")
            for cls in (SiglipImageProcessor, SiglipImageProcessorFast)
        )
        assert np.abs(exact.pixel_values - fast.pixel_values).max() <= 2 / 127.5 + 1e-6
        exact, fast = (
            cls(do_resize=False)(picture(mode), return_tensors="np")
            for cls in (SiglipImageProcessor, SiglipImageProcessorFast)
        )
        np.testing.assert_allclose(exact.pixel_values, fast.pixel_values, atol=1e-6)

    def test_both_passes_are_rounded_wherever_it_runs(self) -> None:
        """Off the CPU, torch resizes no 8-bit tensor; the two rounded passes that stand in for it are compared here."""
        from siglip_model.images.fast import _interpolate

        batch = torch.from_numpy(np.where(noise(1, 3, 40, 50) < 128, 0, 255).astype(np.uint8))
        horizontal = _interpolate(batch.float(), (40, 90), "bicubic").clamp(0, 255).round().to(torch.uint8)
        both = _interpolate(horizontal.float(), (70, 90), "bicubic").clamp(0, 255).round()
        once = _interpolate(batch.float(), (70, 90), "bicubic").clamp(0, 255).round()
        native = _interpolate(batch, (70, 90), "bicubic").float()
        assert (both - native).abs().max() <= 2 < (once - native).abs().max()

    def test_floats_stay_unclamped(self) -> None:
        image = torch.where(torch.rand(3, 30, 40) < 0.5, 0.0, 1.0)
        batch = SiglipImageProcessorFast(size={"height": 64, "width": 64}, do_rescale=False, do_normalize=False)(image)
        assert batch.pixel_values[0].max() > 1 and batch.pixel_values[0].min() < 0

    @pytest.mark.parametrize("array", [array for _, array in ARRAYS], ids=[name for name, _ in ARRAYS])
    def test_arrays(self, array: np.ndarray) -> None:
        fast = SiglipImageProcessorFast(do_resize=False)(array, return_tensors="np").pixel_values
        expected = SiglipImageProcessor(do_resize=False)(array, return_tensors="np").pixel_values
        levels = 1 / 255 if 4 in array.shape and array.dtype.kind in "iu" else 1e-4  # alpha is rounded otherwise there
        if array.dtype == np.int64 and 4 in array.shape:
            return  # torchvision takes the integer type's whole range for white, transformers' Pillow path 255
        if array.dtype == bool and 4 in array.shape:
            return
        np.testing.assert_allclose(fast, expected, atol=2 * levels)

    def test_each_image_as_if_alone(self) -> None:
        images = [picture("RGB"), picture("L", (9, 9)), noise(3, 17, 31), torch.rand(3, 9, 9), picture("RGBA", (9, 9))]
        processor = SiglipImageProcessorFast(size=SIZE)
        together = processor(images, return_tensors="pt").pixel_values
        for image, result in zip(images, together, strict=True):
            assert torch.equal(processor(image, return_tensors="pt").pixel_values[0], result)

    def test_device(self) -> None:
        batch = SiglipImageProcessorFast(size=SIZE)(
            [picture("RGB"), torch.rand(3, 4, 4)], device="cpu", return_tensors="pt"
        )
        assert batch.pixel_values.device.type == "cpu"
        meta = SiglipImageProcessorFast(size=SIZE)(torch.rand(3, 30, 30, device="meta"), return_tensors="pt")
        assert meta.pixel_values.device.type == "meta" and meta.pixel_values.shape == (1, 3, 24, 20)
        asked = SiglipImageProcessorFast(size=SIZE)(picture("RGB"), device=torch.device("meta"), return_tensors="pt")
        assert asked.pixel_values.device.type == "meta"

    def test_filters_that_torch_lacks(self) -> None:
        for resample in (1, 4, 5):
            with pytest.raises(ValueError, match="use SiglipImageProcessor"):
                SiglipImageProcessorFast(resample=resample)(picture("RGB"))

    @pytest.mark.gpu
    @pytest.mark.parametrize("resample", [2, 3])
    def test_on_the_gpu(self, resample: int) -> None:
        for width, height in self.SIZES:
            pixels = np.where(noise(height, width, 3) < 128, 0, 255).astype(np.uint8)
            exact = SiglipImageProcessor(size=SIZE, resample=resample)(pixels, return_tensors="pt").pixel_values
            fast = SiglipImageProcessorFast(size=SIZE, resample=resample)
            for batch in (
                fast(pixels, device="cuda", return_tensors="pt"),
                fast(torch.from_numpy(pixels).cuda(), return_tensors="pt"),
            ):
                assert batch.pixel_values.device.type == "cuda"
                assert (batch.pixel_values.cpu() - exact).abs().max() <= fast.TOLERANCE_LEVELS / 127.5 + 1e-6


class TestFiles:
    @pytest.mark.parametrize("cls", [SiglipImageProcessor, SiglipImageProcessorFast])
    @pytest.mark.parametrize(
        "options",
        [{}, {"size": 30}, {"size": SIZE, "resample": 2, "image_mean": (0.1, 0.2, 0.3), "do_normalize": False}],
    )
    def test_round_trip(self, cls: Any, options: dict[str, Any], tmp_path: Path) -> None:
        ours = cls(**options)
        assert [Path(path).name for path in ours.save_pretrained(tmp_path / "new")] == ["preprocessor_config.json"]
        theirs = SiglipImageProcessorPil.from_pretrained(tmp_path / "new")
        again = cls.from_pretrained(tmp_path / "new")
        assert type(load_image_processor(tmp_path / "new")) is cls
        image = picture("RGB")
        expected = ours(image, return_tensors="pt").pixel_values
        assert torch.equal(again(image, return_tensors="pt").pixel_values, expected)
        exact = SiglipImageProcessor(**options)(image, return_tensors="pt").pixel_values
        assert torch.equal(theirs(image, return_tensors="pt").pixel_values, exact)
        assert repr(again) == repr(ours) and repr(pickle.loads(pickle.dumps(ours))) == repr(ours)

    def test_numpy_numbers(self, tmp_path: Path) -> None:
        options = {"image_mean": np.float32([0.1, 0.2, 0.3]), "rescale_factor": np.float32(0.004), "size": np.int64(9)}
        ours = SiglipImageProcessor(**options)
        ours.save_pretrained(tmp_path)
        again = SiglipImageProcessor.from_pretrained(tmp_path)
        assert torch.equal(*(one(picture("RGB"), return_tensors="pt").pixel_values for one in (ours, again)))

    def test_files_of_transformers(self, tmp_path: Path) -> None:
        SiglipImageProcessorPil(size=SIZE, image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
        image = picture("RGB")
        expected = SiglipImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
        assert torch.equal(
            SiglipImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values, expected
        )
        smaller = SiglipImageProcessor.from_pretrained(tmp_path, size={"height": 8, "width": 8})
        assert smaller(image, return_tensors="pt").pixel_values.shape == (1, 3, 8, 8)

    def test_file_of_transformers_4(self, tmp_path: Path) -> None:
        settings = {
            "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
            "image_mean": [0.5] * 3,
            "image_processor_type": "SiglipImageProcessor", "image_std": [0.5] * 3,
            "processor_class": "SiglipProcessor", "resample": 3, "rescale_factor": 0.00392156862745098, "size": SIZE,
        }  # fmt: skip
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        ours, theirs = SiglipImageProcessor.from_pretrained(tmp_path), SiglipImageProcessorPil.from_pretrained(tmp_path)
        assert torch.equal(*(one(picture("RGB"), return_tensors="pt").pixel_values for one in (ours, theirs)))
        # null says nothing, so other modes are converted; transformers stumbles over their number of channels
        assert torch.equal(
            *(ours(image, return_tensors="pt").pixel_values for image in (picture("L"), picture("L").convert("RGB")))
        )

    def test_nested_settings_come_first(self, tmp_path: Path) -> None:
        nested = {
            "image_processor": {**SiglipImageProcessor(size=SIZE).to_dict()},
            "processor_class": "SiglipProcessor",
        }
        (tmp_path / "processor_config.json").write_text(json.dumps(nested))
        assert SiglipImageProcessor.from_pretrained(tmp_path).size == SIZE
        SiglipImageProcessor().save_pretrained(tmp_path)
        assert SiglipImageProcessor.from_pretrained(tmp_path).size == SIZE
        (tmp_path / "processor_config.json").write_text('{"processor_class": "SiglipProcessor"}')
        assert SiglipImageProcessor.from_pretrained(tmp_path).size == {"height": 224, "width": 224}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "preprocessor_config"), ("{", "preprocessor_config"), ("[]", "preprocessor_config"),
            ('{"image_processor_type": "CLIPImageProcessor"}', "CLIPImageProcessor"),
            ('{"do_center_crop": true}', "do_center_crop"), ('{"size": {"height": 3}}', "size"),
        ],
    )  # fmt: skip
    def test_bad_files(self, tmp_path: Path, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / "preprocessor_config.json").write_text(content)
        for load in (SiglipImageProcessor.from_pretrained, load_image_processor):
            with pytest.raises((OSError, ValueError), match=message):
                load(tmp_path)

    def test_unknown_argument(self, tmp_path: Path) -> None:
        SiglipImageProcessor().save_pretrained(tmp_path)
        with pytest.raises(TypeError, match="sise"):
            SiglipImageProcessor.from_pretrained(tmp_path, sise=3)


def test_base_is_not_for_use() -> None:
    with pytest.raises(NotImplementedError):
        ImageProcessor()(picture("RGB"))
