"""Judges the backend triton_fp8 on the design that the demo checkpoint was not trained on: fp8 and bf16 beside fp32.

TRITON_INTERPRET=1 python -m siglip_model.demo.recipe.fp8 [CHECKPOINT] --emoji FOLDER --jobs 8    # without a GPU
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor

from siglip_kernels.fp8 import LEAST_COSINE
from siglip_model.demo import CHECKPOINT
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
from siglip_model.demo.recipe.evaluate import CANDIDATES, PIXELS, Score, embeddings, score_logits
from siglip_model.fp8 import BACKEND

MEAN_COSINE = 0.999
TEN_WAY_LOSS = 0.005  # of the score
CHUNK = 64  # images, and names, per task of a process

Embedded = tuple[Tensor, Tensor, Tensor]
"""Texts (names, width) and images (images, width), of unit length, and the model's logits (images, names); fp32."""


@dataclass(frozen=True)
class Comparison:
    """One precision beside fp32. cosines: of (texts, images) to those of fp32.

    same_first: the share of images whose most likely name is that of fp32. same_five: the share of fp32's five most
    likely names, the mean over the images, that are among the five most likely here.
    """

    score: Score
    fp32_score: Score
    cosines: tuple[Tensor, Tensor]
    same_first: float
    same_five: float

    def __str__(self) -> str:
        means = [
            f"{kind} cosine {cosine.mean():.5f} in the mean, {cosine.min():.5f} at worst"
            for kind, cosine in zip(("text", "image"), self.cosines, strict=True)
        ]
        agreement = f"top-1 agrees with fp32 for {self.same_first:.1%} of the images, top-5 for {self.same_five:.1%}"
        return "; ".join([str(self.score), *means, agreement])

    def problems(self) -> list[str]:
        """What is beyond the limits of fp8."""
        found = []
        for kind, cosine in zip(("text", "image"), self.cosines, strict=True):
            for name, value, least in (("mean", cosine.mean(), MEAN_COSINE), ("least", cosine.min(), LEAST_COSINE)):
                if not value >= least:
                    found.append(f"the {name} {kind} cosine is {value:.5f}; at least {least} is required")
        loss = self.fp32_score.ten_way - self.score.ten_way
        if loss > TEN_WAY_LOSS:
            found.append(f"ten-way accuracy is {100 * loss:.2f} points below fp32's; {100 * TEN_WAY_LOSS} are allowed")
        return found


def compare(found: Embedded, exact: Embedded, right: Tensor, seed: int = 0) -> Comparison:
    """right: int64 (images,), the index of each image's name. exact: of fp32."""
    cosines = [F.cosine_similarity(one, other) for one, other in zip(found[:2], exact[:2], strict=True)]
    few = min(5, exact[2].shape[1])
    first, wanted = (logits.topk(few).indices for logits in (found[2], exact[2]))  # [images, few]
    shared = (first[:, :, None] == wanted[:, None, :]).any(1).float().mean()
    same = (first[:, 0] == wanted[:, 0]).float().mean()
    scores = [score_logits(logits, right, seed) for logits in (found[2], exact[2])]
    return Comparison(scores[0], scores[1], (cosines[0], cosines[1]), float(same), float(shared))


def embed(
    checkpoint: Path,
    images: Sequence[Image.Image],
    names: Sequence[str],
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    jobs: int = 1,
) -> Embedded:
    """names: as spoken, as many as images. jobs: processes that share the work."""
    chunks = [(images[start : start + CHUNK], names[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
    work = partial(_embed, checkpoint, backend, dtype, device)
    parts = []
    for part in _mapped(work, chunks, jobs):
        parts.append([torch.from_numpy(array) for array in part])
        typer.echo(f"{backend} {dtype}: {len(parts)} of {len(chunks)} parts", err=True)
    texts, pictures = (torch.cat(each) for each in zip(*parts, strict=True))
    model = _load(checkpoint, backend, dtype, device)
    with torch.inference_mode():
        logits = model.logits_per_text(*(each.to(model.device, dtype) for each in (texts, pictures))).T
    return texts, pictures, logits.float().cpu()


def _mapped(work: Callable[..., Any], chunks: list[Any], jobs: int) -> Iterator[Any]:
    """work(*chunk) of each, in this process or in `jobs` others."""
    arguments = zip(*chunks, strict=True)
    if jobs == 1:
        yield from map(work, *arguments)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, *arguments)


def _load(checkpoint: Path, backend: str, dtype: torch.dtype, device: str) -> Any:
    from siglip_model import SiglipModel

    return SiglipModel.from_pretrained(checkpoint, backend=backend, dtype=dtype, device_map=device)


def _embed(
    checkpoint: Path,
    backend: str,
    dtype: torch.dtype,
    device: str,
    images: Sequence[Image.Image],
    names: Sequence[str],
) -> list[Any]:
    """Embeddings as fp32 arrays of numpy, which other processes can receive without shared memory."""
    from siglip_model import SiglipProcessor

    processor = SiglipProcessor.from_pretrained(checkpoint)
    found = embeddings(_load(checkpoint, backend, dtype, device), processor, images, names)
    return [each.float().cpu().numpy() for each in found]


def main(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint's folder.")] = CHECKPOINT,
    emoji: Annotated[Path, typer.Option(help="Unpacked emoji packages; missing ones are fetched.")] = Path("emoji"),
    seed: Annotated[int, typer.Option(help="Seed of the random names.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    jobs: Annotated[int, typer.Option(help="Processes that share the work, for the interpreter.", min=1)] = 1,
    sample: Annotated[int, typer.Option(help="Images to draw at random, with their names; 0 for all.", min=0)] = 0,
) -> None:
    """Print scores, cosines to fp32 and agreement with fp32 of bf16 and fp8. Exit with 1 if fp8 exceeds a limit."""
    if 0 < sample < CANDIDATES:
        raise typer.BadParameter(f"{sample}; supported: 0, and from {CANDIDATES} on", param_hint="--sample")
    download(emoji)
    sets = {icons.design.name: icons for icons in (read_design(emoji, each) for each in DESIGNS)}
    names, shown = choose_names(list(sets.values()))
    icons = shown[TEST_DESIGN.name]
    if sample:
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        names = [names[place] for place in order[:sample].tolist()]
    images = [on_white(draw(sets[TEST_DESIGN.name].svg(icons[name]), PIXELS)) for name in names]
    right = torch.arange(len(names))  # this design draws every name
    of = partial(embed, checkpoint, images, [spoken(name) for name in names], device=device)

    exact = of("sdpa", torch.float32)
    print(f"fp32: {score_logits(exact[2], right, seed)}", flush=True)
    print(f"bf16: {compare(of('sdpa', torch.bfloat16), exact, right, seed)}", flush=True)
    fp8 = compare(of(BACKEND, torch.bfloat16, jobs=jobs), exact, right, seed)
    print(f"fp8: {fp8}", flush=True)
    for problem in fp8.problems():
        typer.echo(f"fp8: {problem}", err=True)
    raise typer.Exit(1 if fp8.problems() else 0)


if __name__ == "__main__":
    typer.run(main)
