"""`AutoTokenizer`: the tokenizer class that a checkpoint's files ask for."""

from __future__ import annotations

import os
from typing import Any

from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.files import find_file, split_hub_arguments
from siglip_model.checkpoints.registered import Registry
from siglip_model.text.siglip import SiglipTokenizer
from siglip_model.text.tokenizer import Tokenizer
from siglip_model.text.tokenizer_config import find_settings


class AutoTokenizer(Registry):
    """`AutoTokenizer.from_pretrained(...)` returns SigLIP's tokenizer, or Gemma's for SigLIP 2."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, use_fast: bool | None = None, **arguments: Any
    ) -> Any:
        """The tokenizer of a directory or Hub repository.

        The class follows tokenizer_class of tokenizer_config.json; without one, spiece.model or tokenizer.json decides.
        use_fast: without effect, since each class has one implementation, with the ids of both of transformers 4's.
        Other arguments as for `SiglipTokenizer.from_pretrained` or `GemmaTokenizer.from_pretrained`.
        Raises CheckpointError for an unsupported class, and if there are no tokenizer files.
        """
        from siglip_model.text.gemma import TOKENIZER_FILE, class_for

        where = pretrained_model_name_or_path
        hub, _ = split_hub_arguments(arguments)
        if own := cls.registered_for(where, hub):
            return own.from_pretrained(where, **arguments)
        config = find_settings(where, Tokenizer.config_name, hub)
        name = ((config and config.get("tokenizer_class")) or "").removesuffix("Fast")
        if name == "SiglipTokenizer" or (not name and find_file(where, SiglipTokenizer.vocab_file_name, hub)):
            return SiglipTokenizer.from_pretrained(where, **arguments)
        if not name and not find_file(where, TOKENIZER_FILE, hub):
            raise CheckpointError(
                f"{where} has no tokenizer: neither {SiglipTokenizer.vocab_file_name} nor {TOKENIZER_FILE}"
            )
        tokenizer_class = class_for(name)
        if tokenizer_class is None:
            assert config is not None  # it named the class
            config.refuse(
                "tokenizer_class",
                "SiglipTokenizer, GemmaTokenizer, Siglip2Tokenizer, PreTrainedTokenizerFast, TokenizersBackend",
            )
        return tokenizer_class.from_pretrained(where, **arguments)
