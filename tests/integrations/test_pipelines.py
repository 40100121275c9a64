"""transformers' pipelines run this project's models, in batches, with the results of its own models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_checkpoint import random_image, shared_tiny_checkpoint

import siglip_model

IMAGES = [random_image(seed) for seed in range(3)]
TASKS = {
    "image-classification": ("SiglipForImageClassification", {}),
    "image-feature-extraction": ("SiglipVisionModel", {}),
    "zero-shot-image-classification": ("SiglipModel", {"candidate_labels": ["a cat", "a red ball"]}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_tiny_checkpoint(tmp_path_factory)


def numbers(result: Any) -> list[float]:
    """All numbers of nested lists and dicts, in order; of labels, by their names."""
    if isinstance(result, dict):
        return [result["score"]]
    if isinstance(result, (list, tuple)):
        entries = sorted(result, key=lambda entry: entry["label"]) if isinstance(result[0], dict) else result
        return [number for entry in entries for number in numbers(entry)]
    return [float(result)]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_pipeline(checkpoint: Path, tmp_path: Path, task: str, batch_size: int) -> None:
    name, arguments = TASKS[task]
    theirs = getattr(transformers, name).from_pretrained(checkpoint).eval()
    theirs.save_pretrained(tmp_path)  # with the weights of a new classifier
    parts: dict[str, Any] = {"image_processor": transformers.AutoImageProcessor.from_pretrained(checkpoint)}
    if task.startswith("zero-shot"):
        parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(checkpoint)
    found, expected = (
        numbers(
            transformers.pipeline(task, model=model, device=-1, **parts)(IMAGES, batch_size=batch_size, **arguments)
        )
        for model in (getattr(siglip_model, name).from_pretrained(tmp_path), theirs)
    )
    assert len(found) == len(expected) > 3
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_components_of_this_project(checkpoint: Path, batch_size: int) -> None:
    task = "zero-shot-image-classification"
    name, arguments = TASKS[task]
    found, expected = (
        numbers(
            transformers.pipeline(
                task,
                model=getattr(library, name).from_pretrained(checkpoint).eval(),
                tokenizer=library.AutoTokenizer.from_pretrained(checkpoint),
                image_processor=library.AutoImageProcessor.from_pretrained(checkpoint),
                device=-1,
            )(IMAGES, batch_size=batch_size, **arguments)
        )
        for library in (siglip_model, transformers)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_features_as_tensors(checkpoint: Path) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint)
    model = siglip_model.SiglipVisionModel.from_pretrained(checkpoint)
    extract = transformers.pipeline("image-feature-extraction", model=model, image_processor=processor, device=-1)
    [pooled] = extract(IMAGES[:1], pool=True, return_tensors=True)
    with torch.no_grad():
        expected = model(**processor(IMAGES[0], return_tensors="pt")).pooler_output
    torch.testing.assert_close(pooled, expected)
