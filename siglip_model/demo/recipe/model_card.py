"""Writes the model card of the demo checkpoint from the numbers of its training run."""

import textwrap
from pathlib import Path

from siglip_model.demo.recipe.emoji import (
    MINIMUM_TRAINING_DESIGNS,
    TEST_DESIGN,
    TRAINING_DESIGNS,
    VALIDATION_DESIGN,
    Emoji,
)
from siglip_model.demo.recipe.evaluate import CANDIDATES, PIXELS, TRIALS, Score
from siglip_model.demo.recipe.vocabulary import PROMPTS
from siglip_model.text.prompts import TEMPLATE
from siglip_model.training.loop import TrainingConfig

_CARD = """---
license: apache-2.0
pipeline_tag: zero-shot-image-classification
tags: [siglip, emoji]
---

# A small SigLIP trained on emoji

A SigLIP of {parameters:,} parameters ({size} x {size} pixels, {pieces} text pieces), trained from scratch on emoji so
that the package can be tried without a download. It knows drawings of {names} things by their English names. It is not
a general model: for photographs use a Google checkpoint, which loads with the same line of code.

## Results on a design that was not trained on

{test_package} {test_version}: {pictures} images, one for each of {names} names.

| measure | result |
|---|---|
| ten-way: the right name among {candidates} random ones | **{ten_way:.1%}** |
| top-5 among all {names} names | **{top5:.1%}** |
| top-1 among all {names} names | {top1:.1%} |

Text: "{template}". Images are drawn at {pixels} pixels on white, then pass through the checkpoint's image processor.
Ten-way: for each image, nine other names are drawn {trials} times, uniformly without replacement, with seed 0; ties
count as wrong. Measured with the averaged weights after the last step, in float32. Nothing in this run was selected on
images of this design; the model's size and the recipe come from an earlier trial that was also measured on it. The
list of names comes from this design (names only): its icons, except skin tones and flags of countries and regions,
that at least {minimum} training designs draw.

    python -m siglip_model.demo.recipe.evaluate CHECKPOINT --emoji FOLDER

## Training

{training_pictures} images of {training_designs} designs. AdamW with {steps} steps, {warmup} of them warm-up, a cosine
schedule from {rate:g}, betas {betas}, weight decay {decay}, gradients clipped to norm {clip:g}, {precision}, seed
{seed}; the paper's sigmoid loss, initialised with t' = log 10 and b = -10; a batch is {texts} names with {views} images
each, of different designs where there are enough (the loss is the mean over the {views}); averaged weights (decay
{average}). Prompts: {prompts}. Augmentation: rotation, scale, aspect, shear, shift, a smooth warp, background, hue,
saturation, brightness, blur; no mirroring. {validation} is not trained on: the run's validation log is measured on it.

    python -m siglip_model.demo.recipe.build --emoji FOLDER --out FOLDER \\
        --steps {steps} --names-per-batch {texts} --views {views} --learning-rate {rate:g} --seed {seed}

The command fetches the pinned packages itself (npm) and resumes if interrupted. Another processor, number of threads or
version of PyTorch rounds differently, so weights and scores will differ slightly.

## Licences and attribution

The weights are licensed under Apache-2.0, like the project. They were trained on these designs, whose images they do
not contain:

| design | package | author | licence | use |
|---|---|---|---|---|
{designs}
"""


def write_card(
    folder: Path,
    score: Score,
    emoji: Emoji,
    config: TrainingConfig,
    *,
    parameters: int,
    size: int,
    pieces: int,
    texts: int,
    views: int,
) -> None:
    """Writes README.md into `folder`. size: pixels of the model's input; texts, views: per batch."""
    uses = [(design, "training") for design in TRAINING_DESIGNS]
    uses += [(VALIDATION_DESIGN, "validation"), (TEST_DESIGN, "test; the bundled images")]
    rows = [
        f"| {d.name} ({d.source}) | {d.package} {d.version} | {d.author} | {d.licence} | {use} |" for d, use in uses
    ]
    card = _CARD.format(
        parameters=parameters,
        size=size,
        pieces=pieces,
        names=score.names,
        pictures=score.pictures,
        test_package=TEST_DESIGN.package,
        test_version=TEST_DESIGN.version,
        candidates=CANDIDATES,
        trials=TRIALS,
        pixels=PIXELS,
        template=TEMPLATE,
        minimum=MINIMUM_TRAINING_DESIGNS,
        ten_way=score.ten_way,
        top1=score.top1,
        top5=score.top5,
        training_pictures=sum(len(emoji.pictures[design.name]) for design in TRAINING_DESIGNS),
        training_designs=len(TRAINING_DESIGNS),
        steps=config.steps,
        warmup=config.warmup_steps,
        rate=config.learning_rate,
        betas=f"{config.beta1}, {config.beta2}",
        decay=config.weight_decay,
        clip=config.gradient_clip,
        precision="bfloat16 autocast" if config.bfloat16 else "float32",
        seed=config.seed,
        texts=texts,
        views=views,
        average=config.average_decay,
        prompts=", ".join(f'"{prompt}" ({share:.0%})' for prompt, share in PROMPTS),
        validation=VALIDATION_DESIGN.package,
        designs="\n".join(rows),
    )
    (folder / "README.md").write_text("\n\n".join(_wrap(paragraph) for paragraph in card.split("\n\n")))


def _wrap(paragraph: str) -> str:
    """Wraps prose at 120 columns; tables, headings, commands and front matter are kept."""
    if paragraph.startswith(("---", "#", "|", "    ")):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)
