"""Arguments of `from_pretrained`, files and uploads of processors, image processors and tokenizers."""

import json
import shutil
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import random_image, shared_tiny_checkpoint

import siglip_model
from siglip_model import AutoImageProcessor, AutoProcessor, AutoTokenizer, SiglipImageProcessor, SiglipTokenizer

LOADERS = {
    "AutoProcessor": AutoProcessor,
    "AutoImageProcessor": AutoImageProcessor,
    "AutoTokenizer": AutoTokenizer,
    "SiglipProcessor": siglip_model.SiglipProcessor,
    "SiglipImageProcessor": SiglipImageProcessor,
    "SiglipImageProcessorPil": siglip_model.SiglipImageProcessorPil,
    "SiglipTokenizer": SiglipTokenizer,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.mark.parametrize("name", LOADERS)
class TestLoading:
    def test_arguments_that_ask_for_nothing(self, name: str, checkpoint: Path, tmp_path: Path) -> None:
        load = LOADERS[name].from_pretrained
        plain = load(checkpoint)
        given = {"revision": "main", "force_download": False, "local_files_only": True, "token": None, "proxies": None}
        again = load(
            pretrained_model_name_or_path=str(checkpoint),
            **given,
            cache_dir=tmp_path,
            trust_remote_code=False,
            subfolder="",
        )
        assert type(again) is type(plain)

    def test_a_subfolder_is_read(self, name: str, checkpoint: Path, tmp_path: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "whole" / "part")
        load = LOADERS[name].from_pretrained
        assert type(load(tmp_path / "whole", subfolder="part")) is type(load(checkpoint))
        with pytest.raises(OSError, match="whole"):
            load(tmp_path / "whole")

    def test_what_cannot_be_honoured_raises(self, name: str, checkpoint: Path) -> None:
        load = LOADERS[name].from_pretrained
        for argument, value in (("proxies", {"http": "x"}), ("gguf_file", "x.gguf"), ("sise", 3)):
            with pytest.raises((TypeError, ValueError), match=argument):
                load(checkpoint, **{argument: value})
        with pytest.warns(UserWarning, match="trust_remote_code"):
            load(checkpoint, trust_remote_code=True)


class TestProcessor:
    def test_components_may_be_given(self, checkpoint: Path) -> None:
        images, texts = SiglipImageProcessor(size=9), SiglipTokenizer.from_pretrained(checkpoint)
        processor = AutoProcessor.from_pretrained(checkpoint, image_processor=images, tokenizer=texts)
        assert processor.image_processor is images and processor.tokenizer is texts
        for component, option in (
            ({"image_processor": images}, {"size": 3}),
            ({"tokenizer": texts}, {"max_length": 3}),
        ):
            with pytest.raises(ValueError, match=next(iter(component))):
                AutoProcessor.from_pretrained(checkpoint, **component, **option)

    def test_arguments_of_calls_become_defaults(self, checkpoint: Path) -> None:
        processor = AutoProcessor.from_pretrained(checkpoint, padding="max_length", max_length=11)
        assert processor(text="a cat", return_tensors="pt").input_ids.shape == (1, 11)
        assert processor(text="a cat", max_length=9, return_tensors="pt").input_ids.shape == (1, 9)
        with pytest.raises(ValueError, match="padding is 'most'"):
            AutoTokenizer.from_pretrained(checkpoint, padding="most")

    def test_unused_arguments(self, checkpoint: Path) -> None:
        processor, unused = AutoProcessor.from_pretrained(checkpoint, foo=1, size=9, return_unused_kwargs=True)
        assert unused == {"foo": 1} and processor.image_processor.size == {"shortest_edge": 9}

    def test_json(self, checkpoint: Path, tmp_path: Path) -> None:
        processor = AutoProcessor.from_pretrained(checkpoint)
        processor.to_json_file(tmp_path / "written.json")
        processor.save_pretrained(tmp_path)
        content = (tmp_path / "processor_config.json").read_text()
        assert content == processor.to_json_string() == (tmp_path / "written.json").read_text()
        assert json.loads(content) == processor.to_dict()

    def test_what_the_call_takes(self, checkpoint: Path) -> None:
        processor = AutoProcessor.from_pretrained(checkpoint)
        image = random_image(0)
        batch = processor(images=image, text="a cat", videos=None, audio=None, return_tensors="pt")
        assert torch.equal(batch.pixel_values, processor(image, return_tensors="pt").pixel_values)
        assert list(batch.data) == list(batch) and type(batch).__name__ == "BatchFeature"
        assert processor(text="a cat", return_offsets_mapping=False).keys() == processor(text="a cat").keys()
        assert processor(text=[["a", "cat"]], is_split_into_words=True)["input_ids"]
        assert processor(text_target="a cat").keys() == processor(text="a cat").keys()
        assert "labels" in processor(text="a cat", text_target="a dog")
        centre = processor(image, do_center_crop=True, crop_size=8, return_tensors="pt").pixel_values
        assert centre.shape[-2:] == (8, 8)
        for name in ("videos", "audio"):
            with pytest.raises(ValueError, match=f"{name} is a list"):
                processor(images=image, **{name: [image]})
        with pytest.raises(NotImplementedError, match="return_offsets_mapping"):
            processor(text="a cat", return_offsets_mapping=True)

    def test_the_call_with_raw_pixels(self, checkpoint: Path) -> None:
        processor = AutoProcessor.from_pretrained(checkpoint)
        batch = processor(random_image(0), do_rescale=False, do_normalize=False, return_tensors="pt")
        assert batch.pixel_values.dtype == torch.uint8


def test_batches_are_built_as_in_transformers() -> None:
    batch = siglip_model.batch.BatchFeature({"ids": [[1, 2], [3, 4]], "one": 3}, tensor_type="pt")
    assert torch.equal(batch.ids, torch.tensor([[1, 2], [3, 4]])) and batch.one == torch.tensor(3)
    assert batch.convert_to_tensors("np").ids.tolist() == [[1, 2], [3, 4]]
    batch.data["more"] = [5]
    assert isinstance(batch, UserDict) and type(batch.data) is dict and batch["more"] == [5]
    batch.data = {"ids": [1]}
    assert list(batch) == ["ids"] and batch.ids == [1]


@pytest.mark.parametrize("name", ["AutoProcessor", "AutoImageProcessor", "AutoTokenizer"])
def test_files_are_uploaded(name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, list[str]]] = []

    class Api:
        def __init__(self, token: Any) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repository", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id: str, folder_path: Any, allow_patterns: list[str], **_: Any) -> None:
            present = {path.name for path in Path(folder_path).iterdir()}
            assert set(allow_patterns) <= present
            sent.append((repo_id, sorted(allow_patterns)))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    component = LOADERS[name].from_pretrained(checkpoint)
    names = sorted(Path(path).name for path in component.save_pretrained(tmp_path / "kept"))
    component.push_to_hub("mine", token="secret")
    component.save_pretrained(tmp_path / "sent", push_to_hub=True, token="secret")
    assert sent == [("me/mine", names), ("me/sent", names)]
    with pytest.raises(TypeError, match="commit_message"):
        component.save_pretrained(tmp_path / "kept", commit_message="x")
