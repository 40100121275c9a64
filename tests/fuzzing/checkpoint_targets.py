"""Two checkpoints, which together have each kind of file that can be loaded, and one of an image classifier."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from mutations import json_file, protobuf_file, safetensors_file
from PIL import Image
from target import NotFinite, Refused, Result, Target, run_command
from tokenizer_samples import train_sentencepiece

from siglip_model import (
    AutoModel,
    AutoProcessor,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    pipeline,
)
from siglip_model.images.pillow import SiglipImageProcessorPil
from siglip_model.images.tensor import SiglipImageProcessor
from siglip_model.processor import SiglipProcessor
from siglip_model.text.gemma import GemmaTokenizer
from siglip_model.text.siglip import SiglipTokenizer

LABELS = ["a cat", "the photo of 2 dogs"]
PICTURE = "picture.png"
WIDTH = 32


def build_siglip(folder: Path) -> None:
    """spiece.model, the Pillow processor, one file of weights."""
    folder.mkdir()
    (folder / "spiece.model").write_bytes(train_sentencepiece(False))
    tokenizer = SiglipTokenizer(folder / "spiece.model", model_input_names=["input_ids"])
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    _tiny_model(len(tokenizer)).save_pretrained(folder)
    picture().save(folder / PICTURE)


def build_gemma(folder: Path) -> None:
    """tokenizer.json, the fast processor in processor_config.json, shards with an index."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    tokenizer = GemmaTokenizer(folder / "tokenizer.json", pad_token="<pad>", eos_token="<eos>", model_max_length=64)
    image_processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    SiglipProcessor(image_processor, tokenizer).save_pretrained(folder)
    _tiny_model(len(tokenizer)).save_pretrained(folder, max_shard_size="100KB")
    picture().save(folder / PICTURE)


def build_classifier(folder: Path) -> None:
    """A vision tower whose config.json names the classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = _tiny_config(8, id2label={0: "cat", 1: "dog", 2: "bird"})
        SiglipForImageClassification(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def _tiny_config(vocabulary: int, **options: Any) -> SiglipConfig:
    layers = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layers, "vocab_size": vocabulary, "max_position_embeddings": 64}
    return SiglipConfig(text, {**layers, "image_size": 32, "patch_size": 8}, **options)


def _tiny_model(vocabulary: int) -> SiglipModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipModel(_tiny_config(vocabulary))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3.0)  # so that inputs matter
    return model


def _tokenizer_json() -> str:
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    built = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
    built.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    built.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    built.train_from_iterator(["a photo of a cat", "the 2 dogs on a sofa"] * 20, trainer)
    built.post_processor = tokenizers.processors.TemplateProcessing("$A <eos>", "$A <eos> $B <eos>", [("<eos>", 1)])
    return built.to_str()


def picture() -> Image.Image:
    """Of the model's size, so that it does not have to be resized."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@torch.no_grad()
def use_classes(folder: Path) -> Result:
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    side = model.config.vision_config.image_size
    try:
        inputs = processor(
            images=[picture()],
            text=LABELS,
            return_tensors="pt",
            images_kwargs={"size": {"height": side, "width": side}},  # the processor does not know the model
            text_kwargs={"padding": "max_length", "max_length": 64, "truncation": True},
        )
    except ValueError as error:
        raise Refused(str(error)) from error
    scores = torch.sigmoid(model(**inputs, return_dict=True).logits_per_image)[0]
    if not scores.isfinite().all():
        raise NotFinite
    return {"scores": scores.tolist()}


def use_pipeline(folder: Path) -> Result:
    classifier = pipeline(model=folder, device="cpu")
    try:
        entries = classifier(picture(), LABELS)
    except ValueError as error:
        if "its scores are not finite" in str(error):
            raise NotFinite from error
        raise
    return {"scores": [entry["score"] for entry in sorted(entries, key=lambda entry: entry["label"])]}


def use_classify(folder: Path) -> Result:
    words = ["classify", str(folder / PICTURE), "--labels", ",".join(LABELS), "--json"]
    (result,) = json.loads(run_command([*words, "--model", str(folder), "--device", "cpu"]))
    return {"scores": [entry["score"] for entry in sorted(result["predictions"], key=lambda entry: entry["label"])]}


@torch.no_grad()
def use_classifier(folder: Path) -> Result:
    model = SiglipForImageClassification.from_pretrained(folder)
    processor = SiglipImageProcessorPil.from_pretrained(folder)
    side = model.config.vision_config.image_size
    size = {"height": side, "width": side}  # the processor does not know the model
    try:
        inputs = processor(picture(), size=size, return_tensors="pt")
    except ValueError as error:
        raise Refused(str(error)) from error
    scores = model(**inputs, return_dict=True).logits[0].sigmoid()
    if not scores.isfinite().all():
        raise NotFinite
    return {"scores": scores.tolist(), "labels": [model.config.id2label[index] for index in range(len(scores))]}


def scores_problem(result: Result, whole: Result, done: str) -> str:
    scores = result["scores"]
    if len(scores) != len(whole["scores"]) or not all(0 <= score <= 1 for score in scores):
        return f"scores are {scores}"
    return ""


CHECKPOINT_WAYS = {
    "AutoModel and AutoProcessor": use_classes,
    "pipeline": use_pipeline,
    "siglip classify": use_classify,
}

SIGLIP = Target(
    "siglip",
    build_siglip,
    {
        "config.json": json_file,
        "preprocessor_config.json": json_file,
        "tokenizer_config.json": json_file,
        "model.safetensors": safetensors_file,
        "spiece.model": protobuf_file,
    },
    CHECKPOINT_WAYS,
    ("CheckpointError",),
    scores_problem,
    read_only=True,
)
GEMMA = Target(
    "gemma",
    build_gemma,
    {
        "config.json": json_file,
        "processor_config.json": json_file,
        "tokenizer_config.json": json_file,
        "tokenizer.json": json_file,
        "model.safetensors.index.json": json_file,
        "model-00002-of-00003.safetensors": safetensors_file,
    },
    CHECKPOINT_WAYS,
    ("CheckpointError",),
    scores_problem,
    read_only=True,
)
CLASSIFIER = Target(
    "classifier",
    build_classifier,
    {"config.json": json_file, "preprocessor_config.json": json_file, "model.safetensors": safetensors_file},
    {"SiglipForImageClassification": use_classifier},
    ("CheckpointError",),
    scores_problem,
    read_only=True,
)
