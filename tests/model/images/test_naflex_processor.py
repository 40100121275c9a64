"""SigLIP 2's image processors and processor against transformers' from the same images, texts and files."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from image_samples import MODES, NEW_ENOUGH, noise, picture
from tiny_checkpoint import WORDS, random_image
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil as TransformersPil
from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor as TransformersTensor
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

import siglip_model
from siglip_model.images.naflex import Siglip2ImageProcessor, Siglip2ImageProcessorPil, size_for_patches

PAIRS = {"tensor": (Siglip2ImageProcessor, TransformersTensor), "pil": (Siglip2ImageProcessorPil, TransformersPil)}
SIZES = [(31, 17), (16, 16), (1, 1), (200, 3), (5, 300), (64, 48), (250, 260)]
both = pytest.mark.parametrize("kind", PAIRS)


def assert_same(got: Any, expected: Any) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert type(got[name]) is type(value), name
        if isinstance(value, list):
            assert [type(each) for each in got[name]] == [type(each) for each in value], name
        if hasattr(value, "dtype"):
            assert got[name].dtype == value.dtype, name
        assert all(map(np.array_equal, got[name], value)), name


def compare(kind: str, images: Any, make: dict[str, Any] | None = None, **options: Any) -> Any:
    if not NEW_ENOUGH:
        pytest.skip("transformers before 5.23 treats alpha and single channels differently")
    project, peer = (processor(**{"do_convert_rgb": True, **(make or {})}) for processor in PAIRS[kind])
    result = project(images, **options)
    assert_same(result, peer(images, **options))
    return result


def test_sizes_are_those_of_transformers() -> None:
    draw = np.random.default_rng(0)
    cases = [(*draw.integers(1, 3000, 2), *draw.choice([8, 14, 16], 1), *draw.integers(1, 1100, 1)) for _ in range(200)]
    for case in [*cases, (1, 1, 16, 1), (1, 100_000, 16, 4), (720, 1280, 16, 256), (256, 256, 16, 256)]:
        height, width, side, most = map(int, case)
        assert size_for_patches(height, width, side, most) == get_image_size_for_max_num_patches(
            height, width, side, most
        ), case


@both
@pytest.mark.parametrize("most", [1, 16, 64, 256, 1024])
def test_mixed_batches(kind: str, most: int) -> None:
    images = [random_image(seed, size) for seed, size in enumerate(SIZES)]
    batch = compare(kind, images, {"max_num_patches": most}, return_tensors="pt")
    assert batch["pixel_values"].shape == (len(SIZES), most, 768)
    counts = batch["spatial_shapes"].prod(-1)
    assert torch.equal(batch["pixel_attention_mask"].sum(-1), counts) and counts.max() <= most


@both
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(kind: str, mode: str) -> None:
    compare(kind, [picture(mode), picture(mode, (40, 90))], return_tensors="pt", max_num_patches=30)


@both
@pytest.mark.parametrize("return_tensors", [None, "pt", "np"])
def test_result(kind: str, return_tensors: str | None) -> None:
    compare(kind, [random_image(0), random_image(1, (90, 20))], max_num_patches=20, return_tensors=return_tensors)
    compare(kind, random_image(0), max_num_patches=20, return_tensors=return_tensors)


@both
@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": 14}, {"resample": 3}, {"do_rescale": False}, {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, {"do_rescale": False, "do_normalize": False},
    ],
    ids=str,
)  # fmt: skip
def test_options(kind: str, options: dict[str, Any]) -> None:
    images = [random_image(0), random_image(1, (90, 20))]
    compare(kind, images, return_tensors="pt", max_num_patches=24, **options)
    compare(kind, images, {**options, "max_num_patches": 24}, return_tensors="pt")


@both
def test_arrays_and_layouts(kind: str) -> None:
    for image in (
        noise(3, 40, 70),
        noise(40, 70, 3),
        torch.from_numpy(noise(3, 40, 70)),
        noise(40, 70, 1),
        noise(4, 40, 70),
    ):
        compare(kind, image, return_tensors="pt", max_num_patches=24)


@both
def test_without_resizing(kind: str) -> None:
    images = [random_image(0, (48, 32)), random_image(1, (16, 16))]
    compare(kind, images, do_resize=False, max_num_patches=9, return_tensors="pt")
    processor = PAIRS[kind][0]()
    for size, most in (((40, 32), 9), ((64, 64), 9), ((8, 8), 9)):
        with pytest.raises(ValueError, match="multiples of patch_size 16, at most max_num_patches 9 patches"):
            processor(random_image(0, size), do_resize=False, max_num_patches=most)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_num_patches": 0}, ValueError, "max_num_patches is 0; supported: a positive int"),
        ({"patch_size": 1.5}, ValueError, "patch_size is 1.5; supported: a positive int"),
        ({"max_num_patches": 2**20}, ValueError, "pixels; supported: at most"),
        ({"size": 224}, TypeError, "unknown argument size; known: patch_size, max_num_patches"),
        ({"do_center_crop": True}, TypeError, "unknown argument do_center_crop"),
    ],
)
def test_refused_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Siglip2ImageProcessor(**options)
    with pytest.raises(error, match=message):
        Siglip2ImageProcessorPil()(random_image(0), **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and an image processor of transformers, as a native-resolution checkpoint has them."""
    folder = tmp_path_factory.mktemp("naflex")
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *sorted(set("".join(WORDS))), "A", "."]
    tokenizer = transformers.Siglip2Tokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], padding_side="right",
        model_max_length=64, model_input_names=["input_ids"],
    )  # fmt: skip
    processor = transformers.Siglip2Processor(TransformersTensor(max_num_patches=256), tokenizer)
    processor.save_pretrained(folder)
    return folder


def test_files_both_ways(checkpoint: Path, tmp_path: Path) -> None:
    image, text = random_image(0, (70, 30)), ["A photo of a Cat", "two dogs"]
    peer = transformers.AutoProcessor.from_pretrained(checkpoint)
    project = siglip_model.AutoProcessor.from_pretrained(checkpoint)
    assert type(project) is siglip_model.Siglip2Processor
    expected = peer(images=image, text=text, return_tensors="pt")
    assert_same(
        dict(sorted(project(images=image, text=text, return_tensors="pt").items())), dict(sorted(expected.items()))
    )
    assert expected["input_ids"].shape == (2, 64)
    lower = project(text=[each.lower() for each in text], return_tensors="pt")
    assert torch.equal(lower["input_ids"], expected["input_ids"])
    project.save_pretrained(tmp_path)
    back = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(back).__name__ == "Siglip2Processor"
    assert_same(back(images=image, return_tensors="pt"), peer(images=image, return_tensors="pt"))
    assert type(siglip_model.AutoProcessor.from_pretrained(tmp_path)) is siglip_model.Siglip2Processor


@pytest.mark.parametrize("name", ["Siglip2ImageProcessor", "Siglip2ImageProcessorFast"])
def test_image_processor_files(name: str, tmp_path: Path) -> None:
    settings = {"image_processor_type": name, "max_num_patches": 64, "resample": 2, "do_convert_rgb": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = siglip_model.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is getattr(siglip_model, name) is Siglip2ImageProcessor and loaded.max_num_patches == 64
    assert type(siglip_model.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")) is Siglip2ImageProcessorPil
    assert siglip_model.AutoImageProcessor.from_pretrained(tmp_path, max_num_patches=9).max_num_patches == 9
    loaded.save_pretrained(tmp_path / "saved")
    peer = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved")
    assert type(peer).__name__ == "Siglip2ImageProcessor" and peer.max_num_patches == 64
    with pytest.raises(ValueError, match="image_processor_type is 'Siglip2.*; supported: SiglipImageProcessor, Sig"):
        siglip_model.SiglipImageProcessor.from_pretrained(tmp_path)
    settings["image_processor_type"] = "SiglipImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="supported: Siglip2ImageProcessor, Siglip2ImageProcessorFast"):
        Siglip2ImageProcessor.from_pretrained(tmp_path)


def test_padding_otherwise_than_in_training_is_warned_of(checkpoint: Path) -> None:
    processor = siglip_model.AutoProcessor.from_pretrained(checkpoint)
    peer = transformers.AutoProcessor.from_pretrained(checkpoint)
    for options in (
        {"padding": True},
        {"padding": "max_length", "max_length": 32},
        {"padding": False},
        {"padding_side": "left"},
        {"pad_to_multiple_of": 48, "truncation": False},
    ):
        message = "(Siglip2Processor|Siglip2Tokenizer): texts are padded with .*; SigLIP 2 was trained with .*64"
        with pytest.warns(UserWarning, match=message) as caught:
            result = processor(text=["a cat", "the dog"], **options)
        assert len(caught) == 1
        assert result["input_ids"] == peer(text=["a cat", "the dog"], **options)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(text="a cat", padding="max_length", max_length=64, padding_side="right", pad_to_multiple_of=32)
        processor(text="a cat")
        processor(images=random_image(0))


def test_the_tokenizer_alone_warns_of_other_padding(checkpoint: Path) -> None:
    tokenizer = siglip_model.AutoTokenizer.from_pretrained(checkpoint)
    texts = ["a cat", "the dog"]
    for options in (
        {"padding": True},
        {"padding": "longest", "return_tensors": "pt"},
        {"padding": "max_length", "max_length": 32, "truncation": True},
        {"return_tensors": "np", "max_length": 4},  # no padding at all
        {"padding": "max_length", "padding_side": "left"},
    ):
        with pytest.warns(UserWarning, match="^Siglip2Tokenizer: texts are padded with .* was trained with .*64"):
            tokenizer(texts, **options)
    with pytest.warns(UserWarning, match="^Siglip2Tokenizer: texts are padded"):
        tokenizer.pad([tokenizer(text) for text in texts])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(texts)  # lists, which may be counted
        assert tokenizer(texts, padding="max_length", return_tensors="pt")["input_ids"].shape == (2, 64)
        tokenizer.pad([tokenizer(text) for text in texts], padding="max_length")


def test_errors_name_their_processor(checkpoint: Path) -> None:
    processor = siglip_model.AutoProcessor.from_pretrained(checkpoint)
    for error, message, arguments in (
        (ValueError, "neither images nor text", {}),
        (ValueError, "text is 3", {"text": 3}),
        (ValueError, "videos is a list", {"videos": []}),
        (TypeError, "unknown argument size", {"text": "a", "size": 224}),
        (TypeError, "unknown argument size in images_kwargs", {"text": "a", "images_kwargs": {"size": 224}}),
        (ValueError, "padding is given twice", {"text": "a", "padding": True, "text_kwargs": {"padding": True}}),
    ):
        with pytest.raises(error, match=f"^Siglip2Processor: {message}"):
            processor(**arguments)


def test_the_checkpoint_decides_the_number_of_patches(checkpoint: Path) -> None:
    tokenizer = siglip_model.AutoTokenizer.from_pretrained(checkpoint)
    processor = siglip_model.Siglip2Processor(Siglip2ImageProcessor(max_num_patches=20, patch_size=8), tokenizer)
    assert processor(images=random_image(0), return_tensors="pt")["pixel_values"].shape == (1, 20, 192)
    assert processor(images=random_image(0), return_tensors="pt", max_num_patches=9)["pixel_values"].shape[1] == 9
    with pytest.raises(TypeError, match="image_processor is a SiglipImageProcessor; supported: Siglip2ImageProcessor"):
        siglip_model.Siglip2Processor(siglip_model.SiglipImageProcessor(), tokenizer)
    with pytest.raises(TypeError, match="image_processor is a Siglip2ImageProcessor; supported: SiglipImageProcessor"):
        siglip_model.SiglipProcessor(Siglip2ImageProcessor(), tokenizer)
