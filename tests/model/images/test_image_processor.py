"""SiglipImageProcessorPil: bit for bit transformers' Pillow processor, for every input and option."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from image_samples import ARRAYS, MODES, SIZE, assert_equal, noise, picture
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as TransformersPil

from siglip_model.batch import BatchFeature
from siglip_model.images.pillow import SiglipImageProcessorPil
from siglip_model.images.tensor import SiglipImageProcessor

pytestmark = pytest.mark.filterwarnings("ignore:(images of mode|arrays of dtype)")


class TestPillowModes:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_mode(self, mode: str) -> None:
        for size in ((31, 17), (1, 1), (2, 40)):
            image = picture(mode, size)
            assert_equal(image, return_tensors="pt")
            assert_equal(image, do_resize=False, return_tensors="np")
            if mode != "1":  # whose white transformers reads as level 1 of 255
                assert_equal(image, do_convert_rgb=False, do_normalize=False)

    def test_premultiplied_grey_is_an_error(self) -> None:
        for processor in (SiglipImageProcessorPil(), TransformersPil(), SiglipImageProcessor()):
            with pytest.raises(ValueError, match="La"):
                processor(picture("LA").convert("La"))

    def test_orientation_of_pil_images_is_ignored(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        picture("RGB").save(tmp_path / "turned.jpg", exif=exif)
        with Image.open(tmp_path / "turned.jpg") as image:
            assert_equal(image, do_resize=False)
        assert_equal(
            str(tmp_path / "turned.jpg"), do_resize=False
        )  # but applied to files loaded by name, as in transformers
        upright = SiglipImageProcessorPil(do_resize=False)(tmp_path / "turned.jpg")["pixel_values"][0]
        assert upright.shape == (3, 31, 17)

    @pytest.mark.parametrize("size", [(10_000, 3), (3, 10_000), (1, 1), (1, 500), (20, 24)])
    def test_extreme_sizes(self, size: tuple[int, int]) -> None:
        assert_equal(picture("RGB", size), return_tensors="pt")
        fast = SiglipImageProcessor(size=SIZE)(picture("RGB", size), return_tensors="pt")
        assert fast.pixel_values.shape == (1, 3, 24, 20)


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
        exact = SiglipImageProcessorPil(size=SIZE)(image.detach(), return_tensors="pt").pixel_values
        assert torch.equal(SiglipImageProcessorPil(size=SIZE)(image, return_tensors="pt").pixel_values, exact)
        for processor in (SiglipImageProcessorPil(size=SIZE), SiglipImageProcessor(size=SIZE)):
            assert processor(image.bfloat16(), return_tensors="pt").pixel_values.dtype == torch.float32
            assert not processor(image, return_tensors="pt").pixel_values.requires_grad

    def test_the_input_is_not_changed(self) -> None:
        for options in ({}, {"do_resize": False}, {"do_resize": False, "do_rescale": False, "do_normalize": False}):
            for processor in (SiglipImageProcessorPil(size=SIZE), SiglipImageProcessor(size=SIZE)):
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
    {"do_center_crop": True, "crop_size": 10}, {"do_center_crop": True, "crop_size": (36, 15)},
    {"do_center_crop": True, "crop_size": (27, 34)}, {"do_pad": True, "pad_size": (300, 400)},
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
        processor = SiglipImageProcessorPil(size=SIZE)
        assert processor.size["height"] == 24
        processor.size, processor.do_normalize = {"height": 4, "width": 5}, False
        assert processor(picture("RGB"), return_tensors="pt").pixel_values.shape == (1, 3, 4, 5)
        assert processor(picture("RGB"), return_tensors="pt").pixel_values.min() >= 0

    def test_preprocess_and_result(self) -> None:
        processor = SiglipImageProcessorPil()
        batch = processor.preprocess(images=picture("RGB"), return_tensors="pt")
        assert isinstance(batch, BatchFeature) and list(batch) == processor.model_input_names == ["pixel_values"]
        assert batch.pixel_values.shape == (1, 3, 224, 224) and batch.pixel_values.dtype == torch.float32
        assert isinstance(processor(picture("RGB"))["pixel_values"], list)

    @pytest.mark.parametrize("cls", [SiglipImageProcessorPil, SiglipImageProcessor])
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
            ({"do_center_crop": True}, ValueError, "crop_size is None"),
            ({"do_center_crop": True, "crop_size": {"shortest_edge": 4}}, ValueError, "crop_size is"),
            ({"do_pad": True, "pad_size": 0}, ValueError, "pad_size is 0"),
        ],
    )
    def test_bad_options(self, cls: Any, options: dict[str, Any], error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            cls()(picture("RGB"), **options)
        if not {"input_data_format", "data_format", "return_tensors", "image_mean"} & set(options):
            with pytest.raises(error, match=message):
                cls(**options)

    def test_device_of_the_pillow_path(self) -> None:
        assert SiglipImageProcessorPil()(picture("RGB"), device="cpu")
        with pytest.raises(ValueError, match="SiglipImageProcessor"):
            SiglipImageProcessorPil()(picture("RGB"), device="cuda")


@pytest.mark.parametrize("cls", [SiglipImageProcessorPil, SiglipImageProcessor])
class TestInputs:
    def test_names_and_base64(self, cls: Any, tmp_path: Path) -> None:
        image = picture("RGBA")
        image.save(tmp_path / "image.png")
        expected = cls()(
            image.convert("RGB"), return_tensors="pt"
        ).pixel_values  # loading drops alpha, as in transformers
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
        reference = TransformersPil()(str(tmp_path / "image.png"), return_tensors="pt").pixel_values
        assert (reference - expected).abs().max() <= 2 / 127.5

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

    def test_unequal_sizes_cannot_be_stacked(self, cls: Any) -> None:
        images = [picture("RGB"), picture("RGB", (5, 5))]
        assert len(cls()(images, do_resize=False)["pixel_values"]) == 2
        for kind in ("pt", "np"):
            with pytest.raises(ValueError, match="do_resize"):
                cls()(images, do_resize=False, return_tensors=kind)


@pytest.mark.parametrize("cls", [SiglipImageProcessor, SiglipImageProcessorPil])
def test_padding_is_bounded(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"pad_size is .*supported: at least"):
        cls(size=20, do_pad=True, pad_size=19)(picture("RGB"))
    images = [Image.new("L", (30_000, 1)), Image.new("L", (1, 30_000))]
    with pytest.raises(ValueError, match="do_pad makes images of 30000 x 30000"):
        cls(do_resize=False, do_pad=True)(images)


class TestPillowLimits:
    @pytest.mark.parametrize("image", [np.full((3, 4, 4), 0.5) + 1, np.full((3, 4, 4), -1), np.full((3, 4, 4), 300),
                                       np.full((3, 4, 4), np.nan)])  # fmt: skip
    def test_values_that_pillow_cannot_represent(self, image: np.ndarray) -> None:
        with pytest.raises(ValueError, match="Pillow cannot resize"):
            SiglipImageProcessorPil()(image)
        assert SiglipImageProcessor()(image, return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)


SIZES = [{"height": 24, "width": 20}, {"shortest_edge": 12}, {"shortest_edge": 12, "longest_edge": 16}]


class TestSteps:
    """Each step alone is transformers' method of the same name."""

    PAIRS = (
        (SiglipImageProcessorPil(), TransformersPil(), lambda image: image),
        (SiglipImageProcessor(), transformers.SiglipImageProcessor(), torch.from_numpy),
    )

    @pytest.mark.parametrize("dtype", ["uint8", "float32"])
    @pytest.mark.parametrize("ours, theirs, convert", PAIRS, ids=["pil", "torchvision"])
    def test_one_image(self, ours: Any, theirs: Any, convert: Any, dtype: str) -> None:
        image = convert((noise(31, 17, 3).transpose(2, 0, 1) / (1 if dtype == "uint8" else 255)).astype(dtype))
        for size in SIZES:
            for resample in (0, 2, 3):
                same(ours.resize(image, size, resample), theirs.resize(image, SizeDict(**size), resample))
            same(ours.resize(image, size=size), theirs.resize(image, SizeDict(**size)))
        for height, width in ((8, 9), (40, 12), (31, 17)):
            crop = {"height": height, "width": width}
            same(ours.center_crop(image, crop), theirs.center_crop(image, SizeDict(**crop)))
        same(ours.rescale(image, scale=1 / 127.5), theirs.rescale(image, scale=1 / 127.5))
        values = theirs.rescale(image, 1 / 255)
        for mean, std in (([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), ((0.5,) * 3, (0.5,) * 3)):
            same(ours.normalize(values, mean, std), theirs.normalize(values, mean, std))

    @pytest.mark.parametrize("ours, theirs, convert", PAIRS, ids=["pil", "torchvision"])
    def test_padding(self, ours: Any, theirs: Any, convert: Any) -> None:
        images = [convert(noise(*size, 3).transpose(2, 0, 1).copy()) for size in ((31, 17), (9, 30))]
        for pad_size in (None, {"height": 40, "width": 33}):
            asked = pad_size and SizeDict(**pad_size)
            for here, there in zip(ours.pad(images, pad_size), theirs.pad(images, asked), strict=True):
                same(here, there)
        with pytest.raises(ValueError, match="pad_size is"):
            ours.pad(images, 10)

    def test_batches(self) -> None:
        batch = torch.rand(2, 3, 31, 17)
        ours, theirs = SiglipImageProcessor(), transformers.SiglipImageProcessor()
        same(ours.resize(batch, SIZES[0]), theirs.resize(batch, SizeDict(**SIZES[0])))
        same(ours.normalize(batch, 0.5, 0.25), theirs.normalize(batch, [0.5] * 3, [0.25] * 3))
        with pytest.raises(ValueError, match="size is 'large'"):
            ours.resize(batch, "large")


def same(here: Any, there: Any) -> None:
    assert type(here) is type(there) and here.dtype == there.dtype and here.shape == there.shape
    assert np.array_equal(np.asarray(here), np.asarray(there))
