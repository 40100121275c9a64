"""resize_normalize against torchvision's arithmetic, as PyTorch computes it, and in fp64."""

import re

import pytest
import torch
import torch.nn.functional as F

from siglip_kernels import UnsupportedInputError, reference, resize_normalize

MODES = ("bilinear", "bicubic")
SHAPES = {  # (height, width) of an image: the result's
    "smaller, odd": ((33, 47), (16, 13)),
    "larger": ((5, 7), (16, 20)),
    "larger and smaller": ((70, 3), (17, 31)),
    "many taps": ((40, 301), (5, 2)),
    "as it is": ((16, 16), (16, 16)),
    "one pixel": ((1, 1), (5, 5)),
    "one line": ((1, 150), (3, 2)),
    "by half, which makes ties": ((34, 32), (17, 16)),
}


@pytest.fixture
def scale(device):
    """mean and std, in levels."""
    return torch.tensor([127.5, 100.0, 120.0], device=device), torch.tensor([127.5, 60.0, -70.0], device=device)


def image(device, *shape):
    """Noise, and beside it the steepest edge, where a cubic overshoots."""
    levels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    levels[0, :, : shape[1] // 2] = 0
    levels[0, :, shape[1] // 2 :] = 255
    return levels.to(device)


def assert_levels(values, images, scale, size, mode):
    """Each is the rounded level; where the exact one is as near to one half as sums in fp32 err, either neighbour."""
    mean, std = (part[:, None, None] for part in scale)
    exact = torch.cat([F.interpolate(each[None].double(), size=size, mode=mode, antialias=True) for each in images])
    exact = exact.clamp(0, 255)
    levels = values.double() * std + mean
    assert (levels - levels.round()).abs().max() < 1e-4
    assert ((levels.round() - exact).abs() < 0.5 + 2e-4).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_levels_are_those_of_the_fast_processor(shapes, mode, scale, device, poisoned_empty):
    shape, size = shapes
    images = [image(device, *shape)]
    values = resize_normalize(images, *scale, size, mode, torch.float32)
    assert_levels(values, images, scale, size, mode)
    expected = reference.resize_normalize(images, *scale, size, mode, torch.float32)
    assert (values != expected).float().mean() < 0.02, "ties alone"


def test_images_of_several_sizes_and_layouts_are_one_batch(scale, device):
    images = [image(device, 10, 21), image(device, 21, 7).mT, image(device, 24, 9)[:, ::2], image(device, 6, 6)]
    batch = resize_normalize(images, *scale, (6, 6), "bicubic", torch.float32)
    assert batch.shape == (4, 3, 6, 6) and batch.dtype == torch.float32 and batch.is_contiguous()
    assert_levels(batch, images, scale, (6, 6), "bicubic")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_result_is_rounded_to_once(dtype, scale, device):
    images = [image(device, 9, 12)]
    values, exact = (resize_normalize(images, *scale, (6, 6), "bicubic", each) for each in (dtype, torch.float32))
    assert values.dtype == dtype and torch.equal(values, exact.to(dtype))


def test_one_channel(device):
    grey, one = image(device, 9, 9)[:1], torch.ones(1, device=device)
    values = resize_normalize([grey], one, one, (4, 4), "bilinear", torch.float32)
    assert_levels(values, [grey], (one, one), (4, 4), "bilinear")


def test_registration(scale, device):
    from siglip_kernels.resize_normalize.api import _resize_normalize

    images = [image(device, 9, 12), image(device, 5, 5)]
    arguments = (images, *scale, [4, 4], "bilinear", torch.float16)
    torch.library.opcheck(_resize_normalize, arguments, test_utils=("test_schema", "test_faketensor"))


REFUSED = {
    "images is empty": {"images": []},
    "images is Tensor": {"images": torch.zeros(3, 4, 4, dtype=torch.uint8)},
    "images has dtype torch.float32": {"images": [torch.zeros(3, 4, 4)]},
    "images has shape (4, 4)": {"images": [torch.zeros(4, 4, dtype=torch.uint8)]},
    "images has shape (3, 0, 4)": {"images": [torch.zeros(3, 0, 4, dtype=torch.uint8)]},
    "images has 1 channels and another image 3": {
        "images": [torch.zeros(channels, 4, 4, dtype=torch.uint8) for channels in (3, 1)]
    },
    "mean has shape (2,)": {"mean": torch.zeros(2)},
    "std has dtype torch.float16": {"std": torch.ones(3, dtype=torch.float16)},
    "size is (0, 4)": {"size": (0, 4)},
    "size is (4)": {"size": (4,)},
    "mode is 'nearest'": {"mode": "nearest"},
    "dtype is torch.float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused_is_named(message, scale, device):
    arguments = {
        "images": [torch.zeros(3, 4, 4, dtype=torch.uint8)],
        "mean": torch.zeros(3),
        "std": torch.ones(3),
        "size": (4, 4),
        "mode": "bicubic",
        "dtype": torch.float32,
        **REFUSED[message],
    }
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = value.to(device)
    if isinstance(arguments["images"], list):
        arguments["images"] = [each.to(device) for each in arguments["images"]]
    with pytest.raises(UnsupportedInputError, match=f"^resize_normalize: {re.escape(message)}.*; supported: "):
        resize_normalize(**arguments)
