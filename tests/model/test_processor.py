"""SiglipProcessor against transformers' from the same files, and the batch that it returns."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_checkpoint import random_image, shared_tiny_checkpoint

from siglip_model import AutoImageProcessor, AutoProcessor
from siglip_model.batch import BatchFeature
from siglip_model.images.pillow import SiglipImageProcessorPil
from siglip_model.images.tensor import SiglipImageProcessor
from siglip_model.processor import SiglipProcessor
from siglip_model.text.siglip import SiglipTokenizer

TEXTS = ["This is a photo of 2 cats.", "a plane", ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> SiglipProcessor:
    return SiglipProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    loaded = transformers.SiglipImageProcessor.from_pretrained(checkpoint)
    return transformers.SiglipProcessor(loaded, transformers.SiglipTokenizer.from_pretrained(checkpoint))


def assert_same(got: Any, expected: Any) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
        elif isinstance(value, np.ndarray) or (value and isinstance(value[0], torch.Tensor)):
            assert len(got[name]) == len(value) and all(map(np.array_equal, got[name], value)), name
        else:
            assert got[name] == value, name


class TestCall:
    @pytest.mark.parametrize(
        "arguments",
        [
            {}, {"padding": "max_length"}, {"padding": True, "return_tensors": "np"},
            {"padding": "max_length", "max_length": 9},
            {"truncation": True, "max_length": 3, "padding": "max_length", "return_tensors": "pt"},
            {"padding": "max_length", "return_tensors": "pt", "return_attention_mask": True},
            {"padding": "max_length", "return_tensors": "pt", "size": {"height": 9, "width": 7}, "do_normalize": False},
            {"text_kwargs": {"padding": "max_length"}, "images_kwargs": {"size": {"height": 9, "width": 7}}},
            {"common_kwargs": {"return_tensors": "pt"}, "padding": True},
        ],
        ids=str,
    )  # fmt: skip
    def test_same_as_transformers(self, processor: SiglipProcessor, reference: Any, arguments: dict[str, Any]) -> None:
        images = [random_image(0), random_image(1, size=(30, 50))]
        assert_same(
            processor(images=images, text=TEXTS, **arguments), reference(images=images, text=TEXTS, **arguments)
        )
        assert_same(processor(text=TEXTS, **arguments), reference(text=TEXTS, **arguments))
        assert_same(processor(text="a cat", **arguments), reference(text="a cat", **arguments))
        assert_same(processor(images, **arguments), reference(images, **arguments))
        assert_same(
            processor(images=images[0], text="a cat", **arguments),
            reference(images=images[0], text="a cat", **arguments),
        )

    def test_result(self, processor: SiglipProcessor) -> None:
        batch = processor(images=random_image(0), text=TEXTS, padding="max_length", return_tensors="pt")
        assert isinstance(batch, BatchFeature) and batch.input_ids.shape == (3, 64)
        assert batch.pixel_values.shape == (1, 3, 32, 32)
        assert set(processor.model_input_names) == {"pixel_values", "input_ids"}

    def test_order_of_arguments_does_not_matter_by_name(self, processor: SiglipProcessor) -> None:
        options = {"padding": True, "return_tensors": "pt"}
        assert_same(processor(text="a", images=random_image(0), **options), processor(random_image(0), "a", **options))

    def test_decoding(self, processor: SiglipProcessor, reference: Any) -> None:
        ids = processor(text=TEXTS, padding=True)["input_ids"]
        assert processor.batch_decode(ids, skip_special_tokens=True) == reference.batch_decode(
            ids, skip_special_tokens=True
        )
        assert processor.decode(ids[0]) == reference.decode(ids[0])

    def test_tokenizer_settings_are_defaults(self, processor: SiglipProcessor, tmp_path: Path) -> None:
        """As in transformers, call settings in tokenizer_config.json are the processor's defaults."""
        processor.save_pretrained(tmp_path)
        config = (tmp_path / "tokenizer_config.json").read_text()
        (tmp_path / "tokenizer_config.json").write_text(config.replace("{", '{"padding": "max_length",', 1))
        loaded, reference = (
            SiglipProcessor.from_pretrained(tmp_path),
            transformers.SiglipProcessor.from_pretrained(tmp_path),
        )
        assert_same(loaded(text="a cat"), reference(text="a cat"))
        assert len(loaded(text="a cat")["input_ids"]) == 64
        assert_same(loaded(text="a cat", padding=False), reference(text="a cat", padding=False))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({}, ValueError, "neither images nor text"),
            ({"text": [3]}, ValueError, "text is"),
            ({"text": ("a", "b")}, ValueError, "text is"),
            ({"text": "a", "paddign": True}, TypeError, "paddign"),
            ({"text": "a", "text_kwargs": {"size": 3}}, TypeError, "size in text_kwargs"),
            ({"text": "a", "padding": True, "text_kwargs": {"padding": True}}, ValueError, "twice"),
            ({"text": "a", "return_tensors": "tf"}, ValueError, "return_tensors"),
            ({"images": "nowhere.png"}, OSError, r"nowhere\.png"),
        ],
    )
    def test_bad_arguments(
        self, processor: SiglipProcessor, arguments: dict[str, Any], error: type, message: str
    ) -> None:
        with pytest.raises(error, match=message):
            processor(**arguments)


class TestFiles:
    def test_transformers_loads_saved_files(self, processor: SiglipProcessor, checkpoint: Path, tmp_path: Path) -> None:
        paths = processor.save_pretrained(tmp_path)
        assert sorted(Path(path).name for path in paths) == [
            "preprocessor_config.json", "processor_config.json", "spiece.model", "tokenizer_config.json",
        ]  # fmt: skip
        (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
        image = random_image(0, size=(32, 32))
        expected = processor(images=image, text=TEXTS, padding="max_length", return_tensors="pt")
        for loader in (transformers.SiglipProcessor, transformers.AutoProcessor, SiglipProcessor, AutoProcessor):
            loaded = loader.from_pretrained(tmp_path)
            got = loaded(images=image, text=TEXTS, padding="max_length", return_tensors="pt")
            assert torch.equal(got["input_ids"], expected["input_ids"]) and got.keys() == expected.keys()
            torch.testing.assert_close(got["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=0)

    def test_files_saved_by_transformers_load(self, reference: Any, tmp_path: Path) -> None:
        reference.save_pretrained(tmp_path)
        assert not (tmp_path / "preprocessor_config.json").exists()
        arguments = {"images": random_image(3), "text": TEXTS, "padding": "max_length", "return_tensors": "pt"}
        assert_same(SiglipProcessor.from_pretrained(tmp_path)(**arguments), reference(**arguments))

    def test_pytorch_is_the_default_and_pillow_a_choice(self, checkpoint: Path, tmp_path: Path) -> None:
        for name in ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"):
            SiglipProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
            (tmp_path / "processor_config.json").unlink()
            settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
            settings["image_processor_type"] = name
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
            for cls, arguments in (
                (SiglipImageProcessor, {}),
                (SiglipImageProcessor, {"use_fast": None}),
                (SiglipImageProcessor, {"use_fast": True}),
                (SiglipImageProcessor, {"backend": "torchvision"}),
                (SiglipImageProcessorPil, {"use_fast": False}),
                (SiglipImageProcessorPil, {"backend": "pil"}),
                (SiglipImageProcessorPil, {"backend": "pil", "use_fast": False}),
            ):
                for loader in (AutoImageProcessor, AutoProcessor):
                    loaded = loader.from_pretrained(tmp_path, **arguments)
                    assert type(getattr(loaded, "image_processor", loaded)) is cls
                if "use_fast" not in arguments:
                    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, **arguments)
                    assert type(theirs).__name__ == cls.__name__
        for arguments in ({"backend": "cv2"}, {"backend": "pil", "use_fast": True}, {"use_fast": "no"}):
            with pytest.raises(ValueError, match=next(iter(arguments))):
                AutoImageProcessor.from_pretrained(tmp_path, **arguments)

    def test_arguments_reach_their_component(self, checkpoint: Path) -> None:
        processor = SiglipProcessor.from_pretrained(checkpoint, do_normalize=False, model_max_length=7)
        assert processor.image_processor.do_normalize is False and processor.tokenizer.model_max_length == 7
        with pytest.raises(TypeError, match="do_normalise"):
            SiglipProcessor.from_pretrained(checkpoint, do_normalise=False)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="preprocessor_config"):
            SiglipProcessor.from_pretrained(tmp_path)
        with pytest.raises(OSError, match="nowhere"):
            SiglipProcessor.from_pretrained(tmp_path / "nowhere")

    def test_components_of_the_wrong_type(self, processor: SiglipProcessor) -> None:
        with pytest.raises(TypeError, match="image_processor is a SiglipTokenizer"):
            SiglipProcessor(processor.tokenizer, processor.image_processor)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="tokenizer is a SiglipImageProcessor"):
            SiglipProcessor(processor.image_processor, processor.image_processor)  # type: ignore[arg-type]
        assert isinstance(processor.tokenizer, SiglipTokenizer)


class TestBatch:
    def batch(self) -> BatchFeature:
        return BatchFeature(ids=torch.tensor([1, 2]), pixels=torch.ones(2, 3), rows=[torch.ones(1), 3], name="text")

    def test_attributes(self) -> None:
        batch = self.batch()
        batch.more = [1, 2]
        assert batch.ids is batch["ids"] and batch["more"] == [1, 2]
        del batch.more
        assert "more" not in batch and not hasattr(batch, "more")
        with pytest.raises(AttributeError, match="pixel_valeus"):
            _ = batch.pixel_valeus
        with pytest.raises(AttributeError, match="more"):
            del batch.more
        assert dict(**batch).keys() == batch.keys() and batch[0:1]["pixels"].shape == (1, 3)

    @pytest.mark.parametrize("arguments", [(torch.float16,), ("cpu", torch.float16)])
    def test_dtype_is_for_floats(self, arguments: tuple[Any, ...]) -> None:
        batch = self.batch()
        assert batch.to(*arguments) is batch
        assert batch.pixels.dtype == batch.rows[0].dtype == torch.float16 and batch.ids.dtype == torch.int64
        assert batch.name == "text" and batch.rows[1] == 3

    def test_device(self) -> None:
        for arguments, named in (
            (("meta",), {}),
            ((), {"device": "meta"}),
            ((torch.device("meta"),), {"dtype": torch.half}),
        ):
            batch = self.batch().to(*arguments, **named)
            assert {batch.ids.device.type, batch.pixels.device.type, batch.rows[0].device.type} == {"meta"}

    @pytest.mark.parametrize(
        "arguments", [(None,), (1.5,), ("cpu", "cpu"), (torch.half, torch.half), (True,), (torch.half, "cpu")]
    )
    def test_neither_device_nor_dtype(self, arguments: tuple[Any, ...]) -> None:
        with pytest.raises(TypeError, match="a device, then a torch.dtype"):
            self.batch().to(*arguments)

    def test_copies(self) -> None:
        for clone in (pickle.loads(pickle.dumps(self.batch())), copy.deepcopy(self.batch()), self.batch().copy()):
            assert type(clone) is BatchFeature and torch.equal(clone.ids, self.batch().ids)
            clone.ids = 3
            assert clone["ids"] == 3
