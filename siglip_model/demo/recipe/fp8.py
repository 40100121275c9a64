"""Compares the backend triton_fp8 with fp32 on the design that the demo checkpoint was not trained on.

TRITON_INTERPRET=1 python -m siglip_model.demo.recipe.fp8 [CHECKPOINT] --emoji FOLDER    # without a GPU
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

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
from siglip_model.demo.recipe.evaluate import PIXELS, embeddings, score_logits


def main(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint's folder.")] = CHECKPOINT,
    emoji: Annotated[Path, typer.Option(help="Unpacked emoji packages; missing ones are fetched.")] = Path("emoji"),
    seed: Annotated[int, typer.Option(help="Seed of the random names.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
) -> None:
    """Print the scores in fp32, bf16 and fp8, and the cosines of the embeddings to those in fp32."""
    from siglip_model import SiglipModel, SiglipProcessor

    download(emoji)
    sets = {icons.design.name: icons for icons in (read_design(emoji, each) for each in DESIGNS)}
    names, shown = choose_names(list(sets.values()))
    icons = shown[TEST_DESIGN.name]
    images = [on_white(draw(sets[TEST_DESIGN.name].svg(icon), PIXELS)) for icon in icons.values()]
    right = torch.tensor([names.index(name) for name in icons])
    processor = SiglipProcessor.from_pretrained(checkpoint)

    def embed(backend: str, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor]:
        model = SiglipModel.from_pretrained(checkpoint, backend=backend, dtype=dtype, device_map=device)
        return model, *embeddings(model, processor, images, [spoken(name) for name in names])

    _, *exact = embed("sdpa", torch.float32)
    for label, backend, dtype in (
        ("fp32", "sdpa", torch.float32),
        ("bf16", "sdpa", torch.bfloat16),
        ("fp8", "triton_fp8", torch.bfloat16),
    ):
        model, *found = embed(backend, dtype)
        cosines = [F.cosine_similarity(one.float(), other) for one, other in zip(found, exact, strict=True)]
        means = ", ".join(
            f"{kind} cosine {cosine.mean():.5f} in the mean, {cosine.min():.5f} at worst"
            for kind, cosine in zip(("text", "image"), cosines, strict=True)
        )
        logits = model.logits_per_text(*(each.to(model.dtype) for each in found)).T
        print(f"{label}: {score_logits(logits.float().cpu(), right, seed)}; {means}", flush=True)


if __name__ == "__main__":
    typer.run(main)
