"""Text to tokens and ids, and back: token for token what transformers' SiglipTokenizer returns."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_samples import any_text

pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has", "ignore:`max_length` is ignored")


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

    def test_undocumented_quirks_hold(self, pairs: list[Any]) -> None:
        ours, _ = pairs[0]
        assert ours.tokenize("the cat")[0].startswith("▁")
        assert not ours.tokenize("</s>cat")[1].startswith("▁")  # no space is added after a special token
        assert ours.tokenize("</s>\U0001f431") == ["</s>"]  # an unknown character there is dropped
        assert ours("cat</s>")["input_ids"][-2:] != [1, 1]  # one </s> is enough

    def test_what_is_not_text(self, pairs: list[Any]) -> None:
        with pytest.raises(ValueError, match="surrogate"):  # transformers rejects it as well
            pairs[0][0]("a \ud800 b")
        with pytest.raises(TypeError, match="bytes"):
            pairs[0][0].tokenize(b"cat")


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
    def test_same_vocabulary_and_attributes(self, pairs: list[Any]) -> None:
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
