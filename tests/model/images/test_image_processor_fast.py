"""SiglipImageProcessorFast: within its stated tolerance of the Pillow processor, on every device."""

import itertools

import numpy as np
import pytest
import torch
from image_samples import ARRAYS, MODES, SIZE, WIDE_MODES, noise, picture
from PIL import Image

from siglip_model.images.fast import SiglipImageProcessorFast
from siglip_model.images.pillow import SiglipImageProcessor

pytestmark = pytest.mark.filterwarnings("ignore:(images of mode|arrays of dtype)")


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

    @pytest.mark.parametrize("dtype", ["u2", "i4", "f4", "f8"])
    def test_arrays_of_the_other_byte_order(self, dtype: str) -> None:
        values = noise(20, 30, 3)
        process = SiglipImageProcessorFast(size=SIZE)
        native, swapped = (process(values.astype(order + dtype), return_tensors="pt").pixel_values for order in "=>")
        assert torch.equal(native, swapped)

    @pytest.mark.parametrize("mode", [*MODES, *WIDE_MODES])
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

    def test_both_passes_are_rounded_on_every_device(self) -> None:
        """On other devices PyTorch cannot resize 8-bit tensors; compares the two rounded passes used there."""
        from siglip_model.images.fast import interpolate

        batch = torch.from_numpy(np.where(noise(1, 3, 40, 50) < 128, 0, 255).astype(np.uint8))
        horizontal = interpolate(batch.float(), (40, 90), "bicubic").clamp(0, 255).round().to(torch.uint8)
        both = interpolate(horizontal.float(), (70, 90), "bicubic").clamp(0, 255).round()
        once = interpolate(batch.float(), (70, 90), "bicubic").clamp(0, 255).round()
        native = interpolate(batch, (70, 90), "bicubic").float()
        assert (both - native).abs().max() <= 2 < (once - native).abs().max()

    def test_floats_stay_unclamped(self) -> None:
        image = torch.where(torch.rand(3, 30, 40) < 0.5, 0.0, 1.0)
        batch = SiglipImageProcessorFast(size={"height": 64, "width": 64}, do_rescale=False, do_normalize=False)(image)
        assert batch.pixel_values[0].max() > 1 and batch.pixel_values[0].min() < 0

    @pytest.mark.parametrize("array", [array for _, array in ARRAYS], ids=[name for name, _ in ARRAYS])
    def test_arrays(self, array: np.ndarray) -> None:
        fast = SiglipImageProcessorFast(do_resize=False)(array, return_tensors="np").pixel_values
        expected = SiglipImageProcessor(do_resize=False)(array, return_tensors="np").pixel_values
        levels = 1 / 255 if 4 in array.shape and array.dtype.kind in "iu" else 1e-4  # alpha is rounded differently
        if array.dtype == np.int64 and 4 in array.shape:
            return  # white is the integer type's maximum in torchvision, 255 in transformers' Pillow path
        if array.dtype == bool and 4 in array.shape:
            return
        np.testing.assert_allclose(fast, expected, atol=2 * levels)

    def test_images_do_not_affect_each_other(self) -> None:
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

    def test_filters_that_pytorch_lacks(self) -> None:
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
