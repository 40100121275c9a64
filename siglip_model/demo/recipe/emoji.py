"""Emoji as image-name pairs: the designs, the names, and how the images are drawn.

The designs are npm packages of SVGs in the Iconify JSON format; the name of an image is its icon's id. Two designs are
not trained on: Twemoji is the test set, OpenMoji the validation set.
"""

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Design:
    """One set of emoji: the npm package @iconify-json/`name`, pinned to `version`."""

    name: str
    version: str
    licence: str
    author: str
    source: str

    @property
    def package(self) -> str:
        return f"@iconify-json/{self.name}"


TRAINING_DESIGNS = (
    Design("noto", "1.2.9", "Apache-2.0", "Google Inc", "https://github.com/googlefonts/noto-emoji"),
    Design("noto-v1", "1.2.5", "Apache-2.0", "Google Inc", "https://github.com/googlefonts/noto-emoji"),
    Design("fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    Design("fluent-emoji", "1.2.7", "MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    Design("emojione", "1.2.3", "CC-BY-4.0", "Emoji One", "https://github.com/EmojiTwo/emojitwo"),
)
VALIDATION_DESIGN = Design("openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji", "https://github.com/hfg-gmuend/openmoji")
TEST_DESIGN = Design("twemoji", "1.2.5", "CC-BY-4.0", "Twitter", "https://github.com/jdecked/twemoji")
DESIGNS = (*TRAINING_DESIGNS, VALIDATION_DESIGN, TEST_DESIGN)

MINIMUM_TRAINING_DESIGNS = 2  # a name that fewer designs draw is left out of training and test

_SKIN_TONE = re.compile(r"skin-tone|tone\d|(^|-)(light|medium|dark)(-(light|medium|dark))*$")
_COUNTRY_FLAG = re.compile(r"^flag-")


@dataclass
class IconSet:
    """The content of an unpacked package: the SVG of every icon, and the synonyms of its ids."""

    design: Design
    icons: dict[str, dict[str, Any]]  # id -> body and, where it differs from the set's, size
    synonyms: dict[str, str]  # other id -> id
    code_points: dict[str, str]  # Unicode sequence -> id
    size: tuple[int, int]
    identifier_at: dict[str, str] = field(init=False)  # id -> Unicode sequence

    def __post_init__(self) -> None:
        self.identifier_at = {name: sequence for sequence, name in self.code_points.items()}

    def svg(self, name: str) -> str:
        icon = self.icons[name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = icon.get("width", self.size[0]), icon.get("height", self.size[1])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )


def download(folder: Path, designs: Iterable[Design] = DESIGNS) -> None:
    """Fetches missing packages with `npm pack` and unpacks their JSON files to folder/NAME-VERSION/.

    Raises RuntimeError if npm is missing or fails.
    """
    npm = shutil.which("npm")
    for design in designs:
        if _find_package(folder, design) is not None:
            continue
        if npm is None:
            raise RuntimeError(
                f"{design.package}@{design.version} is not in {folder}, and npm is not installed to fetch it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", "--silent", f"{design.package}@{design.version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"`{' '.join(command[1:])}` failed: {done.stderr.strip()}")
        archive = folder / done.stdout.split()[-1]
        target = folder / f"{design.name}-{design.version}"
        target.mkdir(exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    (target / Path(member.name).name).write_bytes(content.read())
        archive.unlink()


def _find_package(folder: Path, design: Design) -> Path | None:
    """The directory below `folder`, of any name, that holds this design in this version."""
    for manifest in sorted([*folder.glob("*/package.json"), *folder.glob("*/package/package.json")]):
        content = json.loads(manifest.read_text())
        if content.get("name") == design.package and content.get("version") == design.version:
            return manifest.parent
    return None


def read_design(folder: Path, design: Design) -> IconSet:
    """Reads an unpacked package. Raises FileNotFoundError if `folder` does not hold exactly this version."""
    package = _find_package(folder, design)
    if package is None:
        raise FileNotFoundError(f"{folder} holds no unpacked {design.package} in version {design.version}")
    content = json.loads((package / "icons.json").read_text())
    visible = {name: icon for name, icon in content["icons"].items() if not icon.get("hidden")}
    # An alias that flips or rotates its parent is a different image, not a synonym.
    synonyms = {name: alias["parent"] for name, alias in content.get("aliases", {}).items() if set(alias) == {"parent"}}
    characters = json.loads((package / "chars.json").read_text())
    code_points = {key.replace("-fe0f", ""): name for key, name in characters.items() if name in visible}
    return IconSet(design, visible, synonyms, code_points, (content.get("width", 16), content.get("height", 16)))


class _Groups:
    """Disjoint sets of synonymous ids (union-find)."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        while (above := self.parent.setdefault(name, name)) != name:
            name = above
        return name

    def join(self, one: str, other: str) -> None:
        self.parent[self.find(one)] = self.find(other)


def choose_names(sets: list[IconSet]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The names, and for each design the icon that shows each name: {design: {name: icon id}}.

    A name is an id of the test design, without skin tones and country flags, that at least two training designs draw.
    Designs spell some ids differently. An icon belongs to a name if the ids are equal, else if both stand for the same
    Unicode sequence, else if the packages' alias tables connect the two ids and no third meaning.
    """
    test = next(icons for icons in sets if icons.design == TEST_DESIGN)
    wanted = sorted(name for name in test.icons if not _SKIN_TONE.search(name) and not _COUNTRY_FLAG.match(name))
    groups = _Groups()
    for icons in sets:
        for alias, name in icons.synonyms.items():
            groups.join(alias, name)
    meanings: dict[str, int] = {}
    for name in wanted:
        meanings[groups.find(name)] = meanings.get(groups.find(name), 0) + 1

    shown: dict[str, dict[str, str]] = {}
    for icons in sets:
        members: dict[str, list[str]] = {}
        for icon in icons.icons:
            members.setdefault(groups.find(icon), []).append(icon)
        pictures = shown[icons.design.name] = {}
        for name in wanted:
            group = groups.find(name)
            same_sequence = icons.code_points.get(test.identifier_at.get(name, ""))
            if name in icons.icons:
                pictures[name] = name
            elif same_sequence is not None:
                pictures[name] = same_sequence
            elif meanings[group] == 1 and len(members.get(group, [])) == 1:
                pictures[name] = members[group][0]
    drawn = {name: sum(name in shown[design.name] for design in TRAINING_DESIGNS) for name in wanted}
    names = [name for name in wanted if drawn[name] >= MINIMUM_TRAINING_DESIGNS]
    return names, {design: {n: icon for n, icon in icons.items() if n in set(names)} for design, icons in shown.items()}


def spoken(name: str) -> str:
    """The words of an icon's id: "alarm-clock" -> "alarm clock"."""
    return name.replace("-", " ")


def draw(svg: str, pixels: int) -> Image.Image:
    """Renders an SVG into a square RGBA image of `pixels` x `pixels`."""
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise RuntimeError("drawing emoji needs resvg-py: pip install 'siglip-triton[recipe]'") from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size == (pixels, pixels):
        return image
    square = Image.new("RGBA", (pixels, pixels))  # keeps the aspect ratio
    image.thumbnail((pixels, pixels))
    square.paste(image, ((pixels - image.width) // 2, (pixels - image.height) // 2))
    return square


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA image composited over white, as RGB."""
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _draw_array(svg: str, pixels: int) -> np.ndarray:
    return np.asarray(draw(svg, pixels))


@dataclass
class Emoji:
    """All images, grouped by design; `name_of[design][i]` is the index of the name of image i."""

    names: list[str]  # as spoken
    pictures: dict[str, Tensor]  # uint8 (n, 4, pixels, pixels), RGBA
    name_of: dict[str, Tensor]  # int64 (n,)


def load_emoji(folder: Path, pixels: int, cache: Path | None = None, workers: int = 2) -> Emoji:
    """Reads the packages in `folder` and draws every chosen icon. cache: a file that stores the drawings."""
    sets = [read_design(folder, design) for design in DESIGNS]
    names, shown = choose_names(sets)
    index = {name: i for i, name in enumerate(names)}
    name_of = {design: torch.tensor([index[name] for name in icons]) for design, icons in shown.items()}
    if cache is not None and cache.exists():
        pictures = load_file(cache)
        expected = {design: (len(ids), 4, pixels, pixels) for design, ids in name_of.items()}
        if {design: tuple(array.shape) for design, array in pictures.items()} != expected:
            raise ValueError(f"{cache} does not match these packages; delete it")
        return Emoji([spoken(name) for name in names], pictures, name_of)
    pictures = {}
    with ProcessPoolExecutor(workers) as pool:
        for icons in sets:
            svgs = [icons.svg(icon) for icon in shown[icons.design.name].values()]
            drawn = list(pool.map(partial(_draw_array, pixels=pixels), svgs, chunksize=32))
            pictures[icons.design.name] = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file(pictures, cache)
    return Emoji([spoken(name) for name in names], pictures, name_of)
