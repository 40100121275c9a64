"""Token for token what transformers' tokenizers give, with small models trained here."""

import copy
import io
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siglip_model.batch import BatchFeature
from siglip_model.text.auto import load_tokenizer
from siglip_model.text.gemma import GemmaTokenizer, Siglip2Tokenizer
from siglip_model.text.siglip import SiglipTokenizer

WORDS = [
    "a", "an", "the", "photo", "of", "cat", "dog", "plane", "straße", "ὀδός", "Σίσυφος", "猫", "犬", "写真", "كتاب",
    "שלום", "привет", "été", "naïve", "2", "3", "10",
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has", "ignore:`max_length` is ignored")

# What has gone wrong in tokenizers, or could: each alone, and glued to others at random.
FRAGMENTS = [
    "</s>", "<unk>", "</S>", "<pad>", "<extra>", "<", "</", "s>", " ", "  ", "\t", "\n", "\r\n", "\x00", "\x1c", "\x85",
    "\u200b", "\u3000", "\u2028", "\ufeff", "\u0301", "é", "ß", "İ", "ΟΔΟΣ", "Σας", "ὀδός", "ﬁ", "½", "①", "A", "cat",
    "Dog", "the photo of", "!", "?.,'\"", "{}", "▁", "▁▁", "猫", "写真", "كتاب", "שלום", "🐱", "👨‍👩‍👧", "\U0010ffff",
    "2", "10",
]  # fmt: skip
glued_text = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
any_text = st.one_of(st.text(), glued_text)


def _train(byte_fallback: bool, **settings: Any) -> bytes:
    shuffle = random.Random(0)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(shuffle.choices(WORDS, k=7)) for _ in range(400)]),
        model_writer=written,
        vocab_size=420 if byte_fallback else 150,
        byte_fallback=byte_fallback,
        **{
            "hard_vocab_limit": False,
            "pad_id": 0,
            "eos_id": 1,
            "unk_id": 2,
            "bos_id": -1,
            "minloglevel": 2,
            **settings,
        },
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"byte_fallback": False},
        "bytes": {"byte_fallback": True, "normalization_rule_name": "identity"},
        "no_prefix": {"byte_fallback": True, "normalization_rule_name": "nmt_nfkc_cf", "add_dummy_prefix": False},
        "bpe": {"byte_fallback": False, "model_type": "bpe", "remove_extra_whitespaces": False},
    }
    files = {}
    for name, kind in kinds.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "spiece.model").write_bytes(_train(**kind))
        files[name] = folder / "spiece.model"
    return files


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("bytes", {"model_input_names": ["input_ids"]}),
    ("bytes", {"additional_special_tokens": ["<extra>", "cat"], "do_lower_case": False}),
    ("no_prefix", {"model_max_length": 7}),
    ("bpe", {"legacy": False}),
]


@pytest.fixture(scope="module")
def pairs(model_files: dict[str, Path]) -> list[tuple[SiglipTokenizer, Any]]:
    """Our tokenizer and transformers', of every kind."""
    return [
        (SiglipTokenizer(model_files[name], **options), transformers.SiglipTokenizer(str(model_files[name]), **options))
        for name, options in VARIANTS
    ]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """transformers warns of every second option."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def plain(value: Any) -> Any:
    """Comparable: tensors and arrays with their kind, dtype and content."""
    if hasattr(value, "items"):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        rows = (
            [row.tolist() for row in value]
            if isinstance(value, np.ndarray) and value.dtype == object
            else value.tolist()
        )
        return type(value).__name__, str(value.dtype), rows
    return value


def assert_same(call: Any, ours: Any, theirs: Any) -> None:
    """The same result, or a ValueError where transformers raises one."""
    try:
        expected = plain(call(theirs))
    except ValueError:
        with pytest.raises(ValueError, match="supported|make no tensor|given"):
            call(ours)
        return
    assert plain(call(ours)) == expected


class TestText:
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(text=any_text, split=st.booleans())
    def test_any_string(self, pairs: list[Any], text: str, split: bool) -> None:
        for ours, theirs in pairs:
            assert ours.tokenize(text) == theirs.tokenize(text)
            assert ours.tokenize(text, split_special_tokens=split) == theirs.tokenize(text, split_special_tokens=split)
            assert ours.canonicalize_text(text) == theirs.canonicalize_text(text)
            ids = ours(text)["input_ids"]
            assert ids == theirs(text)["input_ids"]
            assert ours.decode(ids) == theirs.decode(ids)

    @pytest.mark.parametrize(
        "text",
        ["", " ", "!?.", "a" * 10_000, "the photo of 猫! " * 1_000, "</s>" * 50, "</s>é", "é</s>é", "<unk>cat", "▁cat",
         "\x00",
         "cat </s> ", " </s>", "</s></S></s>", "<</s>>", "a\u00a0b", "ΟΔΟΣ", "ΟΔΟΣ</s>ΟΔΟΣ"],
    )  # fmt: skip
    def test_awkward_strings(self, pairs: list[Any], text: str) -> None:
        for ours, theirs in pairs[:2] if len(text) > 1_000 else pairs:
            assert ours(text)["input_ids"] == theirs(text)["input_ids"]
            assert (
                ours(text, padding="max_length", truncation=True)["input_ids"]
                == (theirs(text, padding="max_length", truncation=True)["input_ids"])
            )

    def test_keep_punctuation(self, pairs: list[Any]) -> None:
        ours, theirs = pairs[0]
        for text in ("A {} b! {x}", "{}{}", "{ }", ""):
            kept = ours.canonicalize_text(text, keep_punctuation_exact_string="{}")
            assert kept == theirs.canonicalize_text(text, keep_punctuation_exact_string="{}")

    def test_unsaid_quirks_hold(self, pairs: list[Any]) -> None:
        ours, _ = pairs[0]
        assert ours.tokenize("the cat")[0].startswith("▁")
        assert not ours.tokenize("</s>cat")[1].startswith("▁")  # text behind a special token has no space before it
        assert ours.tokenize("</s>\U0001f431") == ["</s>"]  # an unknown character there vanishes
        assert ours("cat</s>")["input_ids"][-2:] != [1, 1]  # one end is enough

    def test_what_is_not_text(self, pairs: list[Any]) -> None:
        with pytest.raises(ValueError, match="surrogate"):  # nor does transformers' take it
            pairs[0][0]("a \ud800 b")
        with pytest.raises(TypeError, match="bytes"):
            pairs[0][0].tokenize(b"cat")


class TestCall:
    options = st.fixed_dictionaries(
        {},
        optional={
            "padding": st.sampled_from([True, False, "longest", "max_length", "do_not_pad"]),
            "truncation": st.sampled_from([True, False, None, "longest_first", "only_first", "only_second"]),
            "max_length": st.integers(1, 20),
            "pad_to_multiple_of": st.sampled_from([1, 4, 8]),
            "padding_side": st.sampled_from(["left", "right"]),
            "return_tensors": st.sampled_from(["pt", "np", None]),
            "return_attention_mask": st.booleans(),
            "return_token_type_ids": st.booleans(),
            "return_special_tokens_mask": st.booleans(),
            "return_length": st.booleans(),
            "add_special_tokens": st.booleans(),
        },
    )
    inputs = st.one_of(
        st.tuples(glued_text, st.none()),
        st.tuples(glued_text, glued_text),
        st.tuples(st.lists(glued_text, min_size=1, max_size=4), st.none()),
        st.tuples(st.lists(st.tuples(glued_text, glued_text), min_size=1, max_size=3), st.none()),
        st.lists(st.tuples(glued_text, glued_text), min_size=1, max_size=3).map(
            lambda rows: tuple(map(list, zip(*rows, strict=True)))
        ),
    )

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(text=inputs, options=options)
    def test_every_option(self, pairs: list[Any], text: Any, options: dict[str, Any]) -> None:
        # transformers makes an empty float tensor of texts of which only the first is empty; ours is an error
        for ours, theirs in pairs:
            first_is_empty = options.get("return_tensors") == "pt" and options.get("add_special_tokens") is False
            if first_is_empty and not isinstance(text[0], str):
                continue
            assert_same(lambda tokenizer: tokenizer(*text, **options), ours, theirs)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("strategy", ["only_first", "only_second", "longest_first"])
    def test_truncation_sides(self, model_files: dict[str, Path], side: str, strategy: str) -> None:
        ours = SiglipTokenizer(model_files["plain"], truncation_side=side)
        theirs = transformers.SiglipTokenizer(str(model_files["plain"]), truncation_side=side)
        texts = ["the photo of a cat", "dog", "", "a plane 2 3 10 of the dog"]
        for first in texts:
            for second in texts[:2]:  # transformers drops a second text that is empty, and its end, at the left only
                for length in range(1, 14):
                    options = {"truncation": strategy, "max_length": length}
                    assert ours(first, second, **options) == theirs(first, second, **options).data

    def test_ids_tokens_and_words(self, pairs: list[Any]) -> None:
        for ours, theirs in pairs:
            for text, options in [
                ([5, 6, 7], {}),
                ([[5, 6], [7, 1]], {"padding": True}),
                (["the", "photo, of"], {"is_split_into_words": True}),
                ([["the", "cat"], ["dog"]], {"is_split_into_words": True, "padding": True}),
                ([["cat"]], {}),
                (("a cat", "a dog"), {}),
            ]:
                assert plain(ours(text, **options)) == plain(theirs(text, **options))
                assert ours.encode(text, **options) == theirs.encode(text, **options)

    def test_overflow(self, pairs: list[Any]) -> None:
        ours, theirs = pairs[0]
        options = {"max_length": 4, "stride": 2, "return_overflowing_tokens": True}
        assert ours("the photo of a cat", **options) == theirs("the photo of a cat", **options).data

    def test_published_checkpoints_have_no_mask(self, pairs: list[Any]) -> None:
        assert list(pairs[1][0](["a", "b c"], padding=True)) == ["input_ids"]
        assert list(pairs[0][0](["a", "b c"], padding=True)) == ["input_ids", "attention_mask"]

    def test_result(self, pairs: list[Any]) -> None:
        batch = pairs[0][0](["a cat", "dog"], padding="max_length", return_tensors="pt")
        assert isinstance(batch, BatchFeature) and batch.input_ids.shape == (2, 64)
        assert batch.input_ids.dtype == batch["attention_mask"].dtype == torch.int64

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"padding": "maximum"}, ValueError, "padding is 'maximum'"),
            ({"padding": None}, ValueError, "padding is None"),
            ({"truncation": "first"}, ValueError, "truncation is 'first'"),
            ({"padding_side": "top"}, ValueError, "padding_side is 'top'"),
            ({"return_tensors": "tf"}, ValueError, "return_tensors is 'tf'"),
            ({"max_length": -1}, ValueError, "max_length is -1"),
            ({"max_length": 2.5}, ValueError, "max_length is 2.5"),
            ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of is 0"),
            ({"return_offsets_mapping": True}, TypeError, "return_offsets_mapping"),
            ({"paddign": True}, TypeError, "paddign"),
        ],
    )
    def test_bad_arguments(self, pairs: list[Any], arguments: dict[str, Any], error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            pairs[0][0]("a cat", **arguments)

    @pytest.mark.parametrize("text", [None, [], 3, [None], [["a", "b", "c"]], {"a": 1}])
    def test_bad_text(self, pairs: list[Any], text: Any) -> None:
        with pytest.raises(ValueError, match="supported"):
            pairs[0][0](text)

    def test_ragged_says_what_to_do(self, pairs: list[Any]) -> None:
        with pytest.raises(ValueError, match="padding=True"):
            pairs[0][0](["a", "the photo of a cat"], return_tensors="pt")

    def test_no_pad_token(self, model_files: dict[str, Path]) -> None:
        tokenizer = SiglipTokenizer(model_files["plain"], pad_token=None)
        assert tokenizer.pad_token is None and tokenizer.pad_token_id is None
        with pytest.raises(ValueError, match="pad_token"):
            tokenizer(["a", "b"], padding=True)


class TestPad:
    def test_forms(self, pairs: list[Any]) -> None:
        rows = [{"input_ids": [5, 6, 1]}, {"input_ids": [7, 1]}]
        forms: list[Any] = [
            rows,
            {"input_ids": [[5, 6, 1], [7, 1]], "special_tokens_mask": [[0, 0, 1], [0, 1]]},
            {"input_ids": [5, 6, 1]},
            [{"input_ids": torch.tensor([5, 6, 1])}, {"input_ids": torch.tensor([7, 1])}],
            {"input_ids": np.array([[5, 6, 1], [7, 8, 1]])},
            {"input_ids": []},
            {"input_ids": [[], [5]]},
            [{"input_ids": [5, 6], "attention_mask": [1, 0]}, {"input_ids": [5], "attention_mask": [1]}],
        ]
        for ours, theirs in pairs:
            for form in forms:
                for options in (
                    {}, {"padding": "max_length", "max_length": 6}, {"pad_to_multiple_of": 4, "padding_side": "left"},
                    {"return_attention_mask": True}, {"return_tensors": "np"}, {"padding": False, "max_length": 2},
                ):  # fmt: skip
                    before = copy.deepcopy(form)
                    assert_same(
                        lambda t, form=form, options=options: t.pad(copy.deepcopy(form), **options), ours, theirs
                    )
                    try:
                        ours.pad(form, **options)
                    except ValueError:
                        continue
                    assert plain_all(form) == plain_all(before)

    @pytest.mark.parametrize("form", [{"ids": [1]}, [], "text", {"input_ids": [[1], [2]], "labels": [1, 2, 3]}])
    def test_bad_input(self, pairs: list[Any], form: Any) -> None:
        with pytest.raises(ValueError, match="input_ids"):
            pairs[0][0].pad(form)


def plain_all(value: Any) -> Any:
    return [plain(item) for item in value] if isinstance(value, list) else plain(value)


class TestDecode:
    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        ids=st.lists(st.integers(0, 75), max_size=12), skip=st.booleans(), clean=st.sampled_from([None, True, False])
    )
    def test_any_ids(self, pairs: list[Any], ids: list[int], skip: bool, clean: bool | None) -> None:
        options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
        for ours, theirs in pairs:
            assert ours.decode(ids, **options) == theirs.decode(ids, **options)
            assert ours.decode(torch.tensor(ids, dtype=torch.int64), **options) == theirs.decode(ids, **options)
            for batch in ([ids, [1]], [[1], ids, []], np.array([[3, 1], [4, 1]]), torch.tensor([[3, 1]]), ids):
                assert ours.batch_decode(batch, **options) == theirs.batch_decode(batch, **options)
            assert ours.convert_ids_to_tokens(ids, skip) == theirs.convert_ids_to_tokens(ids, skip)

    def test_a_single_id(self, pairs: list[Any]) -> None:
        for ours, theirs in pairs:
            for index in (0, 1, 2, 7):
                assert ours.decode(index) == theirs.decode(index)
                assert ours.decode(index, skip_special_tokens=True) == theirs.decode(index, skip_special_tokens=True)
                assert ours.convert_ids_to_tokens(index) == theirs.convert_ids_to_tokens(index)

    def test_id_outside(self, pairs: list[Any]) -> None:
        for index in (-1, 10_000):
            with pytest.raises(IndexError, match=str(index)):
                pairs[0][0].decode([3, index])


class TestVocabulary:
    def test_everything_that_is_asked(self, pairs: list[Any]) -> None:
        for ours, theirs in pairs:
            assert ours.get_vocab() == theirs.get_vocab()
            assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
            for name in (
                "eos_token", "pad_token", "unk_token", "bos_token", "eos_token_id", "pad_token_id", "unk_token_id",
                "bos_token_id", "all_special_tokens", "all_special_ids", "special_tokens_map", "model_max_length",
                "model_input_names", "padding_side", "truncation_side",
            ):  # fmt: skip
                assert getattr(ours, name) == getattr(theirs, name), name
            tokens = ["▁cat", "</s>", "<extra>", "no such piece", ""]
            assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
            assert ours.convert_tokens_to_ids("▁cat") == theirs.convert_tokens_to_ids("▁cat")
            assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)

    def test_special_token_methods(self, pairs: list[Any]) -> None:
        sequences = [[], [1], [3, 4], [3, 4, 1]]
        for ours, theirs in pairs:
            for first in sequences:
                assert ours.get_special_tokens_mask(first, already_has_special_tokens=True) == (
                    theirs.get_special_tokens_mask(first, already_has_special_tokens=True)
                )
                for second in (None, *sequences):
                    for method in (
                        "build_inputs_with_special_tokens",
                        "get_special_tokens_mask",
                        "create_token_type_ids_from_sequences",
                    ):
                        assert getattr(ours, method)(first, second) == getattr(theirs, method)(first, second)
        with pytest.raises(ValueError, match="token_ids_1"):
            pairs[0][0].get_special_tokens_mask([1], [1], already_has_special_tokens=True)


SAMPLES = ["a Cat!", "", "</s>", "<extra>dog", "the photo of 猫, 2 3", "</s> cat </s>"]


class TestFiles:
    def test_what_we_save_transformers_loads(self, pairs: list[Any], tmp_path: Path) -> None:
        for number, (ours, _) in enumerate(pairs):
            folder = tmp_path / str(number)
            paths = ours.save_pretrained(folder)
            assert sorted(Path(path).name for path in paths) == ["spiece.model", "tokenizer_config.json"]
            theirs, again = (
                transformers.SiglipTokenizer.from_pretrained(folder),
                SiglipTokenizer.from_pretrained(folder),
            )
            for name in ("model_input_names", "model_max_length", "all_special_tokens", "do_lower_case"):
                assert getattr(ours, name) == getattr(theirs, name) == getattr(again, name), name
            expected = ours(SAMPLES, padding="max_length")
            assert expected == theirs(SAMPLES, padding="max_length").data == again(SAMPLES, padding="max_length")
            assert ours.get_vocab() == theirs.get_vocab() == again.get_vocab()

    def test_what_transformers_saves_we_load(self, pairs: list[Any], tmp_path: Path) -> None:
        for number, (_, theirs) in enumerate(pairs):
            theirs.save_pretrained(tmp_path / str(number))
            ours = SiglipTokenizer.from_pretrained(tmp_path / str(number))
            loaded = transformers.SiglipTokenizer.from_pretrained(tmp_path / str(number))
            assert ours(SAMPLES, padding="max_length") == loaded(SAMPLES, padding="max_length").data
            assert ours.model_input_names == loaded.model_input_names

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
        ours, theirs = SiglipTokenizer.from_pretrained(tmp_path), transformers.SiglipTokenizer.from_pretrained(tmp_path)
        texts = [*SAMPLES, "cat <extra> dog", "a </s> ", "  <unk>  b"]
        assert ours(texts, padding=True) == theirs(texts, padding=True).data
        assert ours.get_vocab() == theirs.get_vocab() and ours.all_special_ids == theirs.all_special_ids
        for ids in ours(texts)["input_ids"]:
            assert ours.decode(ids) == theirs.decode(ids)
            assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)

    def test_arguments_win_over_files(self, pairs: list[Any], tmp_path: Path) -> None:
        pairs[0][0].save_pretrained(tmp_path)
        tokenizer = SiglipTokenizer.from_pretrained(tmp_path, model_max_length=5, model_input_names=["input_ids"])
        assert tokenizer("a cat", padding="max_length").keys() == {"input_ids"}
        assert len(tokenizer("a cat", padding="max_length")["input_ids"]) == 5
        with pytest.raises(TypeError, match="lower"):
            SiglipTokenizer.from_pretrained(tmp_path, lower=True)

    def test_model_alone(self, model_files: dict[str, Path]) -> None:
        assert SiglipTokenizer.from_pretrained(model_files["plain"].parent)("a cat")["input_ids"]
        assert isinstance(load_tokenizer(model_files["plain"].parent), SiglipTokenizer)

    def test_pickle_and_copy(self, pairs: list[Any]) -> None:
        for ours, _ in pairs:
            for clone in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
                assert clone(SAMPLES) == ours(SAMPLES)

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
            load_tokenizer(tmp_path)
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

    def test_foreign_class(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        with pytest.raises(OSError, match="BertTokenizer"):
            load_tokenizer(tmp_path)


# ---- SigLIP 2's


def _gemma_document() -> dict[str, Any]:
    """A tokenizer.json as published: a byte-pair encoding with byte fallback that ends each text with <eos>."""
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
        "add_bos_token": False, "add_eos_token": True, "do_lower_case": True, "model_max_length": 64,
        "model_input_names": ["input_ids"], "processor_class": "SiglipProcessor",
        "extra_special_tokens": ["<start_of_turn>"],
    }  # fmt: skip
    siglip = json.dumps({"model_type": "siglip", "text_config": {}, "vision_config": {}})
    folders = {}
    for name in ("GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer", "PreTrainedTokenizerFast"):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        (folder / "tokenizer.json").write_text(document)
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": name}))
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
            ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
            assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs)
            for name in (
                "all_special_ids",
                "special_tokens_map",
                "model_max_length",
                "model_input_names",
                "padding_side",
            ):
                assert getattr(ours, name) == getattr(theirs, name), name
            for options in (
                {}, {"padding": "max_length", "truncation": True, "return_tensors": "pt"}, {"padding": True},
                {"truncation": True, "max_length": 5, "return_attention_mask": True, "padding": "max_length"},
                {"add_special_tokens": False},
                {"padding": True, "padding_side": "left", "return_special_tokens_mask": True},
                {"padding": True, "pad_to_multiple_of": 8, "return_token_type_ids": True, "return_length": True},
                {"split_special_tokens": True},
            ):  # fmt: skip
                assert plain(ours(GEMMA_TEXTS, **options)) == plain(theirs(GEMMA_TEXTS, **options))
                doubled = [(text, text) for text in GEMMA_TEXTS]
                assert plain(ours(doubled, **options)) == plain(theirs(doubled, **options))
            for text in GEMMA_TEXTS:
                ids = ours(text)["input_ids"]
                assert ids == theirs(text)["input_ids"] and ours.tokenize(text) == theirs.tokenize(text)
                for skip in (True, False):
                    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
                    assert ours.batch_decode([ids], skip) == theirs.batch_decode([ids], skip)
            assert ours.convert_ids_to_tokens([0, 1, 300]) == theirs.convert_ids_to_tokens([0, 1, 300])
            assert ours.convert_tokens_to_ids(["a", "nothing such"]) == theirs.convert_tokens_to_ids(
                ["a", "nothing such"]
            )

    def test_case(self, gemma_folders: dict[str, Path]) -> None:
        gemma, siglip2 = (load_tokenizer(gemma_folders[name]) for name in ("GemmaTokenizer", "Siglip2Tokenizer"))
        assert type(gemma) is GemmaTokenizer and type(siglip2) is Siglip2Tokenizer
        assert gemma("DOGS") != gemma("dogs") and siglip2("DOGS") == siglip2("dogs")

    def test_round_trip(self, gemma_folders: dict[str, Path], tmp_path: Path) -> None:
        for name, folder in gemma_folders.items():
            ours = load_tokenizer(folder)
            ours.save_pretrained(tmp_path / name)
            (tmp_path / name / "config.json").write_bytes((folder / "config.json").read_bytes())
            theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path / name), load_tokenizer(tmp_path / name)
            assert type(again) is type(ours)
            assert ours(GEMMA_TEXTS) == theirs(GEMMA_TEXTS).data == again(GEMMA_TEXTS)
            assert pickle.loads(pickle.dumps(ours))(GEMMA_TEXTS) == ours(GEMMA_TEXTS)

    def test_errors(self, gemma_folders: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
        with pytest.raises(OSError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)
        for content in ("{", "{}", '{"model": {"type": "BPE", "merges": [], "vocab": 3}}', '{"model": {}}'):
            (tmp_path / "tokenizer.json").write_text(content)
            with pytest.raises(OSError, match=r"tokenizer\.json"):
                load_tokenizer(tmp_path)
        ours = load_tokenizer(gemma_folders["GemmaTokenizer"])
        for text in (None, [], [3], [["a", "b", "c"]]):
            with pytest.raises(ValueError, match="supported"):
                ours(text)
        with pytest.raises(ValueError, match="Second sequence"):
            ours("a photo of a cat", truncation="only_second", max_length=2)
        with pytest.raises(TypeError, match="paddign"):
            ours("a", paddign=True)
        with pytest.raises(IndexError, match="10000"):
            ours.convert_ids_to_tokens([10_000])


def test_importing_loads_no_tokenizer_library() -> None:
    """Who only runs the model pays for none of them."""
    code = (
        "import sys, siglip_model, siglip_model.batch\n"
        "print([name for name in ('sentencepiece', 'tokenizers', 'huggingface_hub', 'PIL') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
