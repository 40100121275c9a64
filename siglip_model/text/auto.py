"""Selects the tokenizer class from a checkpoint's files."""

from __future__ import annotations

import os
from typing import Any

from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.files import find_file, split_hub_arguments
from siglip_model.text.siglip import SiglipTokenizer
from siglip_model.text.tokenizer import Tokenizer
from siglip_model.text.tokenizer_config import find_settings


def load_tokenizer(path_or_id: str | os.PathLike[str], **arguments: Any) -> Tokenizer:
    """The tokenizer of a directory or Hub repository: SigLIP's, or Gemma's for SigLIP 2.

    The class follows tokenizer_class of tokenizer_config.json; without one, spiece.model or tokenizer.json decides.
    Raises CheckpointError for an unsupported class, and if there are no tokenizer files.
    """
    from siglip_model.text.gemma import TOKENIZER_FILE, class_for

    hub, _ = split_hub_arguments(arguments)
    config = find_settings(path_or_id, Tokenizer.config_name, hub)
    name = ((config and config.get("tokenizer_class")) or "").removesuffix("Fast")
    if name == "SiglipTokenizer" or (not name and find_file(path_or_id, SiglipTokenizer.vocab_file_name, hub)):
        return SiglipTokenizer.from_pretrained(path_or_id, **arguments)
    if not name and not find_file(path_or_id, TOKENIZER_FILE, hub):
        raise CheckpointError(
            f"{path_or_id} has no tokenizer: neither {SiglipTokenizer.vocab_file_name} nor {TOKENIZER_FILE}"
        )
    tokenizer_class = class_for(name)
    if tokenizer_class is None:
        assert config is not None  # it named the class
        config.refuse(
            "tokenizer_class",
            "SiglipTokenizer, GemmaTokenizer, Siglip2Tokenizer, PreTrainedTokenizerFast, TokenizersBackend",
        )
    return tokenizer_class.from_pretrained(path_or_id, **arguments)
