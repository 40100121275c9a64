"""Settings: files, options, defaults, and one line for what is wrong."""

import dataclasses
import re

import pytest

from siglip_model.training.settings import RunSettings, TrainingConfig, read_settings

NEEDED = {"steps": 200, "data": "d", "model": "m", "out": "o"}


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path):
    (tmp_path / "run.toml").write_text('steps = 300\nlearning_rate = 1e-4\nmodel = "m"\ndata = "d"\nflip = true\n')
    (tmp_path / "run.yaml").write_text("steps: 300\nlearning_rate: 1e-4\nmodel: m\ndata: d\nflip: true\n")
    given = {"steps": "150", "out": "o", "flip": None, "max_scale": "none", "timeout": 9}
    found = [read_settings(tmp_path / name, given) for name in ("run.toml", "run.yaml")]
    expected = RunSettings(steps=150, learning_rate=1e-4, model="m", data="d", out="o", flip=True, timeout=9.0)
    assert found == [expected, expected]


def test_what_is_written_beside_the_run_gives_the_run_again(tmp_path):
    out = 'a "b" \\ c \n\x7f é 😀 \udcff'  # the last: a byte of a name that is not UTF-8
    settings = RunSettings(**{**NEEDED, "out": out}, learning_rate=3e-05, max_scale=100, flip=True)
    settings.save(tmp_path / "settings.toml")
    assert read_settings(tmp_path / "settings.toml", {}) == settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": "many"}, "steps (--steps) is 'many'; supported: a whole number"),
        ({"steps": 1.5}, "steps (--steps) is 1.5; supported: a whole number"),
        ({"steps": True}, "steps (--steps) is True; supported: a whole number"),
        ({"steps": 0}, "steps (--steps) is 0; supported: from 1"),
        ({"warmup_steps": 201}, "warmup_steps (--warmup-steps) is 201; supported: 0 to steps=200"),
        ({"learning_rate": 0}, "learning_rate (--learning-rate) is 0.0; supported: above 0"),
        ({"learning_rate": "nan"}, "learning_rate (--learning-rate) is 'nan'; supported: finite numbers above 0"),
        ({"max_scale": "1e400"}, "max_scale (--max-scale) is '1e400'; supported: finite numbers above 0"),
        ({"average_decay": 1}, "average_decay (--average-decay) is 1.0; supported: from 0 below 1"),
        ({"max_scale": "big"}, "max_scale (--max-scale) is 'big'; supported: a number or none"),
        ({"min_scale": 2, "max_scale": 1}, "min_scale (--min-scale) is 2.0; supported: at most max_scale=1"),
        ({"min_bias": "inf"}, "min_bias (--min-bias) is 'inf'; supported: finite numbers"),
        ({"min_bias": -9, "max_bias": -10}, "min_bias (--min-bias) is -9.0; supported: at most max_bias=-10"),
        ({"bfloat16": "maybe"}, "bfloat16 (--bfloat16) is 'maybe'; supported: true or false"),
        ({"freeze": "both"}, "freeze (--freeze) is 'both'; supported: none, vision, text"),
        ({"evaluate_every": 5}, "evaluate_every (--evaluate-every) is 5; supported: 0 without evaluation_data"),
        ({"timeout": 1e300}, "timeout (--timeout) is 1e+300; supported: above 0 to 1e+06"),
        ({"data": 3}, "data (--data) is 3; supported: a text"),
        ({"out": ""}, "out (--out) is ''; supported: a text"),
        ({"seed": 2**63}, "seed (--seed) is 9223372036854775808; supported: from 0 to 9.22337e+18"),
    ],
)
def test_what_is_wrong_is_named(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        read_settings(None, {**NEEDED, **given})


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"^data \(--data\) is missing; give it as an option or in a file"):
        read_settings(None, {**NEEDED, "data": None})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "steps =", r"a.toml: Invalid value"),
        ("a.yaml", "steps: [", r"a.yaml: while parsing"),
        ("a.yaml", "steps", r"a.yaml: holds a str; supported: settings"),
        ("a.json", "{}", r"--config is '.*a.json'; supported: files named \*.toml, \*.yaml or \*.yml"),
        ("a.yaml", "seed: 1\nflip: true\nseed: 2", r"a.yaml: 'seed' is given more than once"),
        ("a.toml", "stepz = 1", r"a.toml: unknown setting 'stepz'; known: steps, "),
        ("a.toml", "\ufeffseed = 1.5", r"a.toml: seed \(--seed\) is 1.5; supported: a whole number"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / name, NEEDED)


def test_the_file_is_not_blamed_for_an_option(tmp_path):
    (tmp_path / "a.toml").write_text("seed = 1")
    with pytest.raises(ValueError, match=r"^seed \(--seed\) is -1"):
        read_settings(tmp_path / "a.toml", {**NEEDED, "seed": "-1"})


def test_a_run_is_the_same_whatever_is_logged_and_saved():
    config = TrainingConfig(steps=200)
    for changed, same in {
        "log_every": True,
        "save_every": True,
        "compile": True,
        "seed": False,
        "freeze": False,
    }.items():
        value = {"compile": True, "freeze": "text"}.get(changed, 7)
        assert (dataclasses.replace(config, **{changed: value}).identity() == config.identity()) is same


def test_warm_up_fits_a_short_run(tmp_path):
    for steps, warmup in ((3, 3), (100, 100), (5000, 100)):
        settings = read_settings(None, {**NEEDED, "steps": steps})
        assert settings.warmup_steps == warmup
        settings.save(tmp_path / "settings.toml")
        assert read_settings(tmp_path / "settings.toml", {}) == settings
