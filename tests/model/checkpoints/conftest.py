import pytest
import torch
import transformers
from checkpoint_files import copy_of, small_config


@pytest.fixture(scope="module")
def oracle():
    torch.manual_seed(0)
    return transformers.SiglipModel(small_config()).eval()


@pytest.fixture(scope="module")
def saved(oracle, tmp_path_factory):
    """A whole model that transformers saved. Not to be changed: `checkpoint` is a copy that may be."""
    folder = tmp_path_factory.mktemp("saved")
    oracle.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    return copy_of(saved, tmp_path / "checkpoint")


@pytest.fixture
def sharded(oracle, tmp_path):
    oracle.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    return tmp_path / "sharded"
