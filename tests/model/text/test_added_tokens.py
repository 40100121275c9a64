"""Tokens that are added to a tokenizer, special tokens that are set, and texts to predict, against transformers."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from siglip_model import AutoTokenizer, SiglipTokenizer
from siglip_model.text.tokenizer_config import AddedToken

TEXTS = ["a <new> cat", "A Photo of <Other>!", "a new cat", "<x><new>"]


@pytest.fixture
def pair(model_files: dict[str, Path]) -> tuple[SiglipTokenizer, Any]:
    return SiglipTokenizer(model_files["plain"]), transformers.SiglipTokenizer(str(model_files["plain"]))


def assert_same(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.all_special_tokens == theirs.all_special_tokens
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("tokens", ["<new>", ["<new>", "<Other>", "<new>"], ["cat", ""], [], None])
def test_tokens_are_added_as_in_transformers(pair: Any, tokens: Any, special: bool, tmp_path: Path) -> None:
    ours, theirs = pair
    assert ours.add_tokens(tokens, special_tokens=special) == theirs.add_tokens(tokens, special_tokens=special)
    assert_same(ours, theirs)
    ours.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(ours))):
        assert again.get_vocab() == ours.get_vocab() and again(TEXTS)["input_ids"] == ours(TEXTS)["input_ids"]


def test_tokens_with_flags(pair: Any) -> None:
    ours, theirs = pair
    flags = {"lstrip": True, "rstrip": True, "normalized": False, "special": True}
    for token in (AddedToken("<new>", **flags), transformers.AddedToken("<new>", **flags)):
        ours.add_tokens([token])
    theirs.add_tokens([transformers.AddedToken("<new>", **flags)])
    assert_same(ours, theirs)
    here, there = ([*map(str, tokenizer.added_tokens_decoder.values())] for tokenizer in pair)
    assert here == there and "<new>" in here
    assert ours.init_inputs == theirs.init_inputs == ()
    with pytest.raises(TypeError, match="new_tokens holds 3"):
        ours.add_tokens(["a", 3])


@pytest.mark.parametrize("replace", [False, True])
def test_special_tokens_are_added_as_in_transformers(pair: Any, replace: bool) -> None:
    ours, theirs = pair
    for tokens in (
        {"cls_token": "<x>", "extra_special_tokens": ["<new>", "cat"]},
        {"additional_special_tokens": ["<Other>"]},
        {"pad_token": "<pad>"},
        {},
    ):
        arguments = {"replace_extra_special_tokens": replace}
        assert ours.add_special_tokens(tokens, **arguments) == theirs.add_special_tokens(tokens, **arguments)
        assert_same(ours, theirs)
        assert ours.extra_special_tokens == ours.additional_special_tokens == theirs.extra_special_tokens
        assert ours.extra_special_tokens_ids == theirs.extra_special_tokens_ids
    for bad in ({"colour_token": "<x>"}, {"cls_token": 3}, {"extra_special_tokens": "<x>"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ours.add_special_tokens(bad)


def test_special_tokens_are_set_by_token_and_by_id(pair: Any) -> None:
    ours, theirs = pair
    for tokenizer in pair:
        tokenizer.pad_token = transformers.AddedToken("<unk>")
        tokenizer.cls_token_id = 5
        tokenizer.extra_special_tokens_ids = [6, 7]
        tokenizer.eos_token_id = None
    assert (ours.pad_token, ours.cls_token, ours.eos_token) == (theirs.pad_token, theirs.cls_token, theirs.eos_token)
    assert ours.extra_special_tokens == theirs.extra_special_tokens
    with pytest.raises(TypeError, match="pad_token is 3"):
        ours.pad_token = 3


def test_a_token_that_is_set_splits_no_text(pair: Any) -> None:
    ours, theirs = pair
    for tokenizer in pair:
        tokenizer.pad_token = "cat"
        tokenizer.extra_special_tokens = ["photo", "a"]
    for text in ("a photo of a cat", "photocat", "a", "cat"):
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_rust_tokenizers_take_them_too(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE({"a": 0, "b": 1, "<pad>": 2}, [])
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    ours = AutoTokenizer.from_pretrained(tmp_path, pad_token="<pad>")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>")
    for tokenizer in (ours, theirs):
        assert tokenizer.is_fast and tokenizer.add_tokens(["<new>", "ab"]) == 2
        assert tokenizer.add_special_tokens({"eos_token": "<end>"}) == 1 and len(tokenizer) == 6
    for arguments in ({}, {"return_offsets_mapping": True, "padding": True}):
        got, expected = (each(["ab<new>a", "b"], **arguments) for each in (ours, theirs))
        assert {name: got[name] for name in got} == {name: expected[name] for name in got}
    assert ours(["ab", "b"], return_offsets_mapping=True, padding=True, return_tensors="pt")["offset_mapping"].ndim == 3


def test_texts_to_predict(pair: Any) -> None:
    for arguments in (
        {"text_target": "a cat"},
        {"text": ["a cat", "a"], "text_target": ["a photo", "b"], "padding": True},
        {"text": "a cat", "text_target": "a photo of a cat", "max_length": 6, "max_target_length": 3},
    ):
        options = {"truncation": True, **arguments}
        got, expected = (each(**options) for each in pair)
        assert dict(got) == dict(expected)


def test_other_names_of_transformers(pair: Any, tmp_path: Path) -> None:
    ours, theirs = pair
    assert ours.remove_punctuation("a, b!") == theirs.remove_punctuation("a, b!")
    assert ours.max_len_single_sentence == theirs.max_len_single_sentence
    assert ours.max_len_sentences_pair == theirs.max_len_sentences_pair
    assert ours.backend == theirs.backend and ours.is_fast is theirs.is_fast is False
    assert ours.clean_up_tokenization("a .") == "a."
    assert ours.init_kwargs["model_max_length"] == 64 and ours.pad_token_type_id == theirs.pad_token_type_id
    names = {Path(path).name for path in ours.save_pretrained(tmp_path, filename_prefix="my")}
    assert names == {"my-spiece.model", "my-tokenizer_config.json"}
    assert names <= {Path(path).name for path in theirs.save_pretrained(str(tmp_path), filename_prefix="my")}
    with pytest.raises(ValueError, match="legacy_format is True"):
        ours.save_pretrained(tmp_path, legacy_format=True)


def test_a_text_that_is_too_long_is_said_once(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    ours, _ = pair
    ours("a cat " * 9, truncation=True)
    ours("a cat " * 99, verbose=False)
    assert not caplog.records
    ours(["a", "a cat " * 99])
    ours("a cat " * 99)
    assert [record.args[2] for record in caplog.records] == [64]


def test_the_trainer_s_collator_pads(pair: Any) -> None:
    batch = transformers.DataCollatorWithPadding(pair[0])(
        [{**pair[0]("a cat"), "label": 1}, {**pair[0]("a"), "label": 0}]
    )
    expected = transformers.DataCollatorWithPadding(pair[1])(
        [{**pair[1]("a cat"), "label": 1}, {**pair[1]("a"), "label": 0}]
    )
    assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "attention_mask", "labels"))
