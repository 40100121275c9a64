"""Captioned images as folders and as shards, and the tiny checkpoint's preparation of them."""

import io
import json
import tarfile
from pathlib import Path

from tiny_checkpoint import WORDS, random_image

from siglip_model import SiglipProcessor
from siglip_model.training.preparation import Preparation


def prepared_by(checkpoint: Path, **augmentation: object) -> Preparation:
    return Preparation(SiglipProcessor.from_pretrained(checkpoint), 8, **augmentation)


def caption(number: int) -> str:
    return f"a {WORDS[number % len(WORDS)]} {WORDS[(number * 7) % len(WORDS)]}"


def save_folder(folder: Path, count: int) -> Path:
    """0.png, 1.png ... with two captions each."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "captions.jsonl", "w") as file:
        for number in range(count):
            random_image(number).save(folder / f"{number}.png")
            captions = [caption(number), f"this is {caption(number)}"]
            file.write(json.dumps({"image": f"{number}.png", "captions": captions}) + "\n")
    return folder


def jpeg(number: int) -> bytes:
    content = io.BytesIO()
    random_image(number).save(content, "JPEG")
    return content.getvalue()


def save_shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def shard_files(numbers: range) -> dict[str, bytes]:
    return {
        f"{number:03}.{kind}": content
        for number in numbers
        for kind, content in (("jpg", jpeg(number)), ("txt", caption(number).encode()))
    }
