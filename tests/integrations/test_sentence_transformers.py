"""SigLIP in sentence-transformers, which loads transformers' model: accelerated, and replaced by siglip_model's."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import siglip_model
from siglip_kernels.integrations.patching import Accelerated
from siglip_kernels.integrations.transformers import accelerate, restore

sentence_transformers = pytest.importorskip("sentence_transformers", exc_type=ImportError)

DEMO = Path(siglip_model.__file__).parent / "demo"
CHECKPOINT = str(DEMO / "checkpoint")
TEXTS = ["a bicycle", "an alarm clock on a table"]


@pytest.fixture
def images():
    return [Image.open(path).convert("RGB") for path in sorted((DEMO / "pictures").glob("*.png"))[:2]]


@pytest.fixture
def encoder():
    model = sentence_transformers.SentenceTransformer(CHECKPOINT, device="cpu")
    model[0].processing_kwargs = {"text": {"padding": "max_length"}}
    return model


@pytest.fixture
def expected(images):
    """Embeddings of the texts and the images, by siglip_model."""
    model = siglip_model.SiglipModel.from_pretrained(CHECKPOINT).eval()
    batch = siglip_model.AutoProcessor.from_pretrained(CHECKPOINT)(
        text=TEXTS, images=images, padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        texts = model.get_text_features(input_ids=batch["input_ids"])
        pictures = model.get_image_features(pixel_values=batch["pixel_values"])
    return texts.pooler_output, pictures.pooler_output


def check(encoder, images, expected):
    for inputs, embeddings in zip((TEXTS, images), expected, strict=True):
        torch.testing.assert_close(encoder.encode(inputs, convert_to_tensor=True), embeddings, atol=1e-4, rtol=1e-4)


def test_accelerated(encoder, images, expected, tmp_path):
    report = accelerate(encoder)
    assert report.left == () and any(entry.module == "SiglipEncoderLayer" for entry in report.replaced)
    check(encoder, images, expected)
    encoder.save_pretrained(str(tmp_path))
    restore(encoder)
    assert not any(isinstance(module, Accelerated) for module in encoder.modules())
    check(sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu"), images, expected)


def test_siglip_models_own_model(encoder, images, expected):
    model = siglip_model.SiglipModel.from_pretrained(CHECKPOINT).eval()
    model.set_backend("triton")
    encoder[0].model = model
    check(encoder, images, expected)
