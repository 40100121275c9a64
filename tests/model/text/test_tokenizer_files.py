"""Tokenizer files: saving and loading, files of transformers 4 and 5, damaged and missing files."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from siglip_model.text.auto import AutoTokenizer
from siglip_model.text.siglip import SiglipTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has", "ignore:`max_length` is ignored")


SAMPLES = ["a Cat!", "", "</s>", "<extra>dog", "the photo of 猫, 2 3", "</s> cat </s>"]


class TestFiles:
    def test_transformers_loads_saved_files(self, pairs: list[Any], tmp_path: Path) -> None:
        for number, (tokenizer, _) in enumerate(pairs):
            folder = tmp_path / str(number)
            paths = tokenizer.save_pretrained(folder)
            assert sorted(Path(path).name for path in paths) == ["spiece.model", "tokenizer_config.json"]
            reference, again = (
                transformers.SiglipTokenizer.from_pretrained(folder),
                SiglipTokenizer.from_pretrained(folder),
            )
            for name in ("model_input_names", "model_max_length", "all_special_tokens", "do_lower_case"):
                assert getattr(tokenizer, name) == getattr(reference, name) == getattr(again, name), name
            expected = tokenizer(SAMPLES, padding="max_length")
            assert expected == reference(SAMPLES, padding="max_length").data == again(SAMPLES, padding="max_length")
            assert tokenizer.get_vocab() == reference.get_vocab() == again.get_vocab()

    def test_files_saved_by_transformers_load(self, pairs: list[Any], tmp_path: Path) -> None:
        for number, (_, reference) in enumerate(pairs):
            reference.save_pretrained(tmp_path / str(number))
            tokenizer = SiglipTokenizer.from_pretrained(tmp_path / str(number))
            loaded = transformers.SiglipTokenizer.from_pretrained(tmp_path / str(number))
            assert tokenizer(SAMPLES, padding="max_length") == loaded(SAMPLES, padding="max_length").data
            assert tokenizer.model_input_names == loaded.model_input_names

    @pytest.mark.parametrize("added", [True, False])
    def test_files_of_transformers_4(self, model_files: dict[str, Path], tmp_path: Path, added: bool) -> None:
        token = {"lstrip": True, "normalized": False, "rstrip": True, "single_word": False}
        config = {
            "additional_special_tokens": ["<extra>"], "clean_up_tokenization_spaces": True, "do_lower_case": True,
            "eos_token": "</s>", "model_input_names": ["input_ids"], "model_max_length": 64, "pad_token": "</s>",
            "processor_class": "SiglipProcessor", "sp_model_kwargs": {}, "tokenizer_class": "SiglipTokenizer",
            "unk_token": "<unk>",
        }  # fmt: skip
        if added:
            contents = {"1": "</s>", "2": "<unk>", "900": "<extra>"}
            config["added_tokens_decoder"] = {i: {**token, "content": c, "special": True} for i, c in contents.items()}
        else:
            (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 900}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "special_tokens_map.json").write_text(
            json.dumps({name: {**token, "content": config[name]} for name in ("eos_token", "pad_token", "unk_token")})
        )
        (tmp_path / "spiece.model").write_bytes(model_files["plain"].read_bytes())
        tokenizer, reference = (
            SiglipTokenizer.from_pretrained(tmp_path),
            transformers.SiglipTokenizer.from_pretrained(tmp_path),
        )
        texts = [*SAMPLES, "cat <extra> dog", "a </s> ", "  <unk>  b"]
        assert tokenizer(texts, padding=True) == reference(texts, padding=True).data
        assert tokenizer.get_vocab() == reference.get_vocab() and tokenizer.all_special_ids == reference.all_special_ids
        for ids in tokenizer(texts)["input_ids"]:
            assert tokenizer.decode(ids) == reference.decode(ids)
            assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)

    def test_arguments_override_files(self, pairs: list[Any], tmp_path: Path) -> None:
        pairs[0][0].save_pretrained(tmp_path)
        tokenizer = SiglipTokenizer.from_pretrained(tmp_path, model_max_length=5, model_input_names=["input_ids"])
        assert tokenizer("a cat", padding="max_length").keys() == {"input_ids"}
        assert len(tokenizer("a cat", padding="max_length")["input_ids"]) == 5
        with pytest.raises(TypeError, match="lower"):
            SiglipTokenizer.from_pretrained(tmp_path, lower=True)

    @pytest.mark.parametrize("saved", [True, False])
    def test_lower_case(self, model_files: dict[str, Path], tmp_path: Path, saved: bool) -> None:
        """The file's setting is followed, an argument overrides it, and either is kept by saving."""
        SiglipTokenizer(model_files["bytes"], do_lower_case=saved).save_pretrained(tmp_path / "in")
        for given in (True, False, None):
            tokenizer = AutoTokenizer.from_pretrained(
                tmp_path / "in", **({} if given is None else {"do_lower_case": given})
            )
            wanted = saved if given is None else given
            tokenizer.save_pretrained(tmp_path / "out")
            reference = transformers.SiglipTokenizer.from_pretrained(tmp_path / "out")
            for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out"), reference):
                assert one.do_lower_case is wanted
                assert (one("A Cat")["input_ids"] == one("a cat")["input_ids"]) is wanted

    @pytest.mark.parametrize("value", ["false", 0, 1, []])
    def test_lower_case_is_a_flag(self, model_files: dict[str, Path], tmp_path: Path, value: Any) -> None:
        SiglipTokenizer(model_files["plain"]).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="do_lower_case is .*; supported: True, False"):
            AutoTokenizer.from_pretrained(tmp_path, do_lower_case=value)
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "do_lower_case": value}))
        with pytest.raises(ValueError, match="do_lower_case is .*; supported: True, False"):
            AutoTokenizer.from_pretrained(tmp_path)

    def test_model_alone(self, model_files: dict[str, Path]) -> None:
        assert SiglipTokenizer.from_pretrained(model_files["plain"].parent)("a cat")["input_ids"]
        assert isinstance(AutoTokenizer.from_pretrained(model_files["plain"].parent), SiglipTokenizer)

    def test_pickle_and_copy(self, pairs: list[Any]) -> None:
        for tokenizer, _ in pairs:
            for clone in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
                assert clone(SAMPLES) == tokenizer(SAMPLES)

    @pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 1000, None])
    def test_damaged_model(self, model_files: dict[str, Path], tmp_path: Path, content: bytes | None) -> None:
        whole = model_files["plain"].read_bytes()
        (tmp_path / "spiece.model").write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(OSError, match=r"spiece\.model"):
            SiglipTokenizer.from_pretrained(tmp_path)

    def test_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match=r"spiece\.model"):
            SiglipTokenizer.from_pretrained(tmp_path)
        with pytest.raises(OSError, match=r"spiece\.model nor tokenizer\.json"):
            AutoTokenizer.from_pretrained(tmp_path)
        with pytest.raises(OSError, match="nowhere"):
            SiglipTokenizer.from_pretrained(tmp_path / "nowhere")
        with pytest.raises(OSError, match="nowhere"):
            SiglipTokenizer(tmp_path / "nowhere")

    @pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
    def test_damaged_config(self, model_files: dict[str, Path], tmp_path: Path, content: str) -> None:
        (tmp_path / "spiece.model").write_bytes(model_files["plain"].read_bytes())
        (tmp_path / "tokenizer_config.json").write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(OSError, match=r"tokenizer_config\.json"):
            SiglipTokenizer.from_pretrained(tmp_path)

    def test_save_to_a_file(self, pairs: list[Any], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(NotADirectoryError, match="file"):
            pairs[0][0].save_pretrained(tmp_path / "file")

    def test_unsupported_class(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        with pytest.raises(OSError, match="BertTokenizer"):
            AutoTokenizer.from_pretrained(tmp_path)


def test_importing_loads_no_tokenizer_library() -> None:
    """Using the model alone imports no tokenizer or image library."""
    code = (
        "import sys, siglip_model, siglip_model.batch\n"
        "print([name for name in ('sentencepiece', 'tokenizers', 'huggingface_hub', 'PIL') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
