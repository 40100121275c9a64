"""torch.ao.quantization.quantize_dynamic, the usual int8 on a CPU: the layers that are quantised in transformers' model
are quantised here, and compute, under every backend."""

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import TINY_TEXT, TINY_VISION, project_model, randomised, same_weights, transformers_model
from torch import Tensor, nn

import siglip_model
from siglip_model.checkpoints.errors import CheckpointError

ONE_LAYER = {"num_hidden_layers": 1}

pytestmark = [
    pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="torch without FBGEMM"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
]


def quantised(model: nn.Module, dtype: torch.dtype = torch.qint8) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=dtype)


def quantised_modules(model: nn.Module) -> dict[str, type]:
    return {
        name: type(module)
        for name, module in model.named_modules()
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic")
    }


@pytest.fixture(scope="module")
def peer() -> transformers.SiglipModel:
    torch.manual_seed(0)
    return transformers_model({**TINY_TEXT, **ONE_LAYER}, {**TINY_VISION, **ONE_LAYER})


def logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 99, (2, 16), generator=generator)
    with torch.no_grad():
        return model(ids, torch.randn(2, 3, 48, 48, generator=generator)).logits_per_image


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "triton"])
def test_as_transformers(backend: str, dtype: torch.dtype, peer: transformers.SiglipModel) -> None:
    project = project_model(peer, backend)
    before, found = quantised_modules(project), quantised(project, dtype)
    expected = quantised(peer, dtype)
    assert not before and len(quantised_modules(expected)) == 2 * 6 + 3
    assert quantised_modules(found) == quantised_modules(expected)
    assert found.backend == backend
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=1e-5)
    assert (logits(found) - logits(project)).abs().max() > 1e-5  # the quantised modules are what computes


def test_a_classifier_as_transformers(peer: transformers.SiglipModel) -> None:
    peer_classifier = randomised(transformers.SiglipForImageClassification(peer.config))
    project = siglip_model.SiglipForImageClassification(siglip_model.SiglipConfig.from_dict(peer.config.to_dict()))
    found, expected = quantised(same_weights(project, peer_classifier)), quantised(peer_classifier)
    assert "classifier" in quantised_modules(found)
    assert quantised_modules(found) == quantised_modules(expected)
    pixels = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(found(pixels).logits, expected(pixels).logits, rtol=0, atol=1e-5)


def test_copies_and_state(peer: transformers.SiglipModel) -> None:
    found = quantised(project_model(peer, "sdpa"))
    expected, file = logits(found), io.BytesIO()
    torch.save(found.state_dict(), file)
    file.seek(0)
    loaded = quantised(project_model(peer, "sdpa").requires_grad_(False))
    loaded.load_state_dict(torch.load(file, weights_only=False))
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), loaded):
        assert torch.equal(logits(twin), expected)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_save_pretrained_says_what_it_cannot_save(
    dtype: torch.dtype, peer: transformers.SiglipModel, tmp_path: Path
) -> None:
    found = quantised(project_model(peer, "sdpa"), dtype)
    with pytest.raises(CheckpointError, match=r"cannot save text_model.*_packed_params.*: .* quantised .*torch.save"):
        found.save_pretrained(tmp_path / "quantised")
    assert not (tmp_path / "quantised").exists()
