"""Small models of this project and of transformers with the same weights, in forward and training."""

import pytest
import torch
from bench_helpers import PROBE

from bench.cases.operations import OPERATIONS, Setting, model_weights
from bench.cases.shapes import MODELS, Model, ModelShape, NaFlexShape, Tower, TrainShape
from bench.measure.measure import Plan, measure
from bench.peers import peers_of


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    vision, text = Tower(32, 48, 2, 2, 4, 16, 32), Tower(32, 48, 2, 2, 64)
    monkeypatch.setitem(MODELS, "tiny", Model("tiny", vision, text))
    monkeypatch.setitem(MODELS, "tiny-naflex", Model("tiny-naflex", Tower(32, 48, 2, 2, 16, 8, 32), text))
    monkeypatch.setattr("bench.measure.measure.peaks_in_a_process", lambda setting, names: dict.fromkeys(names))


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        ("vision_tower", ModelShape("tiny-b3", "tiny", 3)),
        ("naflex_tower", NaFlexShape("tiny-naflex-b3", "tiny-naflex", 3)),
        ("siglip", ModelShape("tiny-b3-l1", "tiny", 3, layers=1, text=True)),
        ("training_step", TrainShape("tiny-b4", "tiny", 4)),
    ],
)
def test_models_that_a_cpu_has(operation, shape):
    (direction,) = OPERATIONS[operation].directions
    setting = Setting(OPERATIONS[operation], shape, torch.float32, "cpu", direction)
    entries = [entry for entry in peers_of(operation).values() if not entry.cuda]
    rows = []
    measure("model", setting, entries, PROBE, Plan(0.0, 2), rows.append)
    named = {row.impl: row for row in rows}
    assert {"transformers:eager", "transformers:sdpa", "siglip_model:eager", "siglip_model:sdpa"} <= set(named)
    assert {row.status for row in rows} == {"ok"}, [row.reason for row in rows]
    assert all(row.error_vs_fp64 < 1e-5 for row in rows)
    for name in ("transformers:sdpa", "siglip_model:sdpa"):
        assert ("SDPA ran" in named[name].reason) == (operation != "naflex_tower")


def test_weights_are_the_same_for_every_contender():
    setting = Setting(OPERATIONS["vision_tower"], ModelShape("tiny-b1", "tiny", 1), torch.float32, "cpu", "fwd")
    entries = peers_of("training_step")
    trained = Setting(OPERATIONS["training_step"], TrainShape("t", "tiny", 2), torch.float32, "cpu", "fwd+bwd")
    project, peer = (entries[name].prepare(trained) for name in ("siglip_model:sdpa", "transformers:sdpa"))
    assert set(project.parameters) == set(peer.parameters)
    for name, parameter in project.parameters.items():
        assert parameter.data_ptr() == peer.parameters[name].data_ptr(), name
    assert model_weights(setting).keys() == model_weights(trained).keys()
