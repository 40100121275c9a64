"""SiglipImageProcessor: bit for bit transformers' torchvision processor, for every input and option."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from image_samples import ARRAYS, MODES, NEW_ENOUGH, SIZE, WIDE_MODES, noise, picture
from PIL import Image

from siglip_model.images.pillow import SiglipImageProcessorPil
from siglip_model.images.tensor import SiglipImageProcessor

pytestmark = pytest.mark.filterwarnings("ignore:(images of mode|arrays of dtype)")
SIZES = ((224, 224), (64, 48), (37, 300), (300, 37), (2, 2), (20, 24), (90, 91))


def assert_equal(images: Any, **options: Any) -> None:
    """Asserts that dtype, shape and bits equal those of transformers' processor."""
    if not NEW_ENOUGH:
        pytest.skip("transformers before 5.23 treats alpha and single channels differently")
    options = {"size": SIZE, **options}
    got, expected = (
        cls(**options)(images)["pixel_values"] for cls in (SiglipImageProcessor, transformers.SiglipImageProcessor)
    )
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
        assert torch.equal(one, other)


OPTIONS: list[dict[str, Any]] = [
    {}, {"size": 12}, {"size": {"shortest_edge": 12, "longest_edge": 16}},
    *({"resample": number} for number in range(4)), {"do_resize": False}, {"do_resize": None},
    {"do_rescale": False}, {"do_normalize": False}, {"do_rescale": False, "do_normalize": False},
    {"image_mean": 0.3, "image_std": 0.2}, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    {"do_center_crop": True, "crop_size": 10}, {"do_center_crop": True, "crop_size": (31, 15)},
    {"do_center_crop": True, "crop_size": {"height": 27, "width": 33}, "do_resize": False},
    {"do_pad": True, "pad_size": (40, 300)}, {"do_resize": False, "do_pad": True}, {"disable_grouping": True},
]  # fmt: skip


class TestAgainstTransformers:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_every_option(self, options: dict[str, Any]) -> None:
        several = [picture("RGB", size) for size in ((31, 17), (9, 30), (31, 17))]
        for images in (several, picture("RGBA"), noise(3, 31, 17), torch.randn(3, 40, 30) * 300):
            assert_equal(images, **options)

    @pytest.mark.parametrize("mode", MODES)
    def test_every_mode(self, mode: str) -> None:
        assert_equal(picture(mode))
        assert_equal(picture(mode), do_resize=False)

    @pytest.mark.parametrize("array", [array for _, array in ARRAYS], ids=[name for name, _ in ARRAYS])
    def test_arrays(self, array: np.ndarray) -> None:
        if array.dtype == np.int64 and 4 in array.shape:
            pytest.skip("torchvision refuses 64-bit integers with alpha")
        for image in (array, torch.from_numpy(array.copy())):
            assert_equal(image)
            assert_equal(image, do_resize=False, do_rescale=False, do_normalize=False)

    @pytest.mark.parametrize("resample", [1, 2, 3])
    @pytest.mark.parametrize("kind", ["noise", "black and white", "smooth"])
    def test_sizes(self, resample: int, kind: str) -> None:
        for (width, height), target in zip(SIZES, 4 * (SIZE, {"height": 96, "width": 128}), strict=False):
            pixels = noise(height, width, 3)
            if kind == "black and white":
                pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
            if kind == "smooth":
                pixels = np.array(Image.fromarray(noise(5, 6, 3)).resize((width, height)))
            assert_equal(Image.fromarray(pixels), size=target, resample=resample)

    @pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float64])
    def test_values_beyond_the_levels(self, dtype: torch.dtype) -> None:
        assert_equal((torch.randn(3, 40, 30) * 300).to(dtype))


class TestTensors:
    @pytest.mark.parametrize("dtype", ["u2", "i4", "f4", "f8"])
    def test_arrays_of_the_other_byte_order(self, dtype: str) -> None:
        values = noise(20, 30, 3)
        process = SiglipImageProcessor(size=SIZE)
        native, swapped = (process(values.astype(order + dtype), return_tensors="pt").pixel_values for order in "=>")
        assert torch.equal(native, swapped)

    @pytest.mark.parametrize("mode", WIDE_MODES)
    def test_wide_modes(self, mode: str) -> None:
        """Scaled from their value range, as with Pillow; transformers clips them."""
        exact, got = (
            cls(do_resize=False)(picture(mode), return_tensors="np")
            for cls in (SiglipImageProcessorPil, SiglipImageProcessor)
        )
        np.testing.assert_allclose(exact.pixel_values, got.pixel_values, atol=1e-6)

    def test_large_images_are_copied_in_strips(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = picture("RGB", (300, 400))
        whole = SiglipImageProcessor()(image, return_tensors="pt").pixel_values
        monkeypatch.setattr("siglip_model.images.tensor.STRIP_BYTES", 300 * 3 * 7)
        assert torch.equal(SiglipImageProcessor()(image, return_tensors="pt").pixel_values, whole)

    def test_floats_stay_unclamped(self) -> None:
        image = torch.where(torch.rand(3, 30, 40) < 0.5, 0.0, 1.0)
        batch = SiglipImageProcessor(size={"height": 64, "width": 64}, do_rescale=False, do_normalize=False)(image)
        assert batch.pixel_values[0].max() > 1 and batch.pixel_values[0].min() < 0

    def test_images_do_not_affect_each_other(self) -> None:
        images = [picture("RGB"), picture("L", (9, 9)), noise(3, 17, 31), torch.rand(3, 9, 9), picture("RGBA", (9, 9))]
        processor = SiglipImageProcessor(size=SIZE)
        together = processor(images, return_tensors="pt").pixel_values
        for image, result in zip(images, together, strict=True):
            assert torch.equal(processor(image, return_tensors="pt").pixel_values[0], result)

    def test_device(self) -> None:
        batch = SiglipImageProcessor(size=SIZE)(
            [picture("RGB"), torch.rand(3, 4, 4)], device="cpu", return_tensors="pt"
        )
        assert batch.pixel_values.device.type == "cpu"
        meta = SiglipImageProcessor(size=SIZE)(torch.rand(3, 30, 30, device="meta"), return_tensors="pt")
        assert meta.pixel_values.device.type == "meta" and meta.pixel_values.shape == (1, 3, 24, 20)
        asked = SiglipImageProcessor(size=SIZE)(picture("RGB"), device=torch.device("meta"), return_tensors="pt")
        assert asked.pixel_values.device.type == "meta"

    def test_filters_that_pytorch_lacks(self) -> None:
        for resample in (4, 5):
            with pytest.raises(ValueError, match="use SiglipImageProcessorPil"):
                SiglipImageProcessor(resample=resample)(picture("RGB"))

    @pytest.mark.gpu
    @pytest.mark.parametrize("resample", [1, 2, 3])
    def test_on_the_gpu(self, resample: int) -> None:
        options = {"size": SIZE, "resample": resample, "device": "cuda"}
        for width, height in SIZES:
            pixels = np.where(noise(height, width, 3) < 128, 0, 255).astype(np.uint8)
            got = SiglipImageProcessor(**options)(pixels, return_tensors="pt").pixel_values
            assert got.device.type == "cuda"
            if resample == 1:  # where transformers computes bicubic
                options["device"] = "cpu"
            expected = transformers.SiglipImageProcessor(**options)(pixels, return_tensors="pt").pixel_values
            assert torch.equal(got.cpu(), expected.cpu())
