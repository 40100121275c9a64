"""Draws the images that ship with the package: python -m siglip_model.demo.recipe.bundle --emoji FOLDER

They were selected by name, for variety, before any checkpoint was measured.
"""

from pathlib import Path
from typing import Annotated

import typer

from siglip_model.demo import PICTURES
from siglip_model.demo.recipe.emoji import TEST_DESIGN, download, draw, on_white, read_design

NAMES = ("alarm-clock", "bicycle", "cat-face", "guitar", "hamburger", "octopus", "rocket", "sunflower")
PIXELS = 256

_NOTICE = f"""# Images of the demo

Drawn from {TEST_DESIGN.package} {TEST_DESIGN.version}, on white, at {PIXELS} pixels; otherwise unchanged.
Twemoji ({TEST_DESIGN.source}): graphics copyright Twitter, Inc and other contributors, licensed under
CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/).

The demo checkpoint was not trained on this design. The images were selected by name, for variety, before any checkpoint
was measured.
"""


def main(
    emoji: Annotated[Path, typer.Option(help="Unpacked emoji packages; missing ones are fetched.")] = Path("emoji"),
    out: Annotated[Path, typer.Option(help="Output folder.")] = PICTURES,
) -> None:
    """Draw the images and write their notice."""
    download(emoji, [TEST_DESIGN])
    icons = read_design(emoji, TEST_DESIGN)
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        picture = on_white(draw(icons.svg(name), PIXELS))
        picture.quantize(128).save(out / f"{name}.png", optimize=True)
    (out / "README.md").write_text(_NOTICE)


if __name__ == "__main__":
    typer.run(main)
