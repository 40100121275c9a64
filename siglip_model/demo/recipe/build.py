"""Rebuilds the demo checkpoint: python -m siglip_model.demo.recipe.build --emoji FOLDER --out FOLDER

Fetches and draws the emoji, trains tokenizer and model, measures on the test design and writes the model card.
The same command resumes an interrupted run.
"""

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from siglip_model.demo.recipe.augmentation import augment
from siglip_model.demo.recipe.emoji import TEST_DESIGN, TRAINING_DESIGNS, VALIDATION_DESIGN, Emoji, download, load_emoji
from siglip_model.demo.recipe.evaluate import evaluate, score_logits
from siglip_model.demo.recipe.model_card import write_card
from siglip_model.demo.recipe.vocabulary import LENGTH, PROMPTS, write_image_processor, write_tokenizer
from siglip_model.outputs import pooled, unit_length
from siglip_model.training.batch import Batch, generated
from siglip_model.training.loop import Evaluate, train
from siglip_model.training.objective import initialise_logits
from siglip_model.training.settings import TrainingConfig

if TYPE_CHECKING:
    from siglip_model import SiglipModel

SIZE, PATCH, WIDTH, HEADS = 64, 16, 160, 5
TRAINING = Path(__file__).with_name("training.toml")
DRAWN = 80  # pixels of the drawings: more than SIZE, so that augmentation can zoom in


class EmojiBatches:
    """Batch number -> names drawn without replacement, each with one prompt and images of several designs."""

    def __init__(self, emoji: Emoji, prompts: Tensor, names_per_batch: int, views: int) -> None:
        """prompts: int64 (len(PROMPTS), names, length), the token ids of every name in every prompt."""
        self.prompts, self.names_per_batch, self.views = prompts, names_per_batch, views
        self.prompt_weights = torch.tensor([weight for _, weight in PROMPTS])
        self.pictures = torch.cat([emoji.pictures[design.name] for design in TRAINING_DESIGNS])
        # picture_of[n, d]: index of the image of name n in design d, or -1.
        self.picture_of = torch.full((len(emoji.names), len(TRAINING_DESIGNS)), -1)
        start = 0
        for column, design in enumerate(TRAINING_DESIGNS):
            names = emoji.name_of[design.name]
            self.picture_of[names, column] = torch.arange(start, start + len(names))
            start += len(names)

    def __call__(self, number: int, generator: torch.Generator) -> Batch:
        names = torch.randperm(len(self.picture_of), generator=generator)[: self.names_per_batch]
        prompt = torch.multinomial(self.prompt_weights, len(names), replacement=True, generator=generator)
        pictures = self.picture_of[names]  # [N, designs]
        order = (
            torch.rand(pictures.shape, generator=generator).masked_fill(pictures < 0, -1).argsort(1, descending=True)
        )
        available = (pictures >= 0).sum(1, keepdim=True)
        # Designs in random order; where there are fewer than `views` they repeat, augmented differently.
        columns = order.gather(1, torch.arange(self.views)[None] % available)  # [N, V]
        chosen = pictures.gather(1, columns).T  # [V, N]
        pixels = augment(self.pictures[chosen.flatten()], SIZE, generator).unflatten(0, chosen.shape)
        return Batch(self.prompts[prompt, names], pixels)


def make_model(vocabulary: int, seed: int) -> "SiglipModel":
    """A SigLIP of 2.4 million parameters, initialised by the seed."""
    from siglip_model import SiglipConfig, SiglipModel

    text = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    initialise_logits(model)
    return model


def _validation(emoji: Emoji, prompts: Tensor) -> Evaluate:
    """The score of the averaged weights on the validation design. prompts: int64 (names, length)."""
    pictures = emoji.pictures[VALIDATION_DESIGN.name].float() / 255
    pictures = pictures[:, :3] * pictures[:, 3:] + 1 - pictures[:, 3:]  # on white
    pixels = F.interpolate(pictures, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1

    @torch.no_grad()
    def measure(step: int, averaged: "SiglipModel") -> dict[str, Any]:
        images = [pooled(averaged.get_image_features(part)) for part in pixels.split(256)]
        texts = [pooled(averaged.get_text_features(part)) for part in prompts.split(256)]
        logits = unit_length(torch.cat(images)) @ unit_length(torch.cat(texts)).T
        return vars(score_logits(logits, emoji.name_of[VALIDATION_DESIGN.name]))

    return measure


def training_config(**given: Any) -> TrainingConfig:
    """The recipe's, with the given values that are not None instead of its own."""
    return TrainingConfig(
        **tomllib.loads(TRAINING.read_text()) | {name: value for name, value in given.items() if value is not None}
    )


def main(
    out: Annotated[Path, typer.Option(help="Output folder: the checkpoint and, under training/, the run's state.")],
    emoji: Annotated[Path, typer.Option(help="Unpacked emoji packages; missing ones are fetched.")] = Path("emoji"),
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    names_per_batch: Annotated[int, typer.Option(help="Texts per batch.")] = 128,
    views: Annotated[int, typer.Option(help="Images per text in a batch.")] = 4,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initialisation and batches.")] = None,
    bfloat16: Annotated[
        bool | None, typer.Option(help="Train under bfloat16 autocast; faster where the processor supports it.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between saved states and validations.")] = None,
    stop_after: Annotated[
        int | None, typer.Option(help="Exit after this many steps; the same command resumes.")
    ] = None,
) -> None:
    """Draw, train, measure, write the model card. Without options training is as training.toml says."""
    from siglip_model import SiglipModel, SiglipProcessor, SiglipTokenizer

    config = training_config(
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        bfloat16=bfloat16,
        save_every=save_every,
        evaluate_every=save_every,
    )
    download(emoji)
    work = out / "training"
    data = load_emoji(emoji, DRAWN, work / "drawings.safetensors")
    write_tokenizer(data.names, out)
    write_image_processor(SIZE, out)
    tokenizer = SiglipTokenizer.from_pretrained(out)
    encoded = [
        tokenizer(
            [prompt.format(name) for name in data.names], padding="max_length", max_length=LENGTH, truncation=True
        )["input_ids"]
        for prompt, _ in PROMPTS
    ]
    prompts = torch.tensor(encoded)  # [prompts, names, length]
    model = make_model(len(tokenizer), config.seed)
    parameters = model.num_parameters()
    pictures = sum(len(data.pictures[design.name]) for design in TRAINING_DESIGNS)
    print(f"{len(data.names)} names, {pictures} training images, {parameters:,} parameters")
    model.set_backend("eager")  # the fastest in bfloat16 on a CPU with so few tokens
    batches = generated(EmojiBatches(data, prompts, names_per_batch, views), config.seed)
    trained = train(model, batches, config, work, evaluate=_validation(data, prompts[0]), stop_after=stop_after)
    if trained.steps < config.steps:
        return
    model = trained.model
    model.save_pretrained(out)
    score = evaluate(SiglipModel.from_pretrained(out), SiglipProcessor.from_pretrained(out), emoji)
    score.save(out)
    write_card(
        out,
        score,
        data,
        config,
        parameters=parameters,
        size=SIZE,
        pieces=len(tokenizer),
        texts=names_per_batch,
        views=views,
    )
    print(f"{TEST_DESIGN.name} (not trained on): {score}")
    print(f"The checkpoint is in {out}; {work} can be deleted.")


if __name__ == "__main__":
    typer.run(main)
