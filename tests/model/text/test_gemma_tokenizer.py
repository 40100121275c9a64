"""SigLIP 2's Gemma tokenizer: token for token what transformers' tokenizers return."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from bounded import bounded
from tokenizer_samples import plain
from typer.testing import CliRunner

from siglip_model import AutoProcessor, pipeline
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.cli.main import app
from siglip_model.demo import CHECKPOINT, PICTURES
from siglip_model.text.auto import AutoTokenizer
from siglip_model.text.gemma import GemmaTokenizer, Siglip2Tokenizer


def _gemma_document() -> dict[str, Any]:
    """A tokenizer.json like the published one: byte-pair encoding with byte fallback, <eos> after each text."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    built = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    built.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    built.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    texts = ["a photo of a cat Two DOGS plane straße", "猫 犬 写真 the remote"] * 20
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    built.train_from_iterator(texts, trainer)
    document = json.loads(built.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in special]
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    end = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, end, second, end],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }
    return document


@pytest.fixture(scope="module")
def gemma_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    document = json.dumps(_gemma_document())
    config = {
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "padding_side": "right",
        "add_bos_token": False, "add_eos_token": True, "model_max_length": 64,
        "model_input_names": ["input_ids"], "processor_class": "SiglipProcessor",
        "extra_special_tokens": ["<start_of_turn>"],
    }  # fmt: skip
    siglip = json.dumps({"model_type": "siglip", "text_config": {}, "vision_config": {}})
    folders = {}
    for name in ("GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer", "PreTrainedTokenizerFast"):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        (folder / "tokenizer.json").write_text(document)
        settings = {**config, "tokenizer_class": name, "do_lower_case": name == "Siglip2Tokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "config.json").write_text(siglip)
    return folders


GEMMA_TEXTS = [
    "",
    "a photo of a Cat!",
    "Two DOGS",
    "<eos>",
    "a<start_of_turn>b",
    "猫🐱\x00",
    "  a \n",
    "<0x41>",
    "straße " * 30,
]


class TestGemma:
    def test_same_as_transformers(self, gemma_folders: dict[str, Path]) -> None:
        for folder in gemma_folders.values():
            tokenizer, reference = (
                AutoTokenizer.from_pretrained(folder),
                transformers.AutoTokenizer.from_pretrained(folder),
            )
            assert tokenizer.get_vocab() == reference.get_vocab() and len(tokenizer) == len(reference)
            for name in (
                "all_special_ids",
                "special_tokens_map",
                "model_max_length",
                "model_input_names",
                "padding_side",
            ):
                assert getattr(tokenizer, name) == getattr(reference, name), name
            for options in (
                {}, {"padding": "max_length", "truncation": True, "return_tensors": "pt"}, {"padding": True},
                {"truncation": True, "max_length": 5, "return_attention_mask": True, "padding": "max_length"},
                {"add_special_tokens": False},
                {"padding": True, "padding_side": "left", "return_special_tokens_mask": True},
                {"padding": True, "pad_to_multiple_of": 8, "return_token_type_ids": True, "return_length": True},
                {"split_special_tokens": True},
            ):  # fmt: skip
                assert plain(tokenizer(GEMMA_TEXTS, **options)) == plain(reference(GEMMA_TEXTS, **options))
                doubled = [(text, text) for text in GEMMA_TEXTS]
                assert plain(tokenizer(doubled, **options)) == plain(reference(doubled, **options))
            for text in GEMMA_TEXTS:
                ids = tokenizer(text)["input_ids"]
                assert ids == reference(text)["input_ids"] and tokenizer.tokenize(text) == reference.tokenize(text)
                for skip in (True, False):
                    assert tokenizer.decode(ids, skip_special_tokens=skip) == reference.decode(
                        ids, skip_special_tokens=skip
                    )
                    assert tokenizer.batch_decode([ids], skip) == reference.batch_decode([ids], skip)
            assert tokenizer.convert_ids_to_tokens([0, 1, 300]) == reference.convert_ids_to_tokens([0, 1, 300])
            assert tokenizer.convert_tokens_to_ids(["a", "nothing such"]) == reference.convert_tokens_to_ids(
                ["a", "nothing such"]
            )

    def test_case(self, gemma_folders: dict[str, Path]) -> None:
        gemma, siglip2 = (
            AutoTokenizer.from_pretrained(gemma_folders[name]) for name in ("GemmaTokenizer", "Siglip2Tokenizer")
        )
        assert type(gemma) is GemmaTokenizer and type(siglip2) is Siglip2Tokenizer
        assert gemma("DOGS") != gemma("dogs") and siglip2("DOGS") == siglip2("dogs")

    def test_round_trip(self, gemma_folders: dict[str, Path], tmp_path: Path) -> None:
        for name, folder in gemma_folders.items():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.save_pretrained(tmp_path / name)
            (tmp_path / name / "config.json").write_bytes((folder / "config.json").read_bytes())
            reference, again = (
                transformers.AutoTokenizer.from_pretrained(tmp_path / name),
                AutoTokenizer.from_pretrained(tmp_path / name),
            )
            assert type(again) is type(tokenizer)
            assert tokenizer(GEMMA_TEXTS) == reference(GEMMA_TEXTS).data == again(GEMMA_TEXTS)
            assert pickle.loads(pickle.dumps(tokenizer))(GEMMA_TEXTS) == tokenizer(GEMMA_TEXTS)

    def test_errors(self, gemma_folders: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
        with pytest.raises(OSError, match=r"tokenizer\.json"):
            AutoTokenizer.from_pretrained(tmp_path)
        for content in ("{", "{}", '{"model": {"type": "BPE", "merges": [], "vocab": 3}}', '{"model": {}}'):
            (tmp_path / "tokenizer.json").write_text(content)
            with pytest.raises(OSError, match=r"tokenizer\.json"):
                AutoTokenizer.from_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(gemma_folders["GemmaTokenizer"])
        for text in (None, [], [3], [["a", "b", "c"]]):
            with pytest.raises(ValueError, match="supported"):
                tokenizer(text)
        for arguments in (("\ud800 a",), ("a", "\ud800"), (["a", "\udc80"],)):
            with pytest.raises(ValueError, match="lone surrogate"):
                tokenizer(*arguments)
        with pytest.raises(ValueError, match="lone surrogate"):
            tokenizer(["a", "\ud800"], is_split_into_words=True)
        with pytest.raises(ValueError, match="Second sequence"):
            tokenizer("a photo of a cat", truncation="only_second", max_length=2)
        with pytest.raises(TypeError, match="paddign"):
            tokenizer("a", paddign=True)
        with pytest.raises(IndexError, match="10000"):
            tokenizer.convert_ids_to_tokens([10_000])


class TestHostileFiles:
    """Every error names the file; a field of the settings is named with what it supports."""

    @pytest.mark.parametrize("name", ["GemmaTokenizer", "PreTrainedTokenizerFast"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"pad_token": 3}, {"eos_token": {"content": None}}, {"model_max_length": "x"}, {"model_max_length": 2**40},
            {"padding_side": "top"}, {"model_input_names": [3]}, {"added_tokens_decoder": {"x": "<a>"}},
            {"extra_special_tokens": {"a": 3}}, {"do_lower_case": "yes"}, {"processor_class": []},
        ],
    )  # fmt: skip
    def test_settings(
        self, gemma_folders: dict[str, Path], name: str, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        folder = _copy(gemma_folders[name], tmp_path / "in", **settings)
        with pytest.raises(CheckpointError, match=f"{next(iter(settings))} is .*; supported: ") as caught:
            AutoTokenizer.from_pretrained(folder)
        assert str(folder / "tokenizer_config.json") in str(caught.value)

    @pytest.mark.parametrize("name", ["GemmaTokenizer", "PreTrainedTokenizerFast"])
    @pytest.mark.parametrize(
        "field, value",
        [
            ("padding", "Left"), ("padding", {"direction": 3}), ("added_tokens", {}), ("added_tokens", [{"id": -1}]),
            ("normalizer", {"type": "Unknown"}), ("normalizer", [3]), ("post_processor", {"type": []}), ("model", []),
            ("model", {"type": "BPE", "vocab": {"a": -1}, "merges": []}), ("decoder", 3), ("version", {}),
        ],
    )  # fmt: skip
    def test_document(self, gemma_folders: dict[str, Path], name: str, field: str, value: Any, tmp_path: Path) -> None:
        if name == "GemmaTokenizer" and field in ("normalizer", "decoder"):
            pytest.skip("GemmaTokenizer has its own")
        folder = _copy(gemma_folders[name], tmp_path / "in", do_lower_case=True)
        document = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**document, field: value}))
        with bounded(), pytest.raises(CheckpointError) as caught:
            AutoTokenizer.from_pretrained(folder)
        assert str(folder / "tokenizer.json") in str(caught.value)

    def test_an_unknown_token_outside_the_vocabulary(self, gemma_folders: dict[str, Path], tmp_path: Path) -> None:
        folder = _copy(gemma_folders["GemmaTokenizer"], tmp_path / "in", unk_token="<unk> ")
        with pytest.raises(CheckpointError, match=r"unk_token is '<unk> '; supported: a token of the voc") as caught:
            AutoTokenizer.from_pretrained(folder)
        assert str(folder / "tokenizer_config.json") in str(caught.value)

    def test_a_panic_of_the_library(
        self, gemma_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It does not derive from Exception."""
        panic = type("PanicException", (BaseException,), {})

        def fail(text: str) -> None:
            raise panic("index out of bounds")

        monkeypatch.setattr(tokenizers.Tokenizer, "from_str", fail)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: PanicException: index out of bounds"):
            AutoTokenizer.from_pretrained(gemma_folders["GemmaTokenizer"])

    def test_a_large_document(self, gemma_folders: dict[str, Path], tmp_path: Path) -> None:
        folder = _copy(gemma_folders["GemmaTokenizer"], tmp_path / "in")
        with (folder / "tokenizer.json").open("wb") as file:
            file.truncate(2**33)  # a sparse file
        with bounded(), pytest.raises(CheckpointError, match="has 8,589,934,592 bytes; supported: at most 50,331,648"):
            AutoTokenizer.from_pretrained(folder)

    def test_missing_settings_are_said(
        self, gemma_folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = _copy(gemma_folders["GemmaTokenizer"], tmp_path / "in")
        AutoTokenizer.from_pretrained(folder)
        assert not caplog.messages
        (folder / "tokenizer_config.json").unlink()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert caplog.messages == [f"{folder} has no tokenizer_config.json: the defaults of TokenizersTokenizer apply"]
        with pytest.raises(ValueError, match=f"no pad_token, and tokenizer_config.json of {folder} names none"):
            tokenizer(["a", "a cat"], padding=True)


def _copy(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a tokenizer's folder with other settings; None removes one."""
    shutil.copytree(folder, target)
    settings = {**json.loads((target / "tokenizer_config.json").read_text()), **changes}
    (target / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in settings.items() if value is not None})
    )
    return target


CASES = ["A Cat", "TWO dogs", "Straße İ Σ", "<eos> A", ""]


@pytest.fixture
def lower(gemma_folders: dict[str, Path]) -> list[Any]:
    """Ids of the texts in lower case."""
    return AutoTokenizer.from_pretrained(gemma_folders["Siglip2Tokenizer"])(CASES)["input_ids"]


@pytest.fixture
def kept(gemma_folders: dict[str, Path]) -> list[Any]:
    """Ids of the texts as they are."""
    return AutoTokenizer.from_pretrained(gemma_folders["GemmaTokenizer"])(CASES)["input_ids"]


NAMES = ["GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer", "PreTrainedTokenizerFast"]


class TestLowerCase:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("saved", [True, False])
    @pytest.mark.parametrize("given", [True, False, None])
    def test_the_setting_is_followed_and_kept(
        self,
        gemma_folders: dict[str, Path],
        lower: Any,
        kept: Any,
        name: str,
        saved: bool,
        given: bool | None,
        tmp_path: Path,
    ) -> None:
        assert lower != kept
        folder = _copy(gemma_folders[name], tmp_path / "in", do_lower_case=saved)
        tokenizer = AutoTokenizer.from_pretrained(folder, **({} if given is None else {"do_lower_case": given}))
        wanted = saved if given is None else given
        assert tokenizer.do_lower_case is wanted and tokenizer(CASES)["input_ids"] == (lower if wanted else kept)
        tokenizer.save_pretrained(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["do_lower_case"] is wanted
        (tmp_path / "out" / "config.json").write_bytes((folder / "config.json").read_bytes())
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        for again in (
            AutoTokenizer.from_pretrained(tmp_path / "out"),
            reference,
            pickle.loads(pickle.dumps(tokenizer)),
        ):
            assert again(CASES)["input_ids"] == (lower if wanted else kept)
        turned = AutoTokenizer.from_pretrained(tmp_path / "out", do_lower_case=not wanted)
        assert turned(CASES)["input_ids"] == (kept if wanted else lower)

    def test_the_class_by_itself(self, gemma_folders: dict[str, Path], lower: Any, kept: Any, tmp_path: Path) -> None:
        folder = _copy(gemma_folders["GemmaTokenizer"], tmp_path / "in", do_lower_case=True)
        assert GemmaTokenizer.from_pretrained(folder)(CASES)["input_ids"] == lower
        assert GemmaTokenizer.from_pretrained(folder, do_lower_case=False)(CASES)["input_ids"] == kept
        file = folder / "tokenizer.json"
        for tokenizer, expected in (
            (GemmaTokenizer(file), kept), (GemmaTokenizer(file, do_lower_case=True), lower),
            (Siglip2Tokenizer(file), lower), (Siglip2Tokenizer(file, do_lower_case=False), kept),
        ):  # fmt: skip
            assert tokenizer(CASES)["input_ids"] == expected
        with pytest.raises(AttributeError):
            tokenizer.do_lower_case = True  # type: ignore[misc]  # fixed when it is loaded, and not ignored in silence

    @pytest.mark.parametrize(
        ("config", "processor_class", "is_siglip"),
        [
            ({"model_type": "siglip"}, None, True), ({"model_type": "siglip2"}, None, True),
            ({"model_type": "siglip_text_model"}, None, True), (None, "SiglipProcessor", True),
            (None, "Siglip2Processor", True), ({"model_type": "gemma"}, None, False), (None, None, False),
            ({"model_type": "paligemma"}, "PaliGemmaProcessor", False), ({}, None, False),
        ],
    )  # fmt: skip
    def test_without_the_setting_the_checkpoint_decides(
        self, gemma_folders: dict[str, Path], lower: Any, kept: Any, config: Any, processor_class: Any, is_siglip: bool,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        folder = _copy(
            gemma_folders["GemmaTokenizer"], tmp_path / "in", do_lower_case=None, processor_class=processor_class
        )
        (folder / "config.json").unlink()
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        for load in (AutoTokenizer.from_pretrained, GemmaTokenizer.from_pretrained):
            assert load(folder)(CASES)["input_ids"] == (lower if is_siglip else kept)
            assert load(folder, do_lower_case=False)(CASES)["input_ids"] == kept
            assert load(folder, do_lower_case=True)(CASES)["input_ids"] == lower

    @pytest.mark.parametrize("value", ["true", 1, 0, [], 1.0])
    @pytest.mark.parametrize("name", NAMES)
    def test_other_values_are_refused(
        self, gemma_folders: dict[str, Path], name: str, value: Any, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=r"do_lower_case is .*; supported: True, False"):
            AutoTokenizer.from_pretrained(gemma_folders[name], do_lower_case=value)
        with pytest.raises(ValueError, match=r"do_lower_case is .*; supported: True, False"):
            AutoTokenizer.from_pretrained(_copy(gemma_folders[name], tmp_path / "in", do_lower_case=value))

    def test_a_normaliser_that_lower_cases_otherwise(self, gemma_folders: dict[str, Path], tmp_path: Path) -> None:
        folder = _copy(gemma_folders["PreTrainedTokenizerFast"], tmp_path / "in", do_lower_case=None)
        document = json.loads((folder / "tokenizer.json").read_text())
        bert = json.loads(tokenizers.normalizers.BertNormalizer().__getstate__())
        document["normalizer"] = {"type": "Sequence", "normalizers": [bert]}
        (folder / "tokenizer.json").write_text(json.dumps(document))
        assert AutoTokenizer.from_pretrained(folder).do_lower_case is True
        with pytest.raises(ValueError, match=r"do_lower_case is False, but .*tokenizer\.json lower-cases"):
            AutoTokenizer.from_pretrained(folder, do_lower_case=False)

    @pytest.mark.parametrize("given", [{}, {"do_lower_case": True}])
    def test_processor_pipeline_and_command(
        self, gemma_folders: dict[str, Path], lower: Any, given: dict[str, bool], tmp_path: Path
    ) -> None:
        """A fixed-resolution SigLIP 2 checkpoint: a text in capitals gets the scores of the text in lower case."""
        folder = _copy(gemma_folders["GemmaTokenizer"], tmp_path / "in", do_lower_case=None if given else True)
        for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
            shutil.copy(CHECKPOINT / name, folder / name)
        processor = AutoProcessor.from_pretrained(folder, **given)
        assert processor(text=CASES)["input_ids"] == lower
        processor.save_pretrained(tmp_path / "out")
        assert AutoProcessor.from_pretrained(tmp_path / "out")(text=CASES)["input_ids"] == lower
        picture = str(PICTURES / "rocket.png")
        classify = pipeline(model=folder, device="cpu", processor=processor)
        for run in (
            lambda labels: classify(picture, labels, hypothesis_template="A Photo of {}"),
            self._command(folder),
        ):
            upper, small = run(["A CAT", "DOG"]), run(["a cat", "dog"])
            assert [row["score"] for row in upper] == [row["score"] for row in small]

    @staticmethod
    def _command(folder: Path) -> Any:
        def run(labels: list[str]) -> Any:
            words = ["classify", str(PICTURES / "rocket.png"), "--model", str(folder), "--device", "cpu", "--json"]
            done = CliRunner().invoke(app, [*words, "--labels", *labels])
            assert done.exit_code == 0, done.stderr
            return json.loads(done.stdout)[0]["predictions"]

        return run
