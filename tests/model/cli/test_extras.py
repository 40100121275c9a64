"""Every optional dependency has an extra, and its absence is an error that names the line which installs it."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import one_line

EXTRAS = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def call(module, function, *arguments):
    return lambda: getattr(importlib.import_module(f"siglip_model.{module}"), function)(*arguments)


USES = [
    ("parquet", "pyarrow", call("embed.sources", "pyarrow_parquet")),
    ("search", "usearch", call("retrieval.approximate", "ApproximateIndex", None)),
    ("ray", "ray", lambda: importlib.import_module("siglip_model.embed.ray")),
    ("onnx", "onnx", call("onnx.file", "imported", "onnx")),
    ("train", "webdataset", call("training.shards", "_webdataset")),
    ("train", "torchvision", call("training.preparation", "_random_resized_crop")),
    ("train", "pyarrow", lambda: next(call("training.captions", "_read_parquet", Path("x.parquet"))())),
    ("lora", "peft", call("training.lora", "_peft")),
    ("tensorboard", "torch.utils.tensorboard", call("training.log", "summary_writer")),
    ("recipe", "resvg_py", call("demo.recipe.emoji", "draw", "<svg/>", 8)),
]


@pytest.mark.parametrize(("extra", "module", "use"), USES, ids=[f"{extra}-{module}" for extra, module, _ in USES])
def test_what_is_missing_is_named_with_its_extra(extra, module, use, monkeypatch):
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "siglip_model.embed.ray", raising=False)
    assert extra in EXTRAS
    with pytest.raises((ImportError, RuntimeError), match=rf"pip install 'siglip-triton\[{extra}\]'"):
        use()


def test_parquet_files_without_pyarrow_end_commands_in_one_line(siglip, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    for words in (
        ("embed", images, "--out", tmp_path / "new.parquet"),
        ("embed", tmp_path / "x.parquet", "--out", tmp_path / "new.safetensors"),
        ("embed", "--texts", tmp_path / "x.parquet", "--out", tmp_path / "texts.safetensors"),
        ("search", tmp_path / "x.parquet", "2 cats"),
    ):
        result = siglip(*words)
        assert result.exit_code == 2 and one_line(result.stderr), words
        assert "pip install 'siglip-triton[parquet]'" in result.stderr, words
