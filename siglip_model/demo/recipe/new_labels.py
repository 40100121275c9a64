"""Data to fine-tune the demo checkpoint on: its pictures, augmented, under words that it has never read.

python -m siglip_model.demo.recipe.new_labels --out labels

Writes labels/train, a captioned folder, and labels/test, a folder per word, drawn with other augmentations.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from siglip_model.demo import PICTURES
from siglip_model.demo.recipe.augmentation import augment
from siglip_model.text.prompts import TEMPLATE

WORDS = ("blim", "fend", "morv", "plon", "quax", "tisk", "wugs", "zorp")  # for the pictures in order of their names
DRAWN, SIZE = 80, 64


def main(
    out: Annotated[Path, typer.Option(help="Output folder.")],
    train: Annotated[int, typer.Option(help="Pictures per word to train on.")] = 40,
    test: Annotated[int, typer.Option(help="Pictures per word to test on.")] = 10,
) -> None:
    """Write the pictures."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for word, path in zip(WORDS, sorted(PICTURES.glob("*.png")), strict=True):
        picture = torch.from_numpy(np.array(Image.open(path).convert("RGBA").resize((DRAWN, DRAWN))))
        several = picture.permute(2, 0, 1).expand(train + test, -1, -1, -1)
        pixels = ((augment(several, SIZE, generator) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for number, image in enumerate(pixels):
            name = f"{word}/{number}.png"
            file = out / ("train" if number < train else "test") / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
            if number < train:
                rows.append({"image": name, "caption": TEMPLATE.format(word)})
    (out / "train" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{out}: {len(rows)} pictures in train, {test * len(WORDS)} in test")


if __name__ == "__main__":
    typer.run(main)
