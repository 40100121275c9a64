"""The demo's tokenizer: SentencePiece trained on names and prompts, laid out like published checkpoints."""

import io
import json
import string
from pathlib import Path

import sentencepiece

from siglip_model.text.prompts import TEMPLATE

PROMPTS = (  # (prompt, probability in training)
    (TEMPLATE, 0.4),
    ("{}", 0.2),
    ("a photo of a {}", 0.1),
    ("a picture of {}", 0.1),
    ("a drawing of the {}", 0.1),
    ("an emoji of {}", 0.1),
)
PIECES = 1200
LENGTH = 64  # tokens per text, including padding, as in the zero-shot pipeline


def canonical(text: str) -> str:
    """Text as SigLIP's tokenizer normalises it: lower case, no ASCII punctuation, single spaces."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def write_tokenizer(names: list[str], folder: Path) -> None:
    """Trains the pieces and writes spiece.model and tokenizer_config.json into `folder`."""
    texts = [canonical(name) for name in names]
    texts += [canonical(prompt.format(name)) for prompt, _ in PROMPTS for name in names[::10]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=PIECES,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars=string.ascii_lowercase + string.digits,
        pad_id=0,  # unused: texts are padded with the end token
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="identity",  # the tokenizer normalises; the default table is 230 kB
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {
        str(i): {
            "content": piece,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, piece in ((1, "</s>"), (2, "<unk>"))
    }
    config = {
        "added_tokens_decoder": special,
        "do_lower_case": True,
        "eos_token": "</s>",
        "model_input_names": ["input_ids"],
        "model_max_length": LENGTH,
        "pad_token": "</s>",
        "sp_model_kwargs": {},
        "tokenizer_class": "SiglipTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_image_processor(size: int, folder: Path) -> None:
    """Writes preprocessor_config.json: bicubic resize to a square, pixels to [-1, 1], as in published checkpoints."""
    config = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")
