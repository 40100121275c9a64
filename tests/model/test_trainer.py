"""transformers' Trainer trains these models, and what it saves loads: at the end, in between, best and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import TINY_TEXT, TINY_VISION
from torch import nn

import siglip_model

CONFIG = siglip_model.SiglipConfig(
    text_config=TINY_TEXT, vision_config=TINY_VISION, id2label={0: "cat", 1: "dog", 2: "bird"}
)
PIXELS = torch.randn(4, 3, TINY_VISION["image_size"], TINY_VISION["image_size"])


class Pairs(torch.utils.data.Dataset):
    """Images with labels, or with texts."""

    def __init__(self, texts: bool = False):
        self.texts = texts

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.texts:
            return {"pixel_values": PIXELS[index], "input_ids": torch.arange(3) + index}
        return {"pixel_values": PIXELS[index], "labels": index % 3}


def with_loss(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {**transformers.default_data_collator(items), "return_loss": True}


def trainer(model: nn.Module, folder: Path, texts: bool = False, **arguments: Any) -> transformers.Trainer:
    given = {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2, **arguments}
    options = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2, **given
    )
    return transformers.Trainer(model=model, args=options, train_dataset=Pairs(texts), eval_dataset=Pairs(texts))


def classifier() -> siglip_model.SiglipForImageClassification:
    torch.manual_seed(0)
    return siglip_model.SiglipForImageClassification(CONFIG)


def assert_same(folder: Path, model: nn.Module) -> None:
    loaded = type(model).from_pretrained(folder)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_saved_without_training(tmp_path: Path) -> None:
    model = classifier()
    trainer(model, tmp_path).save_model(tmp_path / "saved")
    assert_same(tmp_path / "saved", model)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["architectures"] == ["SiglipForImageClassification"] and config["id2label"]["2"] == "bird"
    theirs = transformers.SiglipForImageClassification.from_pretrained(tmp_path / "saved")
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "bird"}


def test_best_checkpoint_and_resuming(tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    first = trainer(classifier(), tmp_path, load_best_model_at_end=True, **steps)
    first.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert_same(Path(first.state.best_model_checkpoint), first.model)
    resumed = trainer(classifier(), tmp_path, **{**steps, "max_steps": 3})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    assert_same(tmp_path / "checkpoint-3", resumed.model)


def test_pairs_of_images_and_texts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = siglip_model.SiglipModel(CONFIG)
    with pytest.raises(ValueError, match="did not return a loss"):  # the logits are not taken for it
        trainer(model, tmp_path, texts=True).train()
    trained = trainer(model, tmp_path, texts=True)
    trained.data_collator = with_loss
    assert trained.train().training_loss > 0
    trained.save_model(tmp_path / "saved")
    assert_same(tmp_path / "saved", model)


def test_checkpoints_of_other_models_are_what_they_were(tmp_path: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)

    trainer(classifier(), tmp_path)  # which teaches the Trainer
    trainer(Other(), tmp_path).save_model(tmp_path / "other")
    assert not (tmp_path / "other/config.json").exists()


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = trainer(classifier(), tmp_path)
    monkeypatch.setattr(type(saving.args), "should_save", False)
    saving._save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
