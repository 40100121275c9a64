"""Gradients from micro-batches are those of the whole batch: in fp64, with dropout, with groups, and under DDP."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from oracle import TINY_TEXT, TINY_VISION
from torch.nn.parallel import DistributedDataParallel

import siglip_model
from siglip_kernels import UnsupportedInputError, chunked_sigmoid_loss
from siglip_model.training.cached import cached_step

BATCH = 7


def fresh(**settings: Any) -> siglip_model.SiglipModel:
    torch.manual_seed(0)
    text, vision = {**TINY_TEXT, **settings}, {**TINY_VISION, **settings}
    model = siglip_model.SiglipModel(siglip_model.SiglipConfig(text_config=text, vision_config=vision), backend="eager")
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
        model.logit_bias.fill_(-2.0)
    return model.double()


def batch(texts: int = BATCH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(BATCH, 3, 48, 48, generator=generator, dtype=torch.float64)
    return {"input_ids": torch.randint(0, 99, (texts, 16), generator=generator), "pixel_values": pixels}


def check_equal(model: torch.nn.Module, expected: torch.nn.Module, tolerance: float = 1e-12) -> None:
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            assert (parameter.grad - other.grad).norm() <= tolerance * other.grad.norm() + 1e-15, name


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_equals_the_whole_batch(micro_batch: int) -> None:
    whole, cached = fresh(), fresh()
    loss = whole(**batch(), return_loss=True).loss
    loss.backward()
    found = cached_step(cached, **batch(), micro_batch=micro_batch)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
    assert not found.requires_grad
    check_equal(cached, whole)


def test_several_texts_per_image_and_padding() -> None:
    whole, cached = fresh(), fresh()
    groups = {"image_groups": torch.arange(BATCH), "text_groups": torch.arange(10) % BATCH}
    loss = functools.partial(chunked_sigmoid_loss, **groups)
    mask = torch.ones(10, 16, dtype=torch.int64)
    mask[4, 5:] = 0
    output = whole(**batch(10), attention_mask=mask)
    loss(output.image_embeds, output.text_embeds, whole.logit_scale.exp(), whole.logit_bias).backward()
    cached_step(cached, **batch(10), micro_batch=4, attention_mask=mask, loss=loss)
    check_equal(cached, whole)


def test_images_of_different_sizes() -> None:
    torch.manual_seed(0)
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text, vision = {**tower, "vocab_size": 99}, {**tower, "patch_size": 4, "num_patches": 16}
    config = siglip_model.Siglip2Config(text_config=text, vision_config=vision)
    whole = siglip_model.Siglip2Model(config, backend="sdpa").double()
    cached = copy.deepcopy(whole)
    shapes = torch.tensor([[2, 3], [4, 4], [1, 5], [3, 3], [2, 2]])
    inputs = {
        "input_ids": torch.randint(0, 99, (5, 16)),
        "pixel_values": torch.randn(5, 16, 48, dtype=torch.float64),
        "pixel_attention_mask": (torch.arange(16) < shapes.prod(1, keepdim=True)).int(),
        "spatial_shapes": shapes,
    }
    whole(**inputs, return_loss=True, return_logits=False).loss.backward()
    cached_step(cached, **inputs, micro_batch=2)
    check_equal(cached, whole)


def test_a_loss_of_one_side() -> None:
    model = fresh()
    cached_step(model, **batch(), micro_batch=3, loss=lambda x, y, t, b: t * x.sum())
    assert model.text_model.head.weight.grad is None
    assert model.vision_model.post_layernorm.weight.grad.abs().sum() > 0


def test_dropout_draws_the_same_twice() -> None:
    """One micro-batch draws as the whole batch does, where images come first as in the model."""
    whole, cached = fresh(attention_dropout=0.3).train(), fresh(attention_dropout=0.3).train()
    torch.manual_seed(5)
    whole(**batch(), return_loss=True).loss.backward()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    cached_step(cached, **batch(), micro_batch=BATCH)
    assert torch.equal(torch.get_rng_state(), after)
    check_equal(cached, whole)


def test_adds_to_gradients_and_runs_frozen_towers_once() -> None:
    whole, cached = fresh(), fresh()
    for model in (whole, cached):
        model.text_model.requires_grad_(False)
    seen: list[str] = []
    for name in ("vision_model", "text_model"):
        getattr(cached, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    for _ in range(2):
        whole(**batch(), return_loss=True).loss.backward()
        cached_step(cached, **batch(), micro_batch=3)
    check_equal(cached, whole)
    assert {name: seen.count(name) for name in seen} == {"vision_model": 2 * 2 * 3, "text_model": 2 * 3}


def test_a_frozen_tower_passes_gradients_to_its_pixels() -> None:
    model, pixels = fresh(), batch()["pixel_values"].requires_grad_()
    model.vision_model.requires_grad_(False)
    expected = model(batch()["input_ids"], pixels, return_loss=True).loss
    (gradient,) = torch.autograd.grad(expected, pixels)
    cached_step(model, batch()["input_ids"], pixels, micro_batch=3)
    torch.testing.assert_close(pixels.grad, gradient, rtol=1e-10, atol=1e-15)


def test_a_scaler_and_autocast() -> None:
    whole, cached = fresh().float(), fresh().float()
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in batch().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = whole(**inputs, return_loss=True).loss
        found = cached_step(cached, **inputs, micro_batch=3, scaler=scaler)
    scaler.scale(loss).backward()
    torch.testing.assert_close(found, loss.detach(), rtol=1e-3, atol=0)
    check_equal(cached, whole, tolerance=3e-2)


def test_memory_is_that_of_a_micro_batch() -> None:
    """No tower saves a tensor of the whole batch for its backward pass, as it does without micro-batches."""

    def largest(micro_batch: int) -> int:
        saved: list[torch.Size] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            cached_step(fresh(), **batch(), micro_batch=micro_batch)
        hidden = [shape for shape in saved if len(shape) == 3 and shape[2] == TINY_TEXT["hidden_size"]]
        return max(shape[0] for shape in hidden)

    assert (largest(BATCH), largest(2)) == (BATCH, 2)


def one_of_two(rank: int) -> dict[str, torch.Tensor]:
    model = fresh()
    model.use_global_loss()
    parallel = DistributedDataParallel(model)
    mine = {name: tensor.tensor_split([4])[rank] for name, tensor in batch().items()}  # 4 and 3 pairs
    for _ in range(2):
        parallel.zero_grad()
        cached_step(parallel, **mine, micro_batch=2)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    whole = fresh()
    whole(**batch(), return_loss=True).loss.backward()
    for found in ranks.run(one_of_two, 2, tmp_path):
        model = copy.deepcopy(whole)
        for name, parameter in model.named_parameters():
            parameter.grad = found[name]
        check_equal(model, whole, tolerance=1e-11)


def test_what_is_not_supported_is_named() -> None:
    with pytest.raises(UnsupportedInputError, match="micro_batch is 0"):
        cached_step(fresh(), **batch(), micro_batch=0)
    with pytest.raises(UnsupportedInputError, match="asks for the loss of 7 images and 10 texts"):
        cached_step(fresh(), **batch(10), micro_batch=2)
    with pytest.raises(UnsupportedInputError, match="attention_mask has 6 rows beside 7 of input_ids"):
        cached_step(fresh(), **batch(), attention_mask=torch.ones(6, 16), micro_batch=2)
    with pytest.raises(UnsupportedInputError, match="model is Linear"):
        cached_step(torch.nn.Linear(1, 1), **batch(), micro_batch=2)  # type: ignore[arg-type]


def test_no_logits_where_nobody_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    expected = model(**batch(), return_loss=True)
    monkeypatch.setattr(model, "logits_per_text", None)  # a call would raise
    output = model(**batch(), return_loss=True, return_logits=False)
    assert output.logits_per_image is None and output.logits_per_text is None
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.image_embeds, expected.image_embeds)
    assert (
        len(model(**batch(), return_loss=True, return_logits=False, return_dict=False)) == len(expected.to_tuple()) - 2
    )
