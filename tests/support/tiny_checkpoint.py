"""A SigLIP small enough for any test, with random weights, saved by transformers: model, tokenizer and processor."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from PIL import Image

WORDS = [
    "a", "an", "the", "photo", "of", "this", "is", "cat", "cats", "dog", "plane", "remote", "red", "round", "ball",
    "apple", "two", "on", "sofa", "sky", "night", "picture", "2", "3",
]  # fmt: skip


def save_tiny_checkpoint(folder: Path, *, seed: int = 0, text_positions: int = 64, logit_scale: float = 2.0) -> Path:
    """Writes the checkpoint to `folder` and returns it. Its scores are spread over (0, 1)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_sentencepiece_model())
    tokenizer = transformers.SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"])
    image_processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**layers, "vocab_size": len(tokenizer), "max_position_embeddings": text_positions},
        vision_config={**layers, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(seed)
    model = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" not in name and parameter.dim() > 1:  # larger than initial weights, so that inputs matter
                parameter.mul_(10.0 if "token" in name else 3.0)
        model.logit_scale.fill_(logit_scale)
        model.logit_bias.fill_(-0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


def _sentencepiece_model() -> bytes:
    shuffle = random.Random(0)
    sentences = [" ".join(shuffle.choices(WORDS, k=6)) for _ in range(400)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return written.getvalue()


def shared_tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny checkpoint for the whole test session: saving it takes seconds, most of them transformers' import."""
    folder = tmp_path_factory.getbasetemp() / "tiny_checkpoint"
    return folder if (folder / "model.safetensors").exists() else save_tiny_checkpoint(folder)


def random_image(seed: int, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> Image.Image:
    """A smooth random image: enlarged coarse noise, so that JPEG and resizing keep its content."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)
