"""The model card of the small checkpoint, from the numbers of the run that made it."""

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

# A small SigLIP that knows emoji

A SigLIP of {parameters:,} parameters ({size} x {size} pixels, {pieces} pieces of text) trained from nothing on emoji,
so that there is something to run without downloading anything. It knows drawings of {names} things by their English
names. It is no general model: for photographs take a checkpoint of Google's, which loads with the same line of code.

## Measured on a design that it never saw

{test_package} {test_version}: {pictures} pictures, one for each of {names} names.

| measure | result |
|---|---|
| ten-way: the right name among {candidates} random ones | **{ten_way:.1%}** |
| top-5 among all {names} names | **{top5:.1%}** |
| top-1 among all {names} names | {top1:.1%} |

Text: "{template}". Pictures drawn at {pixels} pixels on white, then through the checkpoint's own image processor.
Ten-way: for each picture {trials} times, nine other names are drawn without replacement, all equally likely, with
seed 0; a tie counts as wrong. Measured with the averaged weights after the last step, in float32. Nothing in this run
was chosen by pictures of this design; the model's size and the recipe follow an earlier trial, which was measured on
it too. The list of names comes from it (names only): its icons without skin tones and flags of countries and regions,
as far as at least {minimum} of the training designs draw them.

    python -m siglip_model.demo.recipe.evaluate CHECKPOINT --emoji FOLDER

## Training

{training_pictures} pictures of {training_designs} designs. AdamW with {steps} steps, warm-up {warmup} and a cosine
from {rate:g}, betas {betas}, weight decay {decay}, gradients clipped to norm {clip:g}, {precision}, seed {seed}; the
paper's sigmoid loss with t' = log 10, b = -10 at the start; a batch is {texts} names and {views} pictures of each, of
different designs where there are so many (the loss is the mean over the {views}); averaged weights (decay {average}).
Prompts: {prompts}. Augmentation: rotation, scale, aspect, shear, shift, a smooth warp, background, hue, saturation,
brightness, blur; no mirroring. {validation} is not trained on: the run's validation log is about it.

    python -m siglip_model.demo.recipe.build --emoji FOLDER --out FOLDER \\
        --steps {steps} --names-per-batch {texts} --views {views} --learning-rate {rate:g} --seed {seed}

The command fetches the pinned packages itself (npm). An interrupted run goes on where it was. With another processor,
number of threads or version of PyTorch rounding differs, so that weights and score will not be exactly these.

## Licences and attribution

The weights are under Apache-2.0, as the project. They were made from these designs, whose pictures they do not
contain:

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
    """Write README.md into `folder`. size: pixels of the model's input; texts, views: of a batch."""
    uses = [(design, "training") for design in TRAINING_DESIGNS]
    uses += [(VALIDATION_DESIGN, "validation"), (TEST_DESIGN, "test; the bundled pictures")]
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
        betas=", ".join(str(beta) for beta in config.betas),
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
    """Prose at 120 columns; tables, headings, commands and the front matter as they are."""
    if paragraph.startswith(("---", "#", "|", "    ")):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)
