"""The trainer on two processes, under DDP and FSDP2: the losses of one process, and its weights and scores."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from captioned import save_folder
from coloured_squares import PAIRS, coloured_squares, log_of, tiny_model, weights
from tiny_checkpoint import random_image, shared_tiny_checkpoint

from siglip_model import SiglipModel, SiglipProcessor
from siglip_model.training.batch import Batch, generated
from siglip_model.training.evaluation.run import evaluate_on
from siglip_model.training.loop import train
from siglip_model.training.lora import add_adapters
from siglip_model.training.processes import Processes, processes_of_group
from siglip_model.training.settings import TrainingConfig

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CONFIG = TrainingConfig(
    steps=20, micro_batch=2, warmup_steps=4, average_decay=0.9, layer_decay=0.9, max_scale=10.01, log_every=1
)
WAYS = {
    "ddp": CONFIG,
    "fsdp": dataclasses.replace(CONFIG, parallel="fsdp", recompute=True, peak_tflops=1.0),
    "fsdp, bf16": dataclasses.replace(CONFIG, steps=3, warmup_steps=0, parallel="fsdp", bfloat16=True),
    "fsdp, muon, lit": dataclasses.replace(
        CONFIG, steps=3, warmup_steps=0, parallel="fsdp", optimizer="muon", freeze="vision", max_bias=-10.001
    ),
    "fsdp, lora": dataclasses.replace(CONFIG, steps=3, warmup_steps=0, parallel="fsdp"),
}


if importlib.util.find_spec("peft") is None:
    del WAYS["fsdp, lora"]


def model_for(name: str, seed: int = 0) -> SiglipModel:
    model = tiny_model(seed)
    if "lora" in name:
        import torchvision_operators  # noqa: F401

        add_adapters(model, 4)
    return model


def share(rank: int, world: int) -> Any:
    def make(number: int, generator: torch.Generator) -> Batch:
        batch, part = coloured_squares(number, generator), slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
        return Batch(batch.input_ids[part], batch.pixel_values[:, part], batch.names[part])

    return generated(make, 0)


def scores(data: dict[str, Path], checkpoint: Path, processes: Processes) -> dict[str, Any]:
    loaded = SiglipModel.from_pretrained(checkpoint), SiglipProcessor.from_pretrained(checkpoint)
    return {name: evaluate_on(str(path), *loaded, processes=processes, batch_size=3) for name, path in data.items()}


def one_of_two(rank: int, folder: Path, data: dict[str, Path], checkpoint: Path) -> dict[str, Any]:
    processes = processes_of_group(torch.device("cpu"))
    found: dict[str, Any] = {"scores": scores(data, checkpoint, processes)}
    asked = iter([False, rank == 1])  # one of them is told to stop
    stopped = train(
        tiny_model(),
        share(rank, 2),
        WAYS["fsdp"],
        folder / "stopped",
        processes=processes,
        should_stop=lambda: next(asked),
    )
    found["stopped"] = stopped.steps
    for name, config in WAYS.items():
        config = dataclasses.replace(config, save_every=7)
        if name == "fsdp":  # interrupted and resumed
            train(tiny_model(), share(rank, 2), config, folder / name, processes=processes, stop_after=10)
        model = model_for(name, seed=3 if name == "fsdp" else 0)
        found[name] = weights(train(model, share(rank, 2), config, folder / name, processes=processes).model)
    return found


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    """Data of both kinds, with a broken image, and the checkpoint that is evaluated on it."""
    folder = tmp_path_factory.mktemp("data")
    captioned = save_folder(folder / "captioned", 11)
    (captioned / "5.png").write_bytes(b"nothing")
    for name, numbers in (("cat", range(3)), ("dog", range(3, 8))):
        (folder / "classes" / name).mkdir(parents=True)
        for number in numbers:
            random_image(number).save(folder / "classes" / name / f"{number}.png")
    return {"retrieval": captioned, "zero-shot": folder / "classes"}, shared_tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, evaluated: tuple) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("together")
    (folder / "ranks").mkdir()
    return folder, ranks.run(one_of_two, 2, folder / "ranks", folder, *evaluated)


def test_all_stop_when_one_is_told_to_and_one_alone_resumes(together: tuple, tmp_path: Path) -> None:
    folder, by_rank = together
    assert [found["stopped"] for found in by_rank] == [2, 2]
    assert (folder / "stopped" / "checkpoints" / "step-00000002" / ".metadata").exists()
    for path in (folder / "stopped", tmp_path):
        train(tiny_model(), share(0, 1), CONFIG, path)
    losses, expected = ([entry["loss"] for entry in log_of(path)] for path in (folder / "stopped", tmp_path))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_two_processes_evaluate_as_one(together: tuple, evaluated: tuple) -> None:
    expected = scores(*evaluated, Processes(torch.device("cpu")))
    assert [expected[name]["images"] for name in ("retrieval", "zero-shot")] == [10, 8]
    for found in together[1]:
        assert found["scores"] == expected


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_train_as_one(name: str, together: tuple, tmp_path: Path) -> None:
    alone = dataclasses.replace(WAYS[name], parallel="ddp", recompute=False, micro_batch=None)
    expected = weights(train(model_for(name), share(0, 1), alone, tmp_path).model)
    folder, by_rank = together
    tolerance = 1e-2 if alone.bfloat16 else 1e-5  # FSDP's layers hold bfloat16, where autocast rounds their products
    losses, expected_losses = ([entry["loss"] for entry in log_of(path)] for path in (folder / name, tmp_path))
    assert len(losses) == alone.steps
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    if alone.bfloat16:
        return
    # AdamW magnifies rounding in gradients that are nearly 0; Muon computes in bfloat16, on shards in another order.
    tolerance = 5e-2 if alone.optimizer == "muon" else 1e-2
    for found in by_rank:
        assert (found[name] - expected).norm() < tolerance * (expected - weights(model_for(name))).norm()
    torch.testing.assert_close(by_rank[0][name], by_rank[1][name], rtol=0, atol=0)
