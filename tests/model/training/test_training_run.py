"""What `siglip train` makes of settings: the model that is trained, its loss, and what a run with adapters leaves."""

import math

import pytest
import torch
from captioned import save_folder
from coloured_squares import weights
from tiny_checkpoint import shared_tiny_checkpoint

from siglip_model import SiglipModel
from siglip_model.training.parallel import make_loss
from siglip_model.training.processes import Processes
from siglip_model.training.run import load, run
from siglip_model.training.settings import RunSettings

ALONE = Processes(torch.device("cpu"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shared_tiny_checkpoint(tmp_path_factory)


def settings(checkpoint, **more) -> RunSettings:
    fixed = dict(data="d", out="o", steps=2, warmup_steps=0, log_every=1, batch_size=4, num_workers=0, device="cpu")
    return RunSettings(model=str(checkpoint), **{**fixed, **more})


@pytest.mark.parametrize(
    ("more", "scale", "bias"),
    [
        ({}, 2.0, -0.5),  # the checkpoint's
        ({"paper_logits": True}, math.log(10), -10),
        ({"weights": "random"}, math.log(10), -10),
    ],
)
def test_where_weights_and_the_logits_parameters_come_from(checkpoint, more, scale, bias):
    model, _ = load(settings(checkpoint, **more), ALONE)
    assert model.logit_scale.item() == pytest.approx(scale) and model.logit_bias.item() == pytest.approx(bias)
    kept = torch.equal(model.vision_model.head.probe, SiglipModel.from_pretrained(checkpoint).vision_model.head.probe)
    assert kept is (more.get("weights") != "random")


def test_the_loss_is_of_all_processes_unless_it_shall_not_be(checkpoint):
    one_of_two = Processes(torch.device("cpu"), rank=1, world=2)
    losses = [make_loss(settings(checkpoint, global_loss=each), one_of_two) for each in (True, False)]
    assert [loss.world_size for loss in losses] == [2, 1]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_with_adapters_leaves_a_model_without(checkpoint, tmp_path):
    pytest.importorskip("peft")
    data = save_folder(tmp_path / "data", 4)
    more = {"lora_rank": 2, "freeze": "vision", "micro_batch": 3, "average_decay": 0.0}
    drawn, again = (weights(load(settings(checkpoint, lora_rank=2), ALONE)[0]) for _ in range(2))
    assert torch.equal(drawn, again)
    run(settings(checkpoint, data=str(data), out=str(tmp_path / "run"), **more), show_progress=False)
    before, after = (
        SiglipModel.from_pretrained(path).state_dict() for path in (checkpoint, tmp_path / "run" / "model")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "text_model.encoder.layers.1.mlp.fc2.weight" in changed
    assert all(name.startswith(("text_model.encoder.layers", "logit")) for name in changed)
