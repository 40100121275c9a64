"""Towers of a small model in every precision and runtime of a CPU; what is not installed says how to install it."""

import pytest
import torch
from bench_helpers import PROBE

from bench.cases.operations import OPERATIONS, Setting
from bench.cases.shapes import MODELS, Model, ModelShape, TextShape, Tower
from bench.measure.measure import Plan, measure
from bench.peers import peers_of
from bench.peers.cpu import EXPORTS

SHAPES = {
    "image_features": ModelShape("tiny-b3", "tiny-towers", 3),
    "text_features": TextShape("tiny-text-b3", "tiny-towers", 3),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    model = Model("tiny-towers", Tower(64, 96, 1, 2, 4, 16, 32), Tower(64, 96, 1, 2, 64))
    monkeypatch.setitem(MODELS, "tiny-towers", model)
    monkeypatch.setenv(EXPORTS, str(tmp_path))
    monkeypatch.setattr("bench.measure.measure.peaks_in_a_process", lambda setting, names: dict.fromkeys(names))


def measured(operation, chosen):
    setting = Setting(OPERATIONS[operation], SHAPES[operation], torch.float32, "cpu", "fwd")
    entries = [entry for name, entry in peers_of(operation).items() if chosen(name)]
    rows = []
    measure("cpu", setting, entries, PROBE, Plan(0.0, 1), rows.append)
    return {row.impl: row for row in rows}


@pytest.mark.parametrize("operation", SHAPES)
def test_every_contender_but_the_compiled(operation):
    for module in ("transformers", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    rows = measured(operation, lambda name: ":compile" not in name)
    openvino = [rows.pop(name) for name in ("openvino", "openvino:bf16") if rows[name].status == "missing"]
    assert all(row.reason.startswith("pip install") and "openvino" in row.reason for row in openvino)
    assert {row.status for row in rows.values()} == {"ok"}, [row.reason for row in rows.values()]
    assert {"siglip_model:sdpa", "transformers:sdpa:int8", "siglip_model:onnxruntime"} < set(rows)
    least = {"": 1 - 1e-6, "bf16": 0.9995, "int8": 0.99}
    for name, row in rows.items():
        assert row.dtype == "fp32" and row.precision == (name.split(":")[-1] if row.precision else "")
        assert least[row.precision] <= row.least_cosine <= 1 + 1e-6, name
        assert (row.least_cosine < 1 - 1e-7) == bool(row.precision), name


@pytest.mark.thorough
def test_the_compiled_contenders():
    rows = measured("image_features", lambda name: ":compile" in name)
    assert {row.status for row in rows.values()} == {"ok"}, [row.reason for row in rows.values()]
    assert rows["siglip_model:sdpa:compile:bf16"].precision == "bf16"
