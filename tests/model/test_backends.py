"""Choosing a backend: names, aliases, errors that say what is missing, and no silent fallback."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import machines
import pytest
import torch
from oracle import TINY_TEXT, TINY_VISION

import siglip_model
from siglip_kernels import MissingBackendError
from siglip_model import backends
from siglip_model.capture import CapturedText


def tiny(**kwargs: Any) -> siglip_model.SiglipModel:
    torch.manual_seed(0)
    return siglip_model.SiglipModel(
        siglip_model.SiglipConfig(text_config=TINY_TEXT, vision_config=TINY_VISION), **kwargs
    )


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(32).view(2, 16), "pixel_values": torch.linspace(-1, 1, 13824).view(2, 3, 48, 48)}


def test_the_default_is_sdpa_as_in_transformers() -> None:
    assert tiny().backend == "sdpa"


def test_set_backend_reaches_every_module() -> None:
    model = tiny()
    expected = model(**inputs()).logits_per_image
    model.set_backend("eager")
    assert model.backend == model.text_model.backend == model.vision_model.backend == "eager"
    from siglip_model.layers import UsesBackend

    found = [module.ops for module in model.modules() if isinstance(module, UsesBackend)]
    assert len(found) > 20 and all(ops is backends.EAGER for ops in found)
    torch.testing.assert_close(model(**inputs()).logits_per_image, expected)
    model.set_attn_implementation("sdpa")
    assert model.backend == "sdpa"


def test_alias() -> None:
    assert tiny(attn_implementation="eager").backend == "eager"
    assert tiny(attn_implementation="eager", backend="eager").backend == "eager"
    with pytest.raises(ValueError, match="backend is 'sdpa' and its alias attn_implementation is 'eager'"):
        tiny(backend="sdpa", attn_implementation="eager")


@pytest.mark.parametrize("name", ["flash", "", ["sdpa"]])
def test_unknown_backend_lists_the_known(name: Any, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    known = re.escape(f"backend is {name!r}; supported: eager, sdpa, flash_attention_2, triton, triton_fp8, auto")
    for ask in (model.set_backend, lambda name: tiny(backend=name), lambda name: load(tmp_path, backend=name)):
        with pytest.raises(ValueError, match=known):
            ask(name)


def test_a_backend_per_part(tmp_path: Path) -> None:
    model = tiny()
    model.set_backend({"vision_config": "eager"})
    assert (model.backend, model.text_model.backend, model.vision_model.backend) == ("sdpa", "sdpa", "eager")
    layers = model.vision_model.encoder.layers
    assert layers[0].ops is layers[0].mlp.ops is backends.EAGER and model.text_model.ops is model.ops is backends.SDPA
    model.set_attn_implementation({"": "eager", "vision_config": "sdpa"})
    assert (model.backend, model.text_model.backend, model.vision_model.backend) == ("eager", "sdpa", "sdpa")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, attn_implementation={"text_config": "eager"})
    assert (loaded.backend, loaded.text_model.backend, loaded.vision_model.backend) == ("sdpa", "eager", "sdpa")
    config = siglip_model.SiglipConfig.from_pretrained(tmp_path, attn_implementation="eager")
    assert siglip_model.SiglipModel(config).vision_model.backend == "eager"
    with pytest.raises(
        ValueError, match="is for the part 'audio_config'; supported: '', 'text_config', 'vision_config'"
    ):
        model.set_backend({"audio_config": "eager"})
    with pytest.raises(ValueError, match="backend is 'flash'; supported: eager"):
        load(tmp_path, backend={"vision_config": "flash"})


def load(folder: Path, **kwargs: Any) -> siglip_model.SiglipModel:
    return siglip_model.SiglipModel.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("name", ["output_attention", "to_dict", "use_auth_token"])
def test_unknown_arguments_of_loading(name: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=f"from_pretrained got an unexpected argument '{name}'"):
        load(tmp_path, **{name: True})
    assert load(tmp_path, output_attentions=True, num_labels=3).config.num_labels == 3


def test_a_further_backend_is_one_more_value(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def doubled(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append("attention")
        return 2 * backends.EAGER.attention(*args, **kwargs)

    lacking: list[str | None] = [None]
    further = backends.replace(
        backends.EAGER,
        name="doubled",
        attention=doubled,
        returns_weights=False,
        masks_sync=True,
        lacks=lambda: lacking[0],
    )
    monkeypatch.setitem(backends.BACKENDS, further.name, further)
    model = tiny(backend="doubled").eval()
    assert model.backend == "doubled" and backends.availability()["doubled"] is None
    found = model(**inputs()).logits_per_image
    assert len(calls) == 2 * TINY_VISION["num_hidden_layers"]
    assert not torch.allclose(found, tiny(backend="eager")(**inputs()).logits_per_image)
    model(**inputs(), output_attentions=True)
    assert "doubled backend keeps no attention weights" in caplog.text
    with pytest.raises(ValueError, match="attention_mask is True with the backend doubled"):
        CapturedText(model.text_model, 1, None, attention_mask=True, record=lambda function: (function(), function))
    lacking[0] = "its accelerator is missing"
    with pytest.raises(MissingBackendError, match="'doubled' cannot run here: its accelerator is missing"):
        model.set_backend("doubled")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA lacks")
def test_flash_attention_says_what_is_missing() -> None:
    with pytest.raises(MissingBackendError, match=r"there is no CUDA device.*backend \(--backend\) 'sdpa'"):
        tiny(backend="flash_attention_2")
    model = tiny()
    with pytest.raises(MissingBackendError):
        model.set_backend("flash_attention_2")
    assert model.backend == "sdpa"  # a refused change changes nothing


def test_flash_attention_refuses_cpu_tensors_and_fp32() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(MissingBackendError, match="on cpu; flash-attn runs on CUDA only"):
        backends.FLASH.attention(q, q, q)
    with pytest.raises(ValueError, match="dtype is torch.float32; supported: torch.float16 and torch.bfloat16"):
        backends.FLASH.attention(*[FakeCuda(q)] * 3)


class FakeCuda:
    """A tensor that claims to be on a GPU: enough to reach the next check."""

    is_cuda = True

    def __init__(self, tensor: torch.Tensor):
        self.dtype = tensor.dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto takes triton there")
def test_auto_without_a_gpu() -> None:
    assert tiny(backend="auto").backend == "sdpa"
    assert tiny(backend="auto").to(torch.bfloat16).backend == "sdpa"


@pytest.mark.parametrize(
    ("gpu", "hip", "reason"),
    [
        (machines.MI300X, "6.4", r"AMD Instinct MI300X \(gfx942\) is an AMD GPU \(ROCm 6.4\), .* not support"),
        (machines.RTX_2080, None, "NVIDIA GeForce RTX 2080 Ti has compute capability 7.5; the kernels need 8.0"),
    ],
)
def test_auto_takes_sdpa_and_triton_is_refused_on_other_gpus(gpu, hip, reason, monkeypatch) -> None:
    machines.report(monkeypatch, gpu, hip=hip)
    assert backends.resolve("auto", torch.device("cuda")) is backends.SDPA
    message = rf"backend 'triton' cannot run here: {reason}.*Choose backend \(--backend\) 'sdpa' or 'auto'"
    for ask in (lambda: tiny(backend="triton"), lambda: tiny().set_backend("triton")):
        with pytest.raises(MissingBackendError, match=message):
            ask()
    assert re.match(reason, backends.availability()["triton"] or "")


def test_the_gpu_of_the_model_is_judged(monkeypatch) -> None:
    machines.report(monkeypatch, machines.RTX_2080, machines.H100)
    for name in ("auto", "triton"):
        assert backends.resolve(name, torch.device("cuda", 1)) is backends.TRITON
    assert backends.resolve("auto", torch.device("cuda", 0)) is backends.SDPA
    assert backends.resolve("auto", torch.device("cuda")) is backends.SDPA  # cuda:0 is current
    with pytest.raises(MissingBackendError, match="'triton' cannot run here: NVIDIA GeForce RTX 2080 Ti"):
        backends.resolve("triton", torch.device("cuda", 0))
    assert tiny(backend="triton").backend == "triton"  # on the CPU, to be moved to the H100
    with pytest.raises(MissingBackendError, match=r"do not support Intel GPUs \(XPU\)"):
        backends.resolve("triton", torch.device("xpu"))
    assert backends.resolve("auto", torch.device("xpu")) is backends.SDPA


@pytest.mark.gpu
def test_auto_follows_the_model_to_the_gpu() -> None:
    model = tiny(backend="auto").cuda()
    assert model.backend == "triton"
    assert model.cpu().backend == "sdpa"


def test_availability_names_every_backend() -> None:
    found = backends.availability()
    assert found.keys() == backends.BACKENDS.keys()
    assert found["eager"] is None and found["sdpa"] is None


@pytest.mark.parametrize(
    "backend", [backends.FLASH, backends.TRITON, backends.TRITON_FP8], ids=lambda backend: backend.name
)
def test_masks_that_are_not_padding_are_refused(backend: backends.Backend) -> None:
    lengths = backend.attention_mask(torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]))["lengths"]
    assert lengths.tolist() == [2, 0, 3] and lengths.dtype == torch.int32
    with pytest.raises(ValueError, match=f"{backend.name}: attention_mask has valid tokens after padding"):
        backend.attention_mask(torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match=f"{backend.name}: attention_mask has 4 dimensions"):
        backend.attention_mask(torch.ones(1, 1, 3, 3))


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 16, 16, dtype=torch.long), torch.ones(16)])
def test_masks_of_a_wrong_kind_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mask has shape"):
        tiny()(**inputs(), attention_mask=mask)


def test_dropout_in_training_only() -> None:
    config = siglip_model.SiglipVisionConfig(**TINY_VISION, attention_dropout=0.5)
    for backend in ("eager", "sdpa"):
        model = siglip_model.SiglipVisionModel(config, backend=backend)
        pixels = inputs()["pixel_values"]
        torch.testing.assert_close(model.eval()(pixels).pooler_output, model(pixels).pooler_output)
        assert not torch.equal(model.train()(pixels).pooler_output, model(pixels).pooler_output)
    with pytest.raises(ValueError, match="triton: attention_dropout is 0.5"):
        backends.TRITON.attention(None, None, None, dropout=0.5)


def test_models_copy_and_pickle_with_their_backend() -> None:
    model = tiny(backend="eager")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.backend == "eager"
        assert torch.equal(twin(**inputs()).logits_per_image, model(**inputs()).logits_per_image)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": None}, "input_ids is None"),
        ({"input_ids": torch.zeros(2, 17, dtype=torch.long)}, "17 tokens per text; supported: at most .* 16"),
        ({"input_ids": torch.zeros(2, 16)}, "input_ids has shape .* torch.float32; supported: integers"),
        ({"input_ids": torch.zeros(2, 16, dtype=torch.int8)}, "input_ids has shape .* torch.int8; supported: integers"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"input_ids has shape \(2, 0\) .* at least one token"),
        ({"input_ids": [[1, 2]]}, "input_ids is list; supported: integers"),
        ({"input_ids": torch.full((2, 16), 99)}, "input_ids goes from 99 to 99; supported: 0 to 98"),
        ({"position_ids": torch.full((1, 16), -1)}, "position_ids goes from -1 to -1; supported: 0 to 15"),
        ({"position_ids": torch.zeros(1, 16)}, "position_ids has shape .* torch.float32; supported: integers"),
        (
            {"position_ids": torch.zeros(3, 16, dtype=torch.long)},
            r"position_ids has shape \(3, 16\); supported: \(2, 16",
        ),
        ({"attention_mask": [[1] * 16] * 2}, r"attention_mask is list; supported: a tensor of shape \(2, 16\)"),
        ({"attention_mask": torch.ones(2, 1, 16, 15)}, r"attention_mask has .* 15\); supported: .*\(2, 2, 16, 16\)"),
        ({"pixel_values": None}, "pixel_values is None"),
        ({"pixel_values": [torch.zeros(3, 48, 48)]}, "pixel_values is list; supported: a tensor"),
        ({"pixel_values": torch.zeros(2, 3, 64, 64)}, "64 × 64, 16 patches; supported: 9 patches"),
        ({"pixel_values": torch.zeros(2, 1, 48, 48)}, r"pixel_values has shape \(2, 1, 48, 48\)"),
        ({"pixel_values": torch.zeros(3, 48, 48)}, r"pixel_values has shape \(3, 48, 48\)"),
        ({"pixel_values": torch.zeros(2, 3, 48, 48, dtype=torch.int64)}, "torch.int64; supported: floating point"),
        ({"pixel_values": torch.zeros(2, 3, 8, 8), "interpolate_pos_encoding": True}, "8 × 8, 0 patches"),
        ({"pixel_values": torch.zeros(3, 3, 48, 48), "return_loss": True}, "loss of 3 images and 2 texts"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(**{**inputs(), **change})


def test_labels_that_are_no_tensor() -> None:
    config = siglip_model.SiglipConfig(text_config=TINY_TEXT, vision_config=TINY_VISION)
    with pytest.raises(ValueError, match="labels is list; supported: a tensor"):
        siglip_model.SiglipForImageClassification(config)(inputs()["pixel_values"], labels=[0, 1])


def test_no_image_embedding_without_the_head() -> None:
    vision = {**TINY_VISION, "vision_use_head": False}
    model = siglip_model.SiglipModel(siglip_model.SiglipConfig(text_config=TINY_TEXT, vision_config=vision))
    with pytest.raises(ValueError, match="vision_use_head is False"):
        model(**inputs())


def test_configurations_name_the_backend_of_their_part() -> None:
    classifier = siglip_model.SiglipForImageClassification(tiny().config)
    config = classifier.config
    assert config._attn_implementation == config.vision_config._attn_implementation == "sdpa"
    classifier.set_attn_implementation({"": "eager"})
    assert (config._attn_implementation, config.vision_config._attn_implementation) == ("eager", "sdpa")
    classifier.set_attn_implementation({"text_config": "eager"})  # which has no tower here
    assert config.text_config._attn_implementation == "eager" and classifier.vision_model.backend == "sdpa"
    with pytest.raises(ValueError, match="attn_implementation=.foo.. is not supported; supported: eager, sdpa"):
        classifier.set_attn_implementation({"vision_config": "foo"})
    assert classifier.vision_model.backend == "sdpa"


def test_checkpointing_by_configuration() -> None:
    config = tiny().config
    config.gradient_checkpointing = True
    model = siglip_model.SiglipModel(config)
    assert model.is_activation_checkpointing and "gradient_checkpointing" not in config.to_dict()
