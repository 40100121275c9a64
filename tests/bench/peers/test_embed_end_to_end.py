"""Bulk embedding beside transformers with a DataLoader: both contenders' rows are right, and the stages are told."""

import pytest
import torch
from bench_helpers import PROBE
from PIL import Image

from bench.cases.operations import OPERATIONS, Setting
from bench.cases.photos import DIFFERENT, photos
from bench.cases.shapes import EmbedShape, parse
from bench.measure.measure import Plan, measure
from bench.peers import peers_of
from bench.report.tables import group_table, groups


def test_both_contenders_embed_the_same_files_of_the_demo_checkpoint(monkeypatch):
    pytest.importorskip("torchvision", reason="transformers' image processor needs it")
    monkeypatch.setattr("bench.measure.measure.peaks_in_a_process", lambda setting, names: dict.fromkeys(names))
    shape = EmbedShape("demo-n5-b2", "demo", 5, 2, workers=1, width=96, height=64)
    setting = Setting(OPERATIONS["embed"], shape, torch.float32, "cpu", "fwd")
    entries = [entry for entry in peers_of("embed").values() if not entry.cuda]
    rows = []
    measure("embed", setting, entries, PROBE, Plan(0.0, 1), rows.append)
    named = {row.impl: row for row in rows}
    assert set(named) == {"siglip_model:sdpa", "siglip_model:sdpa#2", "siglip_model:sdpa:bf16", "transformers:sdpa"}
    assert {row.status for row in rows} == {"ok"}, [row.reason for row in rows]
    half = named.pop("siglip_model:sdpa:bf16")
    assert half.precision == "bf16" and 0.9995 < half.least_cosine < 1 - 1e-6
    assert all(row.error_vs_fp64 < 1e-5 and row.least_cosine > 1 - 1e-6 for row in named.values())
    assert "decode" in named["siglip_model:sdpa"].reason and "bound by" in named["siglip_model:sdpa"].reason
    ours = named["siglip_model:sdpa"]
    assert ours.images_per_second == 5e3 / ours.ms_median
    (group,) = groups(rows)
    table = group_table(group)
    assert "| images/s |" in table and f"| {ours.images_per_second:.3g} |" in table


def test_photos_are_jpeg_files_of_which_the_first_differ():
    paths = photos(DIFFERENT + 1, 32, 16)
    assert len(set(paths)) == len(paths)
    with Image.open(paths[0]) as one, Image.open(paths[1]) as other, Image.open(paths[-1]) as last:
        assert one.size == (32, 16) and one.format == "JPEG"
        assert one.tobytes() != other.tobytes() and one.tobytes() == last.tobytes()


def test_sizes_on_the_command_line():
    shape = parse(EmbedShape, "model=demo,images=8,batch=4,workers=3,width=640,height=480")
    assert (shape.images, shape.workers, shape.width) == (8, 3, 640)
    with pytest.raises(ValueError, match="8x512; supported: from 16"):
        EmbedShape("x", "demo", 8, 4, width=8)
