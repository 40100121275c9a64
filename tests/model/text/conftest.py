"""Pairs of tokenizers, this project's and transformers', on small models trained here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizer_samples import train_sentencepiece

from siglip_model.text.siglip import SiglipTokenizer


@pytest.fixture(scope="session")
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
        (folder / "spiece.model").write_bytes(train_sentencepiece(**kind))
        files[name] = folder / "spiece.model"
    return files


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("bytes", {"model_input_names": ["input_ids"]}),
    ("bytes", {"additional_special_tokens": ["<extra>", "cat"], "do_lower_case": False}),
    ("no_prefix", {"model_max_length": 7}),
    ("bpe", {"legacy": False}),
]


@pytest.fixture(scope="session")
def pairs(model_files: dict[str, Path]) -> list[tuple[SiglipTokenizer, Any]]:
    """This project's tokenizer and transformers', of every kind."""
    return [
        (SiglipTokenizer(model_files[name], **options), transformers.SiglipTokenizer(str(model_files[name]), **options))
        for name, options in VARIANTS
    ]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Silences transformers, which warns about many options."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)
