"""Measures a checkpoint on a design that it was not trained on.

python -m siglip_model.demo.recipe.evaluate [CHECKPOINT] --emoji FOLDER
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor

from siglip_model.demo import CHECKPOINT, SCORE_FILE
from siglip_model.demo.recipe.emoji import (
    DESIGNS,
    TEST_DESIGN,
    choose_names,
    download,
    draw,
    on_white,
    read_design,
    spoken,
)
from siglip_model.outputs import pooled, unit_length
from siglip_model.text.prompts import TEMPLATE

PIXELS = 128  # drawn at this size on white, then resized by the checkpoint's image processor
CANDIDATES = 10
TRIALS = 10  # per picture


@dataclass(frozen=True)
class Score:
    """names: number of candidates; pictures: number of images. The others are fractions in [0, 1]."""

    names: int
    pictures: int
    ten_way: float
    top1: float
    top5: float

    def __str__(self) -> str:
        return (
            f"{self.ten_way:.1%} right among {CANDIDATES} random names; among all {self.names} names "
            f"top-1 {self.top1:.1%}, top-5 {self.top5:.1%} ({self.pictures} images)"
        )

    def save(self, folder: Path) -> None:
        """Writes the score beside the checkpoint, for `siglip demo`."""
        rounded = {name: round(value, 3) for name, value in asdict(self).items()}
        (folder / SCORE_FILE).write_text(json.dumps(rounded, indent=2) + "\n")


def score_logits(logits: Tensor, right: Tensor, seed: int = 0) -> Score:
    """logits: (images, names); right: int64 (images,), the index of each image's name. Ties count as wrong.

    Ten-way: for every image, nine other names are drawn ten times, uniformly without replacement.
    """
    pictures, names = logits.shape
    true = logits.gather(1, right[:, None])  # [pictures, 1]
    others = logits.scatter(1, right[:, None], float("-inf"))
    better = (others >= true).sum(1)
    generator = torch.Generator().manual_seed(seed)
    wins = 0
    for _ in range(TRIALS):
        keys = torch.rand(pictures, names, generator=generator).scatter(1, right[:, None], -1.0)
        drawn = keys.topk(CANDIDATES - 1, dim=1).indices  # never the right name, whose key is the lowest
        wins += int((others.gather(1, drawn) < true).all(1).sum())
    fraction = [float((better < k).float().mean()) for k in (1, 5)]
    return Score(names, pictures, wins / (TRIALS * pictures), *fraction)


@torch.inference_mode()
def embeddings(
    model: Any, processor: Any, images: Sequence[Image.Image], names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Of unit length, (names, width) and (images, width), computed through the processor as a user would."""
    texts, pictures = [], []
    prompts = [TEMPLATE.format(name) for name in names]
    for start in range(0, len(prompts), 256):
        batch = processor(
            text=prompts[start : start + 256], padding="max_length", max_length=64, truncation=True, return_tensors="pt"
        )
        texts.append(pooled(model.get_text_features(batch["input_ids"].to(model.device))))
    for start in range(0, len(images), 256):
        batch = processor(images=list(images[start : start + 256]), return_tensors="pt")
        pictures.append(pooled(model.get_image_features(batch["pixel_values"].to(model.device))))
    return unit_length(torch.cat(texts)), unit_length(torch.cat(pictures))


def all_logits(model: Any, processor: Any, images: Sequence[Image.Image], names: Sequence[str]) -> Tensor:
    """The model's logits (images, names)."""
    with torch.inference_mode():
        return model.logits_per_text(*embeddings(model, processor, images, names)).T


def evaluate(model: Any, processor: Any, emoji: Path, design: str = TEST_DESIGN.name, seed: int = 0) -> Score:
    """Scores a model on every image that `design` has of the names."""
    sets = {icons.design.name: icons for icons in (read_design(emoji, each) for each in DESIGNS)}
    names, shown = choose_names(list(sets.values()))
    images = [on_white(draw(sets[design].svg(icon), PIXELS)) for icon in shown[design].values()]
    right = torch.tensor([names.index(name) for name in shown[design]])
    return score_logits(all_logits(model, processor, images, [spoken(name) for name in names]), right, seed)


def main(
    checkpoint: Annotated[
        Path, typer.Argument(help="The checkpoint's folder, or an exported .onnx file.")
    ] = CHECKPOINT,
    emoji: Annotated[Path, typer.Option(help="Unpacked emoji packages; missing ones are fetched.")] = Path("emoji"),
    design: Annotated[str, typer.Option(help="Design to measure on.")] = TEST_DESIGN.name,
    seed: Annotated[int, typer.Option(help="Seed of the random names.")] = 0,
) -> None:
    """Print how often the checkpoint ranks the right name first."""
    from siglip_model import SiglipModel, SiglipProcessor, onnx

    if design not in {each.name for each in DESIGNS}:
        raise typer.BadParameter(
            f"{design}; supported: {', '.join(each.name for each in DESIGNS)}", param_hint="--design"
        )
    download(emoji)
    exported = checkpoint.suffix == ".onnx"
    model = onnx.load(checkpoint) if exported else SiglipModel.from_pretrained(checkpoint)
    processor = SiglipProcessor.from_pretrained(checkpoint.parent if exported else checkpoint)
    print(f"{design}: {evaluate(model, processor, emoji, design, seed)}")


if __name__ == "__main__":
    typer.run(main)
