"""A tiny checkpoint, its model and its image processor; a folder of images."""

import pytest
from colour_embedder import save_colours
from tiny_checkpoint import shared_tiny_checkpoint

from siglip_model.images.tensor import SiglipImageProcessor
from siglip_model.model import SiglipModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def model(checkpoint):
    return SiglipModel.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def image_processor(checkpoint):
    return SiglipImageProcessor.from_pretrained(checkpoint)


@pytest.fixture
def folder(tmp_path):
    """Nine files, of which 3.png is broken."""
    save_colours(tmp_path / "images", 9)
    (tmp_path / "images" / "3.png").write_text("no image")
    return tmp_path / "images"
