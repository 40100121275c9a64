"""Adapters: what they train, and what is left when they are merged."""

import builtins

import pytest
import torch
from coloured_squares import coloured_squares, tiny_model

from siglip_model.training.batch import generated
from siglip_model.training.loop import train
from siglip_model.training.lora import add_adapters, merged
from siglip_model.training.settings import TrainingConfig


def test_what_peft_cannot_import_is_named(monkeypatch):
    def fails(name, *_):
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'") from error

    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(RuntimeError, match=r"--lora-rank\): PEFT cannot be imported: operator torchvision::nms does"):
        add_adapters(None, 4)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_adapters_learn_and_merge_into_a_model_of_the_same_names(tmp_path):
    pytest.importorskip("peft")
    model, before = tiny_model(), tiny_model().state_dict()
    add_adapters(model, 4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"logit_scale", "logit_bias"} < trained
    assert all("lora_" in name and "encoder.layers.0" in name for name in trained - {"logit_scale", "logit_bias"})
    config = TrainingConfig(steps=4, warmup_steps=0, learning_rate=0.02, average_decay=0.5, save_every=2)
    for stop_after in (2, None):
        if stop_after is None:  # resumed
            model = tiny_model()
            add_adapters(model, 4)
        found = train(model, generated(coloured_squares, 0), config, tmp_path, stop_after=stop_after).model
    whole = merged(found)
    after = whole.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"logit_scale", "logit_bias"} | {
        f"{tower}_model.encoder.layers.0.{part}.weight"
        for tower in ("text", "vision")
        for part in ("mlp.fc1", "mlp.fc2", *(f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")))
    }
    batch = coloured_squares(0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (each(batch.input_ids, batch.pixel_values[0]).logits_per_image for each in (found, whole))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
