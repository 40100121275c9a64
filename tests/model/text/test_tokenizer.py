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
        for tokenizer, reference in pairs:
            assert tokenizer.tokenize(text) == reference.tokenize(text)
            assert tokenizer.tokenize(text, split_special_tokens=split) == reference.tokenize(
                text, split_special_tokens=split
            )
            assert tokenizer.canonicalize_text(text) == reference.canonicalize_text(text)
            ids = tokenizer(text)["input_ids"]
            assert ids == reference(text)["input_ids"]
            assert tokenizer.decode(ids) == reference.decode(ids)

    @pytest.mark.parametrize(
        "text",
        ["", " ", "!?.", "a" * 10_000, "the photo of 猫! " * 1_000, "</s>" * 50, "</s>é", "é</s>é", "<unk>cat", "▁cat",
         "\x00",
         "cat </s> ", " </s>", "</s></S></s>", "<</s>>", "a\u00a0b", "ΟΔΟΣ", "ΟΔΟΣ</s>ΟΔΟΣ"],
    )  # fmt: skip
    def test_awkward_strings(self, pairs: list[Any], text: str) -> None:
        for tokenizer, reference in pairs[:2] if len(text) > 1_000 else pairs:
            assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
            assert (
                tokenizer(text, padding="max_length", truncation=True)["input_ids"]
                == (reference(text, padding="max_length", truncation=True)["input_ids"])
            )

    def test_keep_punctuation(self, pairs: list[Any]) -> None:
        tokenizer, reference = pairs[0]
        for text in ("A {} b! {x}", "{}{}", "{ }", ""):
            kept = tokenizer.canonicalize_text(text, keep_punctuation_exact_string="{}")
            assert kept == reference.canonicalize_text(text, keep_punctuation_exact_string="{}")

    def test_undocumented_quirks_hold(self, pairs: list[Any]) -> None:
        tokenizer, _ = pairs[0]
        assert tokenizer.tokenize("the cat")[0].startswith("▁")
        assert not tokenizer.tokenize("</s>cat")[1].startswith("▁")  # no space is added after a special token
        assert tokenizer.tokenize("</s>\U0001f431") == ["</s>"]  # an unknown character there is dropped
        assert tokenizer("cat</s>")["input_ids"][-2:] != [1, 1]  # one </s> is enough

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
        for tokenizer, reference in pairs:
            assert tokenizer.decode(ids, **options) == reference.decode(ids, **options)
            assert tokenizer.decode(torch.tensor(ids, dtype=torch.int64), **options) == reference.decode(ids, **options)
            for batch in ([ids, [1]], [[1], ids, []], np.array([[3, 1], [4, 1]]), torch.tensor([[3, 1]]), ids or [1]):
                assert tokenizer.batch_decode(batch, **options) == reference.batch_decode(batch, **options)
            assert tokenizer.convert_ids_to_tokens(ids, skip) == reference.convert_ids_to_tokens(ids, skip)

    @pytest.mark.parametrize("empty", [[], np.array([]), torch.tensor([])], ids=["list", "array", "tensor"])
    def test_an_empty_batch_has_no_texts(self, pairs: list[Any], empty: Any) -> None:
        """As in transformers from 5.24 on; before, it read an empty batch as one empty text."""
        for tokenizer, _ in pairs:
            assert tokenizer.batch_decode(empty) == []
            assert tokenizer.decode(empty) == ""

    def test_a_single_id(self, pairs: list[Any]) -> None:
        for tokenizer, reference in pairs:
            for index in (0, 1, 2, 7):
                assert tokenizer.decode(index) == reference.decode(index)
                assert tokenizer.decode(index, skip_special_tokens=True) == reference.decode(
                    index, skip_special_tokens=True
                )
                assert tokenizer.convert_ids_to_tokens(index) == reference.convert_ids_to_tokens(index)

    def test_id_outside(self, pairs: list[Any]) -> None:
        for index in (-1, 10_000):
            with pytest.raises(IndexError, match=str(index)):
                pairs[0][0].decode([3, index])


class TestVocabulary:
    def test_same_vocabulary_and_attributes(self, pairs: list[Any]) -> None:
        for tokenizer, reference in pairs:
            assert tokenizer.get_vocab() == reference.get_vocab()
            assert (len(tokenizer), tokenizer.vocab_size) == (len(reference), reference.vocab_size)
            for name in (
                "eos_token", "pad_token", "unk_token", "bos_token", "eos_token_id", "pad_token_id", "unk_token_id",
                "bos_token_id", "all_special_tokens", "all_special_ids", "special_tokens_map", "model_max_length",
                "model_input_names", "padding_side", "truncation_side",
            ):  # fmt: skip
                assert getattr(tokenizer, name) == getattr(reference, name), name
            tokens = ["▁cat", "</s>", "<extra>", "no such piece", ""]
            assert tokenizer.convert_tokens_to_ids(tokens) == reference.convert_tokens_to_ids(tokens)
            assert tokenizer.convert_tokens_to_ids("▁cat") == reference.convert_tokens_to_ids("▁cat")
            assert tokenizer.convert_tokens_to_string(tokens) == reference.convert_tokens_to_string(tokens)

    def test_special_token_methods(self, pairs: list[Any]) -> None:
        sequences = [[], [1], [3, 4], [3, 4, 1]]
        for tokenizer, reference in pairs:
            for first in sequences:
                assert tokenizer.get_special_tokens_mask(first, already_has_special_tokens=True) == (
                    reference.get_special_tokens_mask(first, already_has_special_tokens=True)
                )
                for second in (None, *sequences):
                    for method in (
                        "build_inputs_with_special_tokens",
                        "get_special_tokens_mask",
                        "create_token_type_ids_from_sequences",
                    ):
                        assert getattr(tokenizer, method)(first, second) == getattr(reference, method)(first, second)
        with pytest.raises(ValueError, match="token_ids_1"):
            pairs[0][0].get_special_tokens_mask([1], [1], already_has_special_tokens=True)
