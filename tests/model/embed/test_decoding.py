"""`fast_decode` and `resize_on_device`: what they change in the pixels, and that rows of both kinds are not mixed."""

import numpy as np
import pytest
import torch
from image_samples import noise
from PIL import Image

from siglip_model.embed import EmbeddingFileError, device, embed_images, load_embeddings
from siglip_model.embed.device import Preparation, Transfers
from siglip_model.embed.reading import ImageReader
from siglip_model.embed.sources import Source
from siglip_model.images import model_inputs
from siglip_model.images.limits import PixelBudget
from siglip_model.images.naflex import Siglip2ImageProcessor
from siglip_model.images.pillow import SiglipImageProcessorPil
from siglip_model.images.tensor import SiglipImageProcessor

SIDE = 16


@pytest.fixture
def folder(tmp_path):
    """JPEG files of several sizes, one of them turned by its EXIF orientation, and a PNG file."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (width, height) in enumerate([(320, 240), (240, 320), (40, 33), (20, 200), (64, 64), (64, 64)]):
        smooth = Image.fromarray(noise(6, 8, 3, seed=number)).resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 1 else 1
        smooth.save(folder / f"{number}.jpg", exif=exif, quality=95)
    smooth.resize((300, 200)).save(folder / "6.png")
    return folder


@pytest.fixture
def processor():
    return SiglipImageProcessor(size={"height": SIDE, "width": SIDE})


def read(folder, processor, **options):
    reader = ImageReader(processor, None, PixelBudget(), **options)
    return [reader(Source(path.name, "", str(path))) for path in sorted(folder.iterdir())]


def test_fast_decode_changes_large_jpeg_files_only_and_little(folder):
    processor = SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, do_normalize=False, do_rescale=False)
    full, fast = (
        [image["pixel_values"].int() for image in read(folder, processor, levels=False, at_least=at_least)]
        for at_least in (None, SIDE)
    )
    changed = [number for number, pair in enumerate(zip(full, fast, strict=True)) if not torch.equal(*pair)]
    assert changed == [0, 1, 2, 4, 5], "of 20 x 200 pixels, half would be too short; the last is a PNG file"
    differences = torch.cat([(one - other).abs() for one, other in zip(full, fast, strict=True)]).float()
    assert differences.mean() < 6 and 10 < differences.max() < 64, "levels of 255, in images of steep slopes"


def test_levels_on_the_cpu_give_the_bits_of_the_processor(folder, processor):
    """The path of `resize_on_device`, where it can be compared exactly: on a CPU, whose copies are no copies."""
    transfers = Transfers(torch.device("cpu"))
    levels = read(folder, processor, levels=True)
    assert all(image["pixel_values"].dtype == torch.uint8 for image in levels)
    prepared = Preparation(transfers, processor, torch.float32)(levels)
    assert prepared.keys() == {"pixel_values"}
    assert torch.equal(prepared["pixel_values"], model_inputs.join(read(folder, processor))["pixel_values"])


def test_levels_that_are_rounded_once_are_within_the_processors_tolerance(folder, processor, monkeypatch):
    """As on CUDA: resized in float32, and rounded once."""
    from siglip_model.images import tensor

    expected = model_inputs.join(read(folder, processor))["pixel_values"]
    levels = read(folder, processor, levels=True)

    def resized_once(batch, size, mode):
        resized = torch.nn.functional.interpolate(batch.float(), size=size, mode=mode, antialias=True)
        return resized.clamp_(0, 255).round_().to(torch.uint8)

    monkeypatch.setattr(tensor, "resize", resized_once)
    prepare = Preparation(Transfers(torch.device("cpu")), processor, torch.float32)
    once = prepare(levels)["pixel_values"]
    difference = (once - expected).abs().max() * 127.5
    assert 0 < difference <= 2.01, "two levels of 255"

    prepare._steps = processor.fused_steps(torch.device("cpu"))  # as on CUDA, here in Triton's interpreter
    monkeypatch.setattr(processor, "preprocess", None)
    fused = prepare(levels[2:3])["pixel_values"]  # of 40 x 33 pixels
    assert fused.shape == (1, 3, SIDE, SIDE)
    assert ((fused - once[2]).abs() > 1e-6).float().mean() < 0.01, "but for ties the same bits"


def test_steps_that_the_kernel_lacks_are_left_to_the_processor():
    cpu, square = torch.device("cpu"), {"height": SIDE, "width": 20}
    steps = SiglipImageProcessor(size=square, image_mean=0.25).fused_steps(cpu)
    assert steps is not None and (steps["size"], steps["mode"]) == ((SIDE, 20), "bicubic")
    assert steps["mean"].tolist() == [63.75] * 3 and steps["std"].tolist() == [127.5] * 3
    for options in (
        {"do_normalize": False},
        {"do_resize": False},
        {"do_convert_rgb": False},
        {"resample": "lanczos"},
        {"resample": 0},
        {"do_pad": True},
        {"do_center_crop": True, "crop_size": 8},
        {"size": {"shortest_edge": SIDE}},
    ):
        assert SiglipImageProcessor(**{"size": square, **options}).fused_steps(cpu) is None, options


@pytest.mark.parametrize(
    ("kind", "runs", "fused"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_the_kernel_is_used_on_a_gpu_that_runs_it(kind, runs, fused, processor, monkeypatch):
    """On the CPU the processor rounds twice, and so does a run with `resize_on_device` there."""
    steps, transfers = processor.fused_steps(torch.device("cpu")), Transfers(torch.device("cpu"))
    transfers.device = torch.device(kind)
    monkeypatch.setattr(processor, "fused_steps", lambda where: steps if where.type == kind else None)
    monkeypatch.setattr(device, "kernels_run_on", lambda where: runs)
    called = []
    monkeypatch.setattr(device, "resize_normalize", lambda levels, **options: called.append((levels, options)))
    monkeypatch.setattr(processor, "preprocess", lambda images, **options: {"pixel_values": torch.zeros(1)})
    level = torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
    monkeypatch.setattr(transfers, "put", lambda tensors: tensors)
    Preparation(transfers, processor, torch.bfloat16)([{"pixel_values": level}])
    assert bool(called) == fused
    if fused:
        ((levels, options),) = called
        assert torch.equal(levels[0], level[0]) and options == {**steps, "dtype": torch.bfloat16}


@pytest.fixture
def embed(model, folder, tmp_path):
    def run(processor, name="out.safetensors", **options):
        return embed_images(model, processor, [folder], tmp_path / name, **{"batch_size": 2, **options})

    return run


def test_rows_are_the_same_when_the_host_runs_ahead(embed, image_processor, tmp_path, monkeypatch):
    embed(image_processor, "one.npy")

    class Behind(Transfers):
        """As on CUDA, a batch is recorded after the next was begun."""

        def __init__(self, where):
            super().__init__(where)
            self.batches_behind = 1

    from siglip_model.embed import run

    monkeypatch.setattr(run, "Transfers", Behind)
    for name, options in (("two.npy", {}), ("three.npy", {"resize_on_device": True})):
        assert embed(image_processor, name, **options).rows == 7
        assert np.array_equal(np.load(tmp_path / name), np.load(tmp_path / "one.npy"))
        assert load_embeddings(tmp_path / name).files == load_embeddings(tmp_path / "one.npy").files


def test_settings_that_change_pixels_are_not_mixed(embed, image_processor, tmp_path):
    embed(image_processor)
    assert embed(image_processor, resize_on_device=True).skipped == 7, "on a CPU the bits are the same"
    with pytest.raises(EmbeddingFileError, match="decode was full and is now fast"):
        embed(image_processor, fast_decode=True)
    embed(image_processor, "fast.safetensors", fast_decode=True)
    with pytest.raises(EmbeddingFileError, match="decode was fast and is now full"):
        embed(image_processor, "fast.safetensors")
    assert load_embeddings(tmp_path / "fast.safetensors").settings["decode"] == "fast"


def test_processors_that_cannot_are_named(embed):
    naflex = Siglip2ImageProcessor()
    short = SiglipImageProcessor(size={"shortest_edge": SIDE}, do_center_crop=True, crop_size=SIDE)
    for processor in (naflex, short):
        for option in ("fast_decode", "resize_on_device"):
            with pytest.raises(ValueError, match=f"{option} needs an image processor that resizes all images to one"):
                embed(processor, **{option: True})
    with pytest.raises(ValueError, match="resize_on_device needs a SiglipImageProcessor, not a SiglipImageProcessorPi"):
        embed(SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}), resize_on_device=True)


class Cuda:
    """What `Transfers` asks of torch.cuda, with a log instead of a device."""

    def __init__(self, log):
        self.log = log

    def __getattr__(self, name):
        return lambda *arguments, **options: self.log.append(name) or Cuda(self.log)

    def __enter__(self):
        self.log.append("on copy stream")

    def __exit__(self, *_):
        self.log.append("off copy stream")


def test_the_copy_stream_is_waited_for_before_the_model(monkeypatch):
    """Without a GPU only the order of the calls can be seen."""
    log = []

    class Host:
        shape, dtype = (1,), torch.float32

        def __getattr__(self, name):
            return lambda *arguments, **options: log.append((name, options)) or self

    transfers = Transfers(torch.device("cpu"))
    monkeypatch.setattr(device.torch, "cuda", Cuda(log))
    transfers._stream = Cuda(log)
    transfers.put([Host()])
    assert log == [
        "stream", "on copy stream", ("pin_memory", {}), ("to", {"non_blocking": True}), "off copy stream",
        "current_stream", "wait_stream", ("record_stream", {}),
    ]  # fmt: skip
