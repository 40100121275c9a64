"""Texts that are hard for tokenizers, small SentencePiece models, and comparison with transformers."""

import io
import random
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import strategies as st

WORDS = [
    "a", "an", "the", "photo", "of", "cat", "dog", "plane", "straße", "ὀδός", "Σίσυφος", "猫", "犬", "写真", "كتاب",
    "שלום", "привет", "été", "naïve", "2", "3", "10",
]  # fmt: skip

# Fragments that are hard for tokenizers: each alone, and joined with others at random.
FRAGMENTS = [
    "</s>", "<unk>", "</S>", "<pad>", "<extra>", "<", "</", "s>", " ", "  ", "\t", "\n", "\r\n", "\x00", "\x1c", "\x85",
    "\u200b", "\u3000", "\u2028", "\ufeff", "\u0301", "é", "ß", "İ", "ΟΔΟΣ", "Σας", "ὀδός", "ﬁ", "½", "①", "A", "cat",
    "Dog", "the photo of", "!", "?.,'\"", "{}", "▁", "▁▁", "猫", "写真", "كتاب", "שלום", "🐱", "👨‍👩‍👧", "\U0010ffff",
    "2", "10",
]  # fmt: skip
glued_text = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
any_text = st.one_of(st.text(), glued_text)


def train_sentencepiece(byte_fallback: bool, **settings: Any) -> bytes:
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


def plain(value: Any) -> Any:
    """The value in comparable form: tensors and arrays as type, dtype and content."""
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


def assert_same(call: Any, tokenizer: Any, reference: Any) -> None:
    """Asserts the same result, or a ValueError where transformers raises one."""
    try:
        expected = plain(call(reference))
    except ValueError:
        with pytest.raises(ValueError, match="supported|cannot be stacked|given"):
            call(tokenizer)
        return
    assert plain(call(tokenizer)) == expected
