"""`siglip train` and `siglip evaluate`: a run from the command line, stopped, resumed, and on two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from captioned import save_folder, save_shard, shard_files
from coloured_squares import log_of
from command_line import one_line

from siglip_model import Siglip2ImageProcessor, SiglipModel

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "captioned", 12)


@pytest.fixture
def settings(tmp_path, folder, checkpoint):
    """A file of settings for a short run."""
    path = tmp_path / "run.toml"
    path.write_text(
        f"data = '{folder}'\nmodel = '{checkpoint}'\nsteps = 5\nbatch_size = 4\nwarmup_steps = 1\nlog_every = 1\n"
        "save_every = 2\nnum_workers = 0\ndevice = 'cpu'\n"
    )
    return path


def test_a_run_writes_a_checkpoint_that_transformers_loads(siglip, settings, folder, checkpoint, tmp_path):
    out = tmp_path / "run"
    (folder / "7.png").write_bytes(b"nothing")
    evaluation = ["--evaluation-data", folder, "--evaluate-every", "3"]
    done = siglip("train", "--config", settings, "--out", out, "--learning-rate", "1e-3", *evaluation)
    assert done.exit_code == 0, done.stderr
    steps = [line for line in done.stderr.splitlines() if line.startswith("siglip: step ")]
    assert [line.split()[2] for line in steps] == [f"{step}/5" for step in range(1, 6)]  # log_every = 1
    assert all("  loss " in line and line.endswith(" images/s") for line in steps)
    log, (first, *scores) = log_of(out), done.stdout.splitlines()
    assert first == f"{out / 'model'}: the model after 5 steps"
    assert [line.split()[-1] for line in scores[:3]] == ["retrieval", "11", "22"]
    assert [entry["step"] for entry in log] == [1, 2, 3, 3, 4, 5, 5]
    assert [entry["evaluation"]["texts"] for entry in log if "evaluation" in entry] == [22, 22]
    assert log[-2]["skipped"] == 1
    assert sorted(path.name for path in (out / "predictions").iterdir()) == ["step-00000003.png", "step-00000005.png"]
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [Path(one["name"]).name for one in skipped] == ["7.png"]
    theirs = transformers.SiglipModel.from_pretrained(out / "model").state_dict()
    for name, tensor in SiglipModel.from_pretrained(out / "model").state_dict().items():
        assert torch.equal(theirs[name], tensor), name
    before = SiglipModel.from_pretrained(checkpoint).state_dict()["logit_bias"]
    assert not torch.equal(theirs["logit_bias"], before)
    transformers.AutoProcessor.from_pretrained(out / "model")

    found = siglip("evaluate", "--data", folder, "--model", out / "model", "--device", "cpu", "--json")
    assert found.exit_code == 1 and "7.png: not an image" in found.stderr
    scores = json.loads(found.stdout)
    assert {**scores, "task": ""} == {**log[-1]["evaluation"], "task": ""}

    above = siglip("evaluate", "--data", folder, "--model", out)
    assert above.exit_code == 2 and one_line(above.stderr)
    assert f"{out} has neither" in above.stderr and f"; there is a checkpoint in {out / 'model'}" in above.stderr

    again = siglip("train", "--config", settings, "--out", out, "--learning-rate", "2e-3")
    assert again.exit_code == 2 and one_line(again.stderr)
    assert "is of another run (learning_rate was 0.001, is 0.002)" in again.stderr

    more = ["--learning-rate", "1e-3", "--evaluation-data", settings.parent / "captioned"]
    assert "warning" not in siglip("train", "--config", settings, "--out", out, *more).stderr
    other = save_folder(tmp_path / "other", 3)
    with pytest.warns(UserWarning, match="evaluation_data: scores so far are of '.*captioned'"):
        moved = siglip("train", "--config", settings, "--out", out, *more[:2], "--evaluation-data", other)
    assert [line.split()[-1] for line in moved.stdout.splitlines()[1:4]] == ["retrieval", "3", "6"]
    assert log_of(out)[-1]["evaluation_data"] == str(other)
    without = siglip("train", "--config", settings, "--out", out, *more[:2])
    assert without.stdout.splitlines() == [f"{out / 'model'}: the model after 5 steps"]


def test_new_weights_and_shards(siglip, settings, tmp_path):
    pytest.importorskip("webdataset")
    shard = save_shard(tmp_path / "a.tar", shard_files(range(8)))
    options = ["--data", shard, "--weights", "random", "--out", tmp_path / "run", "--average-decay", "0"]
    done = siglip("train", "--config", settings, *options)
    assert done.exit_code == 0, done.stderr
    first = log_of(tmp_path / "run")[0]
    assert first["scale"] == pytest.approx(10, rel=0.01) and first["bias"] == pytest.approx(-10, rel=0.01)


def test_adapters_are_those_of_the_seed(siglip, settings, tmp_path):
    pytest.importorskip("peft")
    for name in ("one", "two"):
        options = ["--lora-rank", "2", "--steps", "1", "--out", tmp_path / name]
        done = siglip("train", "--config", settings, *options)
        assert done.exit_code == 0, done.stderr
    assert log_of(tmp_path / "one") == log_of(tmp_path / "two")


def test_zero_shot_accuracy_as_a_table(siglip, images, checkpoint, tmp_path):
    (tmp_path / "classes").mkdir()
    images.rename(tmp_path / "classes" / "cat")
    (tmp_path / "classes" / "dog").mkdir()
    templates = ["--template", "{}", "--template", "a photo of {}."]
    done = siglip("evaluate", "--data", tmp_path / "classes", "--model", checkpoint, *templates, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[:4] == [["task", "zero-shot"], ["classes", "2"], ["images", "5"], ["failed", "0"]]
    assert rows[5] == ["top5", "100.0%"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "x"], "steps (--steps) is 'x'; supported: a whole number"),
        (["--batch-size", "13"], "batch_size (--batch-size) is 13; supported: at most the 12 captioned images"),
        (["--parallel", "fsdp"], "parallel (--parallel) is 'fsdp'; supported: ddp in a single process"),
        (["--data", "nowhere"], "data (--data) cannot be used: 'nowhere' is not a folder; supported: a folder"),
        (["--data", "nowhere", "--steps", "3"], "data (--data) cannot be used: 'nowhere' is not a folder"),
        (["--data", "a{0..3}.tar"], "data (--data) cannot be used: no such shard: a0.tar"),
        (
            ["--evaluation-data", "nowhere"],
            "evaluation_data (--evaluation-data) cannot be used: 'nowhere' is not a folder",
        ),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--device", "tpu"], "device (--device) is 'tpu'; supported: auto, cpu, cuda"),
    ],
)
def test_what_is_wrong_is_one_line(siglip, settings, tmp_path, arguments, message):
    done = siglip("train", "--config", settings, "--out", tmp_path / "run", *arguments)
    assert done.exit_code == 2 and one_line(done.stderr) and message in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_exported_model_is_not_evaluated(siglip, folder):
    done = siglip("evaluate", "--data", folder, "--model", "a.onnx")
    assert done.exit_code == 2 and one_line(done.stderr) and "--model is 'a.onnx'; supported: a check" in done.stderr


def test_shards_without_a_sample_are_no_evaluation_data(siglip, settings, tmp_path):
    pytest.importorskip("webdataset")
    (tmp_path / "empty.tar").write_bytes(b"")
    done = siglip("train", "--config", settings, "--out", tmp_path / "run", "--evaluation-data", tmp_path / "empty.tar")
    assert done.exit_code == 2 and one_line(done.stderr) and not (tmp_path / "run").exists()
    assert "evaluation_data (--evaluation-data) cannot be used: " in done.stderr and "empty header" in done.stderr


def test_without_tensorboard_nothing_is_left(siglip, settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = siglip("train", "--config", settings, "--out", tmp_path / "run", "--tensorboard")
    assert done.exit_code == 2 and one_line(done.stderr)
    assert "tensorboard (--tensorboard) needs pip install 'siglip-triton[tensorboard]'" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_processor_of_another_resolution_than_the_models_is_refused(
    siglip, settings, checkpoint, folder, tmp_path, command
):
    native = tmp_path / "native"
    shutil.copytree(checkpoint, native)
    Siglip2ImageProcessor().save_pretrained(native)
    (native / "processor_config.json").unlink(missing_ok=True)
    more = ["--data", folder] if command == "evaluate" else ["--config", settings, "--out", tmp_path / "run"]
    done = siglip(command, *more, "--model", native)
    assert done.exit_code == 2 and one_line(done.stderr)
    assert "the image processor is a Siglip2ImageProcessor; supported by the model: SiglipImageProc" in done.stderr


def test_a_folder_of_something_else_is_refused(siglip, settings, tmp_path):
    (tmp_path / "model").mkdir()
    done = siglip("train", "--config", settings, "--out", tmp_path)
    assert done.exit_code == 2 and one_line(done.stderr)
    assert "supported: a new folder or that of a run; this one holds model" in done.stderr


def test_settings_of_something_else_are_not_replaced(siglip, settings, tmp_path):
    theirs = tmp_path / "settings.toml"
    theirs.write_text("theme = 'dark'")
    done = siglip("train", "--config", settings, "--out", tmp_path)
    assert done.exit_code == 2 and one_line(done.stderr) and theirs.read_text() == "theme = 'dark'"
    assert "a new folder or that of a run; settings.toml is of none" in done.stderr and "'theme'" in done.stderr


def test_classes_without_images_are_refused_before_training(siglip, settings, tmp_path):
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    done = siglip("train", "--config", settings, "--out", tmp_path / "run", "--evaluation-data", tmp_path / "classes")
    assert done.exit_code == 2 and one_line(done.stderr) and not (tmp_path / "run").exists()
    assert "evaluation_data (--evaluation-data) cannot be used: " in done.stderr and "holds an image" in done.stderr


def start(*command: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)


def test_sigterm_saves_and_has_an_exit_code_of_its_own(siglip, settings, tmp_path):
    out = tmp_path / "run"
    more = ["--config", settings, "--out", out, "--steps", "100000", "--save-every", "100000"]
    process = start("-m", "siglip_model", "train", *more, "--num-workers", "1")
    wait_for(out / "log.jsonl", process)
    second = siglip("train", *more)
    assert second.exit_code == 2 and one_line(second.stderr)
    assert f"out (--out) is {str(out)!r}, in which another run is training" in second.stderr
    os.killpg(process.pid, signal.SIGTERM)  # as batch systems do: the worker that reads data gets it too
    stdout, stderr = process.communicate()
    *shown, stderr = stderr.splitlines()
    assert process.returncode == 75 and all(line.startswith("siglip: step ") for line in shown), stderr
    steps = log_of(out)[-1]["step"]
    assert f"stopped by SIGTERM after step {steps} of 100000" in stderr and stdout == ""
    assert (out / "checkpoints" / f"step-{steps:08}" / ".metadata").exists() and not (out / "model").exists()


@pytest.mark.thorough
def test_torchrun_trains_as_one_process_and_ends_when_a_rank_dies(siglip, settings, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "siglip_model", "train"]
    both = start(*torchrun, "--config", settings, "--out", tmp_path / "two")
    assert both.wait() == 0, both.stderr.read()
    assert siglip("train", "--config", settings, "--out", tmp_path / "one").exit_code == 0
    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    more = ["--config", settings, "--out", tmp_path / "dead", "--steps", "100000", "--timeout", "20"]
    dying = start(*torchrun, *more)
    wait_for(tmp_path / "dead" / "log.jsonl", dying)
    children = Path(f"/proc/{dying.pid}/task/{dying.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert dying.wait(timeout=60) != 0
