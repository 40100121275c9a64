"""Calls of a tokenizer, with every option of padding, truncation and results, against transformers."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_samples import assert_same, glued_text, plain

from siglip_model.batch import BatchFeature
from siglip_model.text.siglip import SiglipTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has", "ignore:`max_length` is ignored")


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
        # transformers returns an empty float tensor if only the first text is empty; this project raises
        for tokenizer, reference in pairs:
            first_is_empty = options.get("return_tensors") == "pt" and options.get("add_special_tokens") is False
            if first_is_empty and not isinstance(text[0], str):
                continue
            assert_same(lambda tokenizer: tokenizer(*text, **options), tokenizer, reference)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("strategy", ["only_first", "only_second", "longest_first"])
    def test_truncation_sides(self, model_files: dict[str, Path], side: str, strategy: str) -> None:
        tokenizer = SiglipTokenizer(model_files["plain"], truncation_side=side)
        reference = transformers.SiglipTokenizer(str(model_files["plain"]), truncation_side=side)
        texts = ["the photo of a cat", "dog", "", "a plane 2 3 10 of the dog"]
        for first in texts:
            for second in texts[:2]:  # transformers drops an empty second text, with its </s>, only on the left
                for length in range(1, 14):
                    options = {"truncation": strategy, "max_length": length}
                    assert tokenizer(first, second, **options) == reference(first, second, **options).data

    def test_ids_tokens_and_words(self, pairs: list[Any]) -> None:
        for tokenizer, reference in pairs:
            for text, options in [
                ([5, 6, 7], {}),
                ([[5, 6], [7, 1]], {"padding": True}),
                (["the", "photo, of"], {"is_split_into_words": True}),
                ([["the", "cat"], ["dog"]], {"is_split_into_words": True, "padding": True}),
                ([["cat"]], {}),
                (("a cat", "a dog"), {}),
            ]:
                assert plain(tokenizer(text, **options)) == plain(reference(text, **options))
                assert tokenizer.encode(text, **options) == reference.encode(text, **options)

    def test_overflow(self, pairs: list[Any]) -> None:
        tokenizer, reference = pairs[0]
        options = {"max_length": 4, "stride": 2, "return_overflowing_tokens": True}
        assert tokenizer("the photo of a cat", **options) == reference("the photo of a cat", **options).data

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
            ({"return_offsets_mapping": True}, NotImplementedError, "return_offsets_mapping"),
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

    def test_unequal_lengths_raise_with_a_remedy(self, pairs: list[Any]) -> None:
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
        for tokenizer, reference in pairs:
            for form in forms:
                for options in (
                    {}, {"padding": "max_length", "max_length": 6}, {"pad_to_multiple_of": 4, "padding_side": "left"},
                    {"return_attention_mask": True}, {"return_tensors": "np"}, {"padding": False, "max_length": 2},
                ):  # fmt: skip
                    before = copy.deepcopy(form)
                    assert_same(
                        lambda t, form=form, options=options: t.pad(copy.deepcopy(form), **options),
                        tokenizer,
                        reference,
                    )
                    try:
                        tokenizer.pad(form, **options)
                    except ValueError:
                        continue
                    assert plain_all(form) == plain_all(before)

    @pytest.mark.parametrize("form", [{"ids": [1]}, [], "text", {"input_ids": [[1], [2]], "labels": [1, 2, 3]}])
    def test_bad_input(self, pairs: list[Any], form: Any) -> None:
        with pytest.raises(ValueError, match="input_ids"):
            pairs[0][0].pad(form)


def plain_all(value: Any) -> Any:
    return [plain(item) for item in value] if isinstance(value, list) else plain(value)
