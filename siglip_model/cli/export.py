"""`siglip export`: a model's towers as an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from siglip_model.cli.options import CheckpointOption, JsonOption, errors_in_one_line, load_classifier
from siglip_model.demo import CHECKPOINT, PICTURES


def export(
    out: Annotated[Path, typer.Option(metavar="FILE.onnx", help="Output file.", show_default=False)],
    model: CheckpointOption = str(CHECKPOINT),
    int8: Annotated[bool, typer.Option("--int8", help="Quantise weights and activations to 8 bits.")] = False,
    text: Annotated[bool, typer.Option("--text", help="The text tower alone.")] = False,
    vision: Annotated[bool, typer.Option("--vision", help="The vision tower alone.")] = False,
    both: Annotated[bool, typer.Option("--both", help="Both towers, as by default.")] = False,
    least_cosine: Annotated[
        float,
        typer.Option(
            "--least-cosine",
            metavar="NUMBER",
            min=-1,
            max=1,
            help="Write nothing where an embedding's cosine to the model's is lower.",
        ),
    ] = 0.999,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export a model to ONNX, for `--model FILE.onnx` of classify, demo, embed and search and for ONNX Runtime.

    Its embeddings of the demo's images and their names are compared with the model's. Needs
    pip install 'siglip-triton[onnx]'.
    """
    with errors_in_one_line():
        chosen = [name for name, given in (("text", text), ("vision", vision), ("both", both)) if given]
        if len(chosen) > 1:
            raise ValueError(f"--{' and --'.join(chosen)} are given; give one of them")
        if model.endswith(".onnx"):
            raise ValueError(f"--model is {model}, which is exported already; supported: a checkpoint")

        from siglip_model.demo.classify import image_name
        from siglip_model.onnx.exporting import TOWERS
        from siglip_model.onnx.exporting import export as write

        classifier = load_classifier(model, "sdpa", "float32", "cpu")
        images = [str(path) for path in sorted(PICTURES.glob("*.png"))]
        exported = write(
            classifier.model,
            classifier.tokenizer,
            classifier.image_processor,
            out,
            images=images,
            texts=[image_name(image) for image in images],
            towers=TOWERS if chosen in ([], ["both"]) else chosen,
            int8=int8,
            least_cosine=least_cosine,
            overwrite=overwrite,
        )
        if as_json:
            print(json.dumps({"file": str(out), "bytes": exported.size, "least_cosine": exported.cosines}, indent=2))
            return
        print(f"{out}: {exported.size / 1e6:.1f} MB with its weights, {out.name}.data")
        for tower, cosine in exported.cosines.items():
            print(f"{tower} tower: least cosine to the model's embeddings {cosine:.6f}")
