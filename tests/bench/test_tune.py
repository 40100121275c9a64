"""Tuning with a fake timer: the winner is found by shape class, and the operation then reads its table."""

import contextlib
import dataclasses
import importlib.util
import subprocess
import sys

import pytest
import torch
from bench_helpers import setting
from typer.testing import CliRunner

from bench.cases.shapes import AttentionShape
from bench.cli import app
from bench.compiled.ahead_of_time import GPUS
from bench.measure.timing import Timing
from bench.tune import TUNABLE, time_candidates, tune, write_table
from siglip_kernels.attention import config as attention_config
from siglip_kernels.attention import tuned
from siglip_kernels.attention.config import Tile
from siglip_kernels.device import INTERPRETER, pretend
from siglip_kernels.gemm.kernels import gemm
from siglip_kernels.sigmoid_loss import config as loss_config

FAST, SLOW = Tile(32, 64, 4, 1), Tile(64, 64, 4, 1)
GPU = INTERPRETER.name


def attention(tokens):
    return setting(shape=AttentionShape("tiny", 1, tokens, 1, 16), dtype=torch.bfloat16)


def timer(steps, setting):
    """The time in milliseconds is the number of rows of a tile; every step has to run."""
    assert None in steps
    for step in steps.values():
        step()
    return {fields: Timing(*3 * [99.0 if fields is None else float(fields[0])], rounds=1) for fields in steps}


# The settings are on the CPU, so kernels run in the interpreter, which a machine with a GPU does not use.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tunes in the interpreter")


@pytest.fixture
def two_candidates(monkeypatch):
    monkeypatch.setattr(attention_config, "candidates", lambda kernel, gpu: [SLOW, FAST])


@interpreted
def test_the_fastest_is_chosen_for_each_shape_class(two_candidates):
    wanted = [attention(tokens) for tokens in (65, 66, 130)]
    before = {gpu: dict(entries) for gpu, entries in tuned.TUNED.items()}
    choices = list(tune("attention", wanted, timer))
    assert [choice.key[0] for choice in choices] == ["forward", "forward"]  # 65 and 66 are of one class
    assert choices[0].key[3:] != choices[1].key[3:]
    for choice in choices:
        assert choice.fields == dataclasses.astuple(FAST)
        assert (choice.milliseconds, choice.heuristic_milliseconds, choice.tried) == (32.0, 99.0, 2)
    assert before == tuned.TUNED  # trying a candidate leaves the table unchanged
    known = [choice.key for choice in choices[:1]]
    assert [choice.key for choice in tune("attention", wanted, timer, known=known)] == [choices[1].key]


@interpreted
def test_nothing_is_written_if_the_heuristic_is_fastest(two_candidates):
    def slower(steps, setting):
        return {fields: Timing(*3 * [1.0 if fields is None else 2.0], rounds=1) for fields in steps}

    assert list(tune("attention", [attention(65), attention(66)], slower)) == []


@interpreted
def test_a_candidate_that_is_wrong_or_does_not_run_is_skipped(monkeypatch):
    unfit = Tile(33, 64, 4, 1)  # not a power of two
    monkeypatch.setattr(attention_config, "candidates", lambda kernel, gpu: [unfit, SLOW])
    (choice,) = tune("attention", [attention(65)], timer)
    assert choice.fields == dataclasses.astuple(SLOW) and choice.tried == 1
    monkeypatch.setattr(attention_config, "candidates", lambda kernel, gpu: [unfit])
    assert list(tune("attention", [attention(65)], timer)) == []


def test_trying_reaches_the_operation():
    key = ("forward", 4, 16, 128, 128)
    tunable = TUNABLE["attention"]
    with tunable.trying(GPU, {key: dataclasses.astuple(FAST)}):
        assert attention_config.tile("forward", INTERPRETER, 4, 16, 128, 128) == FAST
    assert attention_config.tile("forward", INTERPRETER, 4, 16, 128, 128) != FAST


def test_the_real_timer_times_every_candidate():
    times = time_candidates({None: lambda: None, (1, 2): lambda: None}, setting())
    assert set(times) == {None, (1, 2)} and all(timing.median >= 0 for timing in times.values())


def test_the_table_is_written_into_another_directory(tmp_path):
    source = TUNABLE["attention"].path()
    untouched = source.read_text()
    first = {("forward", 2, 80, 1024, 1024): (128, 64, 8, 3, 128), ("forward", 2, 64, 256, 256): (64, 64, 4, 2, None)}
    path = write_table(source, "NVIDIA H200", first, tmp_path / "attention" / "tuned.py")
    second = {("forward", 2, 80, 1024, 1024): (128, 128, 8, 2, None)}
    write_table(path, "NVIDIA H200", second)
    write_table(path, "NVIDIA A100", second)
    assert source.read_text() == untouched
    spec = importlib.util.spec_from_file_location("tuned_elsewhere", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TUNED["NVIDIA H200"] == {**first, **second} and module.TUNED["NVIDIA A100"] == second
    assert module.__doc__ == tuned.__doc__ and "TUNED: dict[" in path.read_text()
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "120", str(path)]
    assert subprocess.run(ruff, capture_output=True).returncode == 0, path.read_text()


def test_every_tunable_follows_the_protocol():
    for tunable in TUNABLE.values():
        assert isinstance(tunable.table(), dict) and tunable.path().name == "tuned.py"
        assert callable(tunable.config().candidates)


def test_the_losss_table_is_read():
    gpu = GPUS["h200"]
    plain = loss_config.choose(torch.bfloat16, 768, gpu, "ieee")
    entries = {("product", 2, 768): dataclasses.astuple(loss_config.candidates(2, gpu)[-1])}
    with TUNABLE["sigmoid_loss"].trying(gpu.name, entries):
        tuned_config = loss_config.choose(torch.bfloat16, 768, gpu, "ieee")
    assert tuned_config.product == loss_config.candidates(2, gpu)[-1] != plain.product
    assert tuned_config.logit_grad == plain.logit_grad
    assert loss_config.choose(torch.bfloat16, 768, gpu, "ieee") == plain


def test_linears_candidates_of_a_key():
    """The key is the one that a launch looks up; the launch itself cannot use tensors of the meta device."""
    gpu, linear = GPUS["h200"], TUNABLE["linear"]
    x, weight = (torch.empty(rows, 1152, dtype=torch.bfloat16, device="meta") for rows in (512, 4304))

    def launch():
        with pretend(gpu), contextlib.suppress(Exception):
            gemm(x, [weight], [None])

    (key,) = linear.asked_for(gpu.name, launch)
    config = linear.config()
    candidates = linear.candidates(config, key, gpu)
    assert len(candidates) > 1
    with linear.trying(gpu.name, {key: dataclasses.astuple(candidates[-1])}):
        assert config.tile(config.Shape(*key), gpu) == candidates[-1]


@interpreted
def test_the_command_writes_each_winner_at_once(two_candidates, monkeypatch, tmp_path):
    monkeypatch.setattr("bench.environment.device", lambda: "cuda")
    monkeypatch.setattr("bench.environment.hardware", lambda: "NVIDIA H200")
    monkeypatch.setattr("bench.tune.settings_of", lambda *arguments: [attention(65), attention(130)])
    monkeypatch.setattr("bench.tune.time_candidates", timer)
    result = CliRunner().invoke(app, ["tune", "attention", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    table = (tmp_path / "attention" / "tuned.py").read_text()
    assert table.count('("forward", 2, 16, ') == 2 and '"NVIDIA H200": {' in table
    assert result.output.count("written to") == 2
