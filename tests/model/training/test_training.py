"""The training loop on one process: it learns, averages, skips bad steps, and resumes exactly."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from coloured_squares import coloured_squares, log_of, tiny_model, weights
from PIL import Image

from siglip_kernels import SigLipLoss
from siglip_model import SiglipModel, onednn
from siglip_model.training.average import average_weights
from siglip_model.training.batch import Batch, generated
from siglip_model.training.log import RunLog
from siglip_model.training.loop import Trained
from siglip_model.training.loop import train as train_on
from siglip_model.training.objective import Embedder, freeze, mean_loss
from siglip_model.training.optimizer import layer_factor, learning_rate_factor, make_optimizers
from siglip_model.training.peak import peak_of
from siglip_model.training.settings import TrainingConfig
from siglip_model.training.skipped import Skipped

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def train(model, config, directory, make=coloured_squares, **more) -> Trained:
    return train_on(model, generated(make, config.seed), config, directory, show_progress=False, **more)


def test_a_tiny_model_learns_to_name_colours(tmp_path):
    config = TrainingConfig(steps=150, learning_rate=5e-3, warmup_steps=10, average_decay=0.9, log_every=10)
    model = train(tiny_model(), config, tmp_path).model
    log = log_of(tmp_path)
    assert log[-1]["step"] == 150
    assert log[-1]["loss"] < log[0]["loss"] / 3
    assert not model.training
    batch = coloured_squares(10**6, torch.Generator().manual_seed(2))  # never seen
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, pixel_values=batch.pixel_values[0]).logits_per_image
    assert logits.argmax(1).tolist() == list(range(6))


@pytest.mark.parametrize("more", [{"micro_batch": 4}, {"optimizer": "muon", "freeze": "text"}, {"average_decay": 0.0}])
def test_an_interrupted_run_ends_bitwise_where_an_uninterrupted_one_does(tmp_path, more):
    config = TrainingConfig(steps=9, warmup_steps=3, log_every=1, save_every=4, **more)
    whole = train(tiny_model(), config, tmp_path / "whole").model

    parts = tmp_path / "parts"
    assert train(tiny_model(), config, parts, stop_after=5).steps == 5
    torch.manual_seed(99)  # what happens in between does not matter, nor does the second model's initialisation
    resumed = train(tiny_model(seed=7), config, parts).model

    assert torch.equal(weights(whole), weights(resumed))
    assert log_of(tmp_path / "whole") == log_of(parts)
    assert [path.name for path in sorted((parts / "checkpoints").iterdir())] == ["step-00000008", "step-00000009"]


KILLED = """
import os, sys
sys.path[:0] = ["tests/support"]
import torch.distributed.checkpoint as dcp
from coloured_squares import coloured_squares, tiny_model
from siglip_model.training.batch import generated
from siglip_model.training.loop import train
from siglip_model.training.settings import TrainingConfig

where, folder = sys.argv[1:]
kill = lambda *_, **__: os.kill(os.getpid(), 9)

def make(number, generator):
    if where == "step" and number == 8:
        kill()
    return coloured_squares(number, generator)

if where != "step":
    method, saves = getattr(dcp.FileSystemWriter, where), []
    def counted(*arguments, **more):
        saves.append(0)
        return kill() if len(saves) == 2 else method(*arguments, **more)
    setattr(dcp.FileSystemWriter, where, counted)
train(tiny_model(), generated(make, 0), TrainingConfig(steps=9, warmup_steps=3, log_every=1, save_every=4), folder)
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(tiny_model(), TrainingConfig(steps=9, warmup_steps=3, log_every=1, save_every=4), folder), folder


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("step", {4: True}),
        pytest.param("write_data", {4: True, 8: False}, marks=pytest.mark.thorough),
        ("finish", {4: True, 8: False}),
    ],
)
def test_a_run_that_is_killed_resumes_from_its_last_complete_checkpoint(where, left, uninterrupted, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, where, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = {int(path.name[5:]): (path / ".metadata").exists() for path in (tmp_path / "checkpoints").iterdir()}
    assert left.items() <= found.items()  # the last one is written while training continues
    whole, folder = uninterrupted
    config = TrainingConfig(steps=9, warmup_steps=3, log_every=1, save_every=4)
    assert torch.equal(weights(train(tiny_model(seed=5), config, tmp_path).model), weights(whole.model))
    assert log_of(tmp_path) == log_of(folder)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"freeze": "vision", "recompute": True, "average_decay": 0.0},
        {"freeze": "text", "optimizer": "muon"},
        pytest.param({"compile": True}, marks=pytest.mark.thorough),
    ],
)
def test_micro_batches_train_as_the_whole_batch_does(more, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    losses, ends, frozen = [], [], more.get("freeze")
    seen: dict[str, list[int]] = {"text": [], "vision": []}
    for micro_batch in (None, 4):
        config = TrainingConfig(steps=5, warmup_steps=2, log_every=1, micro_batch=micro_batch, **more)
        model = tiny_model()
        if not config.compile:  # which would recompile for the hook
            for name, found in seen.items():
                tower = getattr(model, f"{name}_model")
                tower.register_forward_hook(lambda _, inputs, __, found=found: found.append(len(inputs[0])))
        ends.append(weights(train(model, config, tmp_path / str(micro_batch)).model))
        losses.append([entry["loss"] for entry in log_of(tmp_path / str(micro_batch))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (ends[0] - ends[1]).norm() < 1e-2 * (ends[0] - weights(tiny_model())).norm()
    if frozen:  # a tower that is not trained stays as it was
        name = f"{frozen}_model"
        assert torch.equal(weights(getattr(model, name)), weights(getattr(tiny_model(), name)))
    if not config.compile:
        for name, views in (("text", 1), ("vision", 2)):
            passes = 1 if name == frozen else 2  # one that is not trained runs once
            assert seen[name] == [views * size for size in [6] * 5 + [4, 2] * passes * 5], name


@pytest.mark.parametrize("more", [{"freeze": "vision"}, {"micro_batch": 4}])
def test_training_does_not_depend_on_which_library_is_faster(more, tmp_path, monkeypatch):
    losses = []
    for faster in (False, True):  # as measured in each process
        monkeypatch.setattr(onednn, "is_faster", lambda faster=faster: faster)
        monkeypatch.setattr(onednn, "_product", lambda *_: pytest.fail("oneDNN is used"))
        config = TrainingConfig(steps=2, warmup_steps=0, log_every=1, **more)
        train(tiny_model(), config, tmp_path / str(faster))
        losses.append(log_of(tmp_path / str(faster)))
    assert losses[0] == losses[1]
    with torch.no_grad(), pytest.raises(pytest.fail.Exception, match="oneDNN is used"):
        tiny_model().get_text_features(torch.ones(6, 4, dtype=torch.int64))


def test_a_run_that_should_stop_saves_first(tmp_path):
    config = TrainingConfig(steps=6, warmup_steps=1, log_every=1)
    asked = iter([False, False, True])
    assert train(tiny_model(), config, tmp_path, should_stop=lambda: next(asked)).steps == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert train(tiny_model(), config, tmp_path).steps == 6


def test_a_run_that_should_stop_at_its_end_evaluates(tmp_path):
    config = TrainingConfig(steps=2, warmup_steps=0, evaluate_every=1)
    asked = iter([False, True])
    trained = train(
        tiny_model(), config, tmp_path, evaluate=lambda step, _: {"top1": step}, should_stop=lambda: next(asked)
    )
    assert (trained.steps, trained.scores) == (2, {"top1": 2})


def test_another_seed_gives_other_batches(tmp_path):
    runs = [
        train(tiny_model(), TrainingConfig(steps=2, warmup_steps=0, seed=seed), tmp_path / str(seed)).model
        for seed in (0, 1)
    ]
    assert not torch.equal(weights(runs[0]), weights(runs[1]))


def test_learning_rate_rises_linearly_then_falls_as_a_cosine():
    config = TrainingConfig(steps=110, warmup_steps=10)
    assert [learning_rate_factor(step, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate_factor(10, config) == 1.0
    assert learning_rate_factor(60, config) == pytest.approx(0.5)
    assert learning_rate_factor(35, config) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate_factor(110, config) == pytest.approx(0.0)


def test_each_step_has_the_learning_rate_of_the_schedule(tmp_path):
    config = TrainingConfig(steps=5, learning_rate=2e-3, warmup_steps=2, log_every=1)
    for stop_after in (3, None):  # resumed in the middle
        train(tiny_model(), config, tmp_path, stop_after=stop_after)
    expected = [2e-3 * learning_rate_factor(step, config) for step in range(5)]
    assert [entry["learning_rate"] for entry in log_of(tmp_path)] == expected


def test_loss_is_the_papers_over_each_view():
    model = tiny_model().double()
    batch = coloured_squares(0, torch.Generator().manual_seed(0))
    pixels = batch.pixel_values.double()
    expected = []
    for view in pixels:
        images = F.normalize(model.get_image_features(view).pooler_output, dim=-1)
        texts = F.normalize(model.get_text_features(batch.input_ids).pooler_output, dim=-1)
        logits = images @ texts.T * 10 - 10  # t' = log 10, b = -10
        terms = [
            F.softplus(-logits[i, j] if i == j else logits[i, j]) for i in range(len(texts)) for j in range(len(texts))
        ]
        expected.append(sum(terms) / len(texts))
    loss = mean_loss(Embedder(model)(batch.input_ids, pixels), SigLipLoss())
    torch.testing.assert_close(loss.double(), sum(expected) / 2, atol=1e-5, rtol=1e-5)


def test_one_view_needs_no_dimension_of_its_own():
    embedder, batch = Embedder(tiny_model()), coloured_squares(0, torch.Generator().manual_seed(0))
    flat, nested = (embedder(batch.input_ids, pixels) for pixels in (batch.pixel_values[0], batch.pixel_values[:1]))
    assert torch.equal(flat.images, nested.images)
    assert not any(result._is_view() for result in nested)  # which FSDP2 warns of


def test_bfloat16_is_close_and_keeps_float32_weights(tmp_path):
    model, batch = tiny_model(), coloured_squares(0, torch.Generator().manual_seed(0))
    inputs = batch.input_ids, batch.pixel_values
    embedders = Embedder(model), Embedder(model, autocast=torch.bfloat16)
    exact, rounded = (mean_loss(embedder(*inputs), SigLipLoss()) for embedder in embedders)
    assert rounded.dtype == torch.float32
    assert exact.item() != rounded.item()
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
    trained = train(model, TrainingConfig(steps=2, warmup_steps=0, bfloat16=True), tmp_path).model
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_triton_backend_trains_as_eager_does(bfloat16, tmp_path):
    config = TrainingConfig(steps=2, warmup_steps=0, bfloat16=bfloat16, log_every=1)
    for backend in ("eager", "triton"):
        model = tiny_model()
        model.set_backend(backend)
        train(model, config, tmp_path / backend)
    logs = [[entry["loss"] for entry in log_of(tmp_path / backend)] for backend in ("eager", "triton")]
    assert logs[1] == pytest.approx(logs[0], rel=0.01 if bfloat16 else 1e-5)


def groups_of(model: SiglipModel, config: TrainingConfig) -> dict[str, tuple[str, float, float]]:
    """Optimizer, weight decay and learning rate of each trained parameter."""
    found = {
        id(parameter): (type(optimizer).__name__, group["weight_decay"], group["lr"])
        for optimizer in make_optimizers(model, config)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: found[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in found}


def test_biases_norms_and_logit_parameters_are_not_decayed():
    for name, (_, decay, _) in groups_of(tiny_model(), TrainingConfig(steps=1, warmup_steps=0)).items():
        vector = name.endswith("bias") or "norm" in name or name.startswith("logit")
        assert decay == (0.0 if vector else 0.1), name


def test_muon_trains_the_layers_matrices_and_a_frozen_tower_is_in_no_group():
    model = tiny_model()
    freeze(model.train(), "vision")
    assert not model.vision_model.training and model.text_model.training
    groups = groups_of(model, TrainingConfig(steps=1, warmup_steps=0, optimizer="muon"))
    assert {name for name, (kind, *_) in groups.items() if kind == "Muon"} == {
        f"text_model.encoder.layers.0.{part}.weight"
        for part in ("mlp.fc1", "mlp.fc2", *(f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")))
    }
    assert not any(name.startswith("vision_model") for name in groups)
    assert "logit_scale" in groups and "text_model.embeddings.token_embedding.weight" in groups


def test_the_learning_rate_decays_by_layer_towards_the_inputs():
    model = tiny_model(layers=2)
    for name, factor in {
        "vision_model.embeddings.patch_embedding.weight": 0.125,
        "vision_model.encoder.layers.0.mlp.fc1.weight": 0.25,
        "text_model.encoder.layers.1.mlp.fc1.weight": 0.5,
        "vision_model.head.probe": 1,
        "logit_scale": 1,
    }.items():
        assert layer_factor(name, model, 0.5) == factor, name
    groups = groups_of(model, TrainingConfig(steps=1, warmup_steps=0, layer_decay=0.5, learning_rate=1.0))
    assert groups["vision_model.encoder.layers.0.mlp.fc1.weight"][2] == 0.25


@pytest.mark.parametrize(
    ("limits", "scale", "bias"),
    [
        ({}, 10, -10),
        ({"max_scale": 5, "min_bias": -8}, 5, -8),
        ({"min_scale": 20, "max_bias": -12}, 20, -12),
        ({"min_scale": 1, "max_scale": 1, "min_bias": 0, "max_bias": 0}, 1, 0),
    ],
)
@pytest.mark.parametrize("average_decay", [0.0, 0.998])
def test_temperature_and_bias_are_clamped(limits, scale, bias, average_decay, tmp_path):
    """Those of the average, too, which begins with the model's."""
    model = tiny_model()
    config = TrainingConfig(steps=1, warmup_steps=0, learning_rate=1e-9, average_decay=average_decay, **limits)
    result = train(model, config, tmp_path).model
    for found in (model, result):
        assert (found.logit_scale.exp().item(), found.logit_bias.item()) == pytest.approx((scale, bias))


def test_the_average_leaves_the_model_alone():
    model = tiny_model()
    average = average_weights(model, 0.5)
    before = weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.n_averaged.fill_(1000)
    average.update_parameters(model)
    torch.testing.assert_close(weights(average.module), before + 0.5)
    torch.testing.assert_close(weights(model), before + 1)


def test_the_decay_of_the_average_grows():
    model = tiny_model()
    average = average_weights(model, 0.9)
    before = weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update_parameters(model)
    torch.testing.assert_close(weights(average.module), before + 0.9)  # 1/10 of the initial weights
    average.update_parameters(model)
    torch.testing.assert_close(weights(average.module), before + 1 - 0.1 * 2 / 11)


def with_nan(numbers):
    def make(number, generator):
        batch = coloured_squares(number, generator)
        return Batch(batch.input_ids, batch.pixel_values * (math.nan if number in numbers else 1), batch.names)

    return make


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path):
    config = TrainingConfig(steps=4, warmup_steps=0, average_decay=0.0, log_every=1, save_every=2)
    model = train(tiny_model(), config, tmp_path, make=with_nan({1, 3})).model
    assert all(math.isfinite(value) for value in weights(model).tolist())
    log = log_of(tmp_path)
    assert [entry["loss"] is None for entry in log] == [False, True, False, True]
    assert [entry["bad_steps"] for entry in log] == [0, 1, 1, 2]
    json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)


def test_steps_in_a_row_that_are_not_finite_end_the_run_and_name_their_samples(tmp_path):
    config = TrainingConfig(steps=9, warmup_steps=0, max_bad_steps=3)
    with pytest.raises(FloatingPointError, match=r"not finite in 3 steps in a row, the last of them step 4; .* colour"):
        train(tiny_model(), config, tmp_path, make=with_nan({1, 2, 3}))


def test_evaluations_are_logged_and_see_the_averages(tmp_path):
    seen = []

    def evaluate(step, model):
        assert not model.training
        seen.append(weights(model))
        return {"score": step}

    config = TrainingConfig(steps=5, warmup_steps=0, evaluate_every=2, average_decay=0.5)
    trained = train(tiny_model(), config, tmp_path, evaluate=evaluate)
    assert [entry for entry in log_of(tmp_path) if "evaluation" in entry] == [
        {"step": step, "evaluation": {"score": step}, "evaluation_data": None} for step in (2, 4, 5)
    ]
    assert torch.equal(seen[-1], weights(trained.model)) and not torch.equal(seen[0], seen[1])


def test_curves_and_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainingConfig(steps=4, warmup_steps=0, log_every=1, save_every=2, evaluate_every=2, tensorboard=True)
    for stop_after in (3, None):
        train(tiny_model(), config, tmp_path, evaluate=lambda step, _: {"n": 3, "top1": 0.5}, stop_after=stop_after)
    assert Image.open(tmp_path / "curves.png").size == (1080, 384)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [entry["loss"] for entry in log_of(tmp_path) if "loss" in entry]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert [(event.step, event.value) for event in events.Scalars("top1")] == [(2, 0.5), (4, 0.5)]


def test_what_cannot_go_on_says_why(tmp_path):
    train(tiny_model(), TrainingConfig(steps=2, warmup_steps=0), tmp_path)
    with pytest.raises(ValueError, match=r"step-00000002 is of another run \(learning_rate was 0.001, is 0.01\)"):
        train(tiny_model(), TrainingConfig(steps=2, warmup_steps=0, learning_rate=0.01), tmp_path)


@pytest.mark.parametrize(
    ("name", "length", "reason"),
    [
        (".metadata", 0, "EOFError: Ran out of input"),
        (".metadata", 99, "UnpicklingError: pickle data was truncated"),
        ("__0_0.distcp", 99, "EOFError"),
        ("run.json", 9, "JSONDecodeError: "),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_resumed(name, length, reason, tmp_path):
    config = TrainingConfig(steps=2, warmup_steps=0, save_every=1)
    weights_after = weights(train(tiny_model(), config, tmp_path).model)
    last = tmp_path / "checkpoints" / "step-00000002"
    (last / name).write_bytes((last / name).read_bytes()[:length])
    with pytest.raises(OSError, match=rf"step-00000002 cannot be read; remove it to resume .* \({reason}"):
        train(tiny_model(), config, tmp_path)
    shutil.rmtree(last)
    assert torch.equal(weights(train(tiny_model(), config, tmp_path).model), weights_after)


def test_what_is_not_of_a_run_is_neither_removed_nor_replaced(tmp_path):
    config = TrainingConfig(steps=1, warmup_steps=0)
    for name in ("step-100/a", "step-00000009/a"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000008").mkdir()  # what a killed run leaves
    train(tiny_model(), config, tmp_path)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["step-00000001", "step-00000009", "step-100"]
    (tmp_path / "log.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"log.jsonl is not of a run \(Expecting value"):
        train(tiny_model(), config, tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == "mine\n"


def test_a_complete_run_is_evaluated_again_on_other_data(tmp_path):
    config, asked = TrainingConfig(steps=2, warmup_steps=0), []
    for data, name in (("a", "top1"), ("b", "recall"), ("b", "recall")):

        def evaluate(step, model, data=data, name=name):
            asked.append(data)
            return {name: 0.5}

        assert train(tiny_model(), config, tmp_path, evaluate=evaluate, evaluation_data=data).scores == {name: 0.5}
    assert asked == ["a", "b"] and (tmp_path / "curves.png").exists()


def test_an_evaluation_that_was_interrupted_is_made_up_for(tmp_path):
    config = TrainingConfig(steps=4, warmup_steps=0, evaluate_every=2, save_every=2)

    def interrupted(step, model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), config, tmp_path, evaluate=interrupted)
    for _ in range(2):  # a complete run knows its scores
        assert train(tiny_model(), config, tmp_path, evaluate=lambda step, _: {"top1": step}).scores == {"top1": 4}
    assert [entry["step"] for entry in log_of(tmp_path) if "evaluation" in entry] == [2, 4]


def test_an_interrupted_run_ends_when_its_checkpoint_is_whole(tmp_path, monkeypatch):
    class SlowWriter(dcp.FileSystemWriter):
        def write_data(self, *arguments):
            time.sleep(0.3)
            return super().write_data(*arguments)

    def interrupted(step, model):
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp, "FileSystemWriter", SlowWriter)
    config = TrainingConfig(steps=4, warmup_steps=0, evaluate_every=2, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), config, tmp_path, evaluate=interrupted)
    assert (tmp_path / "checkpoints" / "step-00000002" / ".metadata").exists()


def test_samples_are_named_by_the_time_of_a_checkpoint_and_each_once(tmp_path):
    def make(number, generator):
        batch = coloured_squares(number, generator)
        return dataclasses.replace(batch, skipped=(Skipped("always", "a"), Skipped(f"{number}", "b")))

    config = TrainingConfig(steps=5, warmup_steps=0, save_every=2, log_every=5)
    for stop_after in (3, None):  # step 3 is saved and named
        train(tiny_model(), config, tmp_path, make=make, stop_after=stop_after)
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000003", ignore_errors=True)  # as if killed in step 3
        with open(tmp_path / "skipped.jsonl", "a") as file:
            file.write('{"name": "cut o')
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()[:-1]
    found = [(entry["step"], entry["name"]) for entry in map(json.loads, lines)]
    assert found == [(2, "always"), (2, "0"), (2, "1"), (4, "2"), (4, "3"), (5, "4")]
    assert log_of(tmp_path)[-1]["skipped"] == 6


def test_a_batch_whose_texts_and_pictures_differ_in_number_is_refused():
    with pytest.raises(ValueError, match=r"pixel_values \(2, 5, 3, 8, 8\) for 6 texts"):
        Batch(torch.ones(6, 4, dtype=torch.int64), torch.zeros(2, 5, 3, 8, 8))


def test_peaks_are_known_by_the_name_of_a_gpu():
    for name, peak in {
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A100 80GB PCIe": 312,
        "NVIDIA A10": 125,
        "NVIDIA A10G": 70,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200 NVL": 835,
        "NVIDIA GB200": 2500,
        "NVIDIA L4": 121,
        "NVIDIA L40S": 362,
        "NVIDIA GeForce RTX 4090": 165,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA GeForce RTX 3090 Ti": None,
        "NVIDIA H200 MIG 1g.18gb": None,
        "NVIDIA A100-10C": None,
        "Tesla T4": None,
    }.items():
        assert peak_of(name) == peak, name


def test_mfu_is_left_out_on_a_device_of_unknown_peak(tmp_path):
    train(tiny_model(), TrainingConfig(steps=1, warmup_steps=0), tmp_path)
    assert "mfu" not in json.loads((tmp_path / "log.jsonl").read_text())


def test_mfu_is_the_share_of_the_stated_peak(tmp_path):
    config = TrainingConfig(steps=1, warmup_steps=0, peak_tflops=1e-3, log_every=1)
    train(tiny_model(), config, tmp_path)
    (entry,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    with RunLog(tmp_path, 1, 1, writes=True, show_progress=True) as log:
        log.show({**entry, "mfu": 0.4321, "images_per_second": 7.2})
        assert log.progress.tasks[0].description == f"loss {entry['loss']:.3f}  7 images/s  43.2% MFU"
    multiply_adds = 2 * 32 * (4 * 48)  # four patches of 4 x 4 x 3 values; the rest is more
    assert entry["mfu"] * 1e9 / entry["images_per_second"] > 3 * multiply_adds
