"""SigLIP's models and the shapes that they give each operation, with their FLOPs and bytes.

FLOPs are those of the mathematics (a multiplication and an addition are two), not of an implementation: padding,
recomputation and unfused passes do not count. Bytes are the least that must cross memory: every input read once and
every output written once, no intermediates. Both are for one direction: "fwd", "bwd" or "fwd+bwd".
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from dataclasses import dataclass
from typing import Any, Self

DIRECTIONS = ("fwd", "bwd", "fwd+bwd")


@dataclass(frozen=True)
class Tower:
    """One transformer of a SigLIP model."""

    width: int
    hidden: int  # of the MLP
    layers: int
    heads: int
    tokens: int
    patch: int = 0  # pixels of a patch's side; 0 for the text tower
    image: int = 0  # pixels of an image's side

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def flops(self) -> int:
        """FLOPs of one sample's forward: layers and patches; the folded pooling head is negligible."""
        per_token = 8 * self.width**2 + 4 * self.width * self.hidden
        attention = 4 * self.tokens**2 * self.width
        patches = 2 * self.tokens * self.width * 3 * self.patch**2
        return self.layers * (self.tokens * per_token + attention) + patches

    def parameters(self) -> int:
        """Weights of the layers, which any forward has to read."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.hidden)


@dataclass(frozen=True)
class Model:
    """A published SigLIP: google/siglip-<name>, SigLIP 2 at native resolution, or the demo checkpoint."""

    name: str
    vision: Tower
    text: Tower


def _model(name: str, width: int, hidden: int, layers: int, heads: int, patch: int, image: int) -> Model:
    tokens = (image // patch) ** 2
    vision = Tower(width, hidden, layers, heads, tokens, patch, image)
    return Model(name, vision, Tower(width, hidden, layers, heads, 64))


MODELS = {
    short: _model(name, *sizes)
    for short, name, *sizes in (
        ("base-224", "base-patch16-224", 768, 3072, 12, 12, 16, 224),
        ("base-naflex", "base-patch16-naflex", 768, 3072, 12, 12, 16, 256),  # images of up to 16 x 16 patches
        ("base-512", "base-patch16-512", 768, 3072, 12, 12, 16, 512),
        ("large-384", "large-patch16-384", 1024, 4096, 24, 16, 16, 384),
        ("so400m-224", "so400m-patch14-224", 1152, 4304, 27, 16, 14, 224),
        ("so400m-384", "so400m-patch14-384", 1152, 4304, 27, 16, 14, 384),
    )
}

DEMO = "demo"  # this project's small checkpoint
MODELS[DEMO] = Model(DEMO, Tower(160, 640, 4, 5, 16, 16, 64), Tower(160, 480, 2, 5, 64))


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. `name` is what `--shapes` takes."""

    name: str

    def sizes(self) -> dict[str, Any]:
        """Every field, for the rows of results."""
        return dataclasses.asdict(self)

    def sample(self) -> Self:
        """The same call on a number of samples that fp64 can afford."""
        raise NotImplementedError

    def flops(self, direction: str) -> int:
        forward = self._forward_flops()
        return {"fwd": forward, "bwd": self._backward_flops(), "fwd+bwd": forward + self._backward_flops()}[direction]

    def bytes(self, direction: str, element: int) -> int:
        """element: bytes per value."""
        forward, backward = self._forward_values(), self._backward_values()
        return element * {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[direction]

    def _forward_flops(self) -> int:
        raise NotImplementedError

    def _backward_flops(self) -> int:
        return 2 * self._forward_flops()

    def _forward_values(self) -> int:
        raise NotImplementedError

    def _backward_values(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionShape(Shape):
    batch: int
    tokens: int
    heads: int
    head_dim: int
    peaked: int = 0  # per cent of the queries that give more than half of their weight to one key

    def __post_init__(self) -> None:
        if not 0 <= self.peaked <= 100:
            raise ValueError(f"shape {self.name!r}: peaked is {self.peaked}; supported: 0 to 100")

    def sample(self) -> Self:
        return dataclasses.replace(self, batch=min(self.batch, 2))

    def _product(self) -> int:
        return 2 * self.batch * self.heads * self.tokens**2 * self.head_dim

    def _forward_flops(self) -> int:
        return 2 * self._product()  # q kᵀ and p v

    def _backward_flops(self) -> int:
        return 5 * self._product()  # the scores again, and dv, dp, dq, dk

    def _values(self) -> int:
        return self.batch * self.tokens * self.heads * self.head_dim

    def _forward_values(self) -> int:
        return 4 * self._values()

    def _backward_values(self) -> int:
        return 8 * self._values()


@dataclass(frozen=True)
class SequencesShape(Shape):
    """Attention of sequences of different lengths: each of a quarter of `longest` tokens to all of them.

    They are packed one after the other, or padded to the longest. Padding does not count.
    """

    sequences: int
    longest: int
    heads: int
    head_dim: int

    def lengths(self) -> list[int]:
        draw = random.Random(0)
        others = (draw.randint(max(1, self.longest // 4), self.longest) for _ in range(self.sequences - 1))
        return [self.longest, *others]

    def sample(self) -> Self:
        return dataclasses.replace(self, sequences=min(self.sequences, 3))

    def _each(self) -> list[AttentionShape]:
        return [AttentionShape("", 1, length, self.heads, self.head_dim) for length in self.lengths()]

    def _forward_flops(self) -> int:
        return sum(one.flops("fwd") for one in self._each())

    def _backward_flops(self) -> int:
        return sum(one.flops("bwd") for one in self._each())

    def _forward_values(self) -> int:
        return sum(one.bytes("fwd", 1) for one in self._each())

    def _backward_values(self) -> int:
        return sum(one.bytes("bwd", 1) for one in self._each())


@dataclass(frozen=True)
class PreNormAttentionShape(Shape):
    """LayerNorm, the projections of q, k and v, attention, the output projection and the residual."""

    batch: int
    tokens: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def sample(self) -> Self:
        return dataclasses.replace(self, batch=min(self.batch, 2))

    def _attention(self) -> AttentionShape:
        return AttentionShape("", self.batch, self.tokens, self.heads, self.head_dim)

    def _projections(self) -> int:
        return 8 * self.batch * self.tokens * self.width**2

    def _values(self) -> int:
        return self.batch * self.tokens * self.width

    def _forward_flops(self) -> int:
        return self._projections() + self._attention().flops("fwd")

    def _backward_flops(self) -> int:
        return 2 * self._projections() + self._attention().flops("bwd")

    def _forward_values(self) -> int:
        return 2 * self._values() + 4 * self.width**2

    def _backward_values(self) -> int:
        return 3 * self._values() + 8 * self.width**2


@dataclass(frozen=True)
class LinearShape(Shape):
    rows: int
    inputs: int
    outputs: int
    residual: bool = False

    def sample(self) -> Self:
        return dataclasses.replace(self, rows=min(self.rows, 1024))

    def _forward_flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs

    def _forward_values(self) -> int:
        return self.rows * (self.inputs + (2 if self.residual else 1) * self.outputs) + self.inputs * self.outputs

    def _backward_values(self) -> int:
        return self.rows * (2 * self.inputs + self.outputs) + 2 * self.inputs * self.outputs


@dataclass(frozen=True)
class QKVShape(Shape):
    """LayerNorm and the three projections."""

    rows: int
    width: int
    heads: int

    def sample(self) -> Self:
        return dataclasses.replace(self, rows=min(self.rows, 1024))

    def _forward_flops(self) -> int:
        return 6 * self.rows * self.width**2

    def _forward_values(self) -> int:
        return 4 * self.rows * self.width + 3 * self.width**2

    def _backward_values(self) -> int:
        return 5 * self.rows * self.width + 6 * self.width**2


@dataclass(frozen=True)
class MLPShape(Shape):
    rows: int
    width: int
    hidden: int

    def sample(self) -> Self:
        return dataclasses.replace(self, rows=min(self.rows, 1024))

    def _forward_flops(self) -> int:
        return 4 * self.rows * self.width * self.hidden

    def _forward_values(self) -> int:
        return 3 * self.rows * self.width + 2 * self.width * self.hidden  # x, residual and result

    def _backward_values(self) -> int:
        return 3 * self.rows * self.width + 4 * self.width * self.hidden


@dataclass(frozen=True)
class NormShape(Shape):
    rows: int
    width: int

    def sample(self) -> Self:
        return dataclasses.replace(self, rows=min(self.rows, 4096))

    def _forward_flops(self) -> int:
        return 8 * self.rows * self.width  # irrelevant: LayerNorm is bound by memory

    def _forward_values(self) -> int:
        return 2 * self.rows * self.width

    def _backward_values(self) -> int:
        return 3 * self.rows * self.width


@dataclass(frozen=True)
class PoolShape(Shape):
    """The pooling head's attention, folded: keys and values are not formed."""

    batch: int
    tokens: int
    width: int
    heads: int

    def sample(self) -> Self:
        return dataclasses.replace(self, batch=min(self.batch, 4))

    def _forward_flops(self) -> int:
        return 4 * self.batch * self.tokens * self.width * self.heads + 4 * self.batch * self.width**2

    def _forward_values(self) -> int:
        return self.batch * (self.tokens + 1) * self.width + 4 * self.width**2

    def _backward_values(self) -> int:
        return self.batch * (2 * self.tokens + 1) * self.width + 8 * self.width**2


@dataclass(frozen=True)
class PatchShape(Shape):
    batch: int
    image: int
    patch: int
    width: int

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2

    def sample(self) -> Self:
        return dataclasses.replace(self, batch=min(self.batch, 4))

    def _weights(self) -> int:
        return 3 * self.patch**2 * self.width

    def _forward_flops(self) -> int:
        return 2 * self.batch * self.tokens * self._weights()

    def _backward_flops(self) -> int:
        return self._forward_flops()  # pixels need no gradient

    def _pixels(self) -> int:
        return 3 * self.batch * self.image**2

    def _forward_values(self) -> int:
        return self._pixels() + self._weights() + (self.batch + 1) * self.tokens * self.width

    def _backward_values(self) -> int:
        return self._forward_values()


@dataclass(frozen=True)
class ResizeShape(Shape):
    """Images of `height` x `width` to `side` x `side`, bicubic."""

    batch: int
    height: int
    width: int
    side: int

    def sample(self) -> Self:
        return dataclasses.replace(self, batch=min(self.batch, 2))

    def _forward_flops(self) -> int:
        return 2 * 3 * self.batch * 4 * (self.height * self.side + self.side**2)  # irrelevant: it is bound by memory

    def bytes(self, direction: str, element: int) -> int:
        return 3 * self.batch * (self.height * self.width + element * self.side**2)  # levels are bytes


@dataclass(frozen=True)
class LossShape(Shape):
    """Pairs of one image and one text or, if `captions` is not 0, images with that many texts, found by group ids.

    weighted: whether images, texts and positives have weights. negatives: further texts, which belong to no image.
    """

    pairs: int
    width: int
    captions: int = 0
    weighted: bool = False
    negatives: int = 0

    @property
    def texts(self) -> int:
        return self.pairs * max(1, self.captions) + self.negatives

    @property
    def prefixes(self) -> list[int]:
        """The widths of a matryoshka loss: 64, 128, 256, … and the whole."""
        return [
            *itertools.takewhile(lambda width: width < self.width, (64 << n for n in itertools.count())),
            self.width,
        ]

    def sample(self) -> Self:
        return dataclasses.replace(self, pairs=min(self.pairs, 2048), negatives=min(self.negatives, 2048))

    def _forward_flops(self) -> int:
        return 2 * self.pairs * self.texts * self.width

    def _backward_flops(self) -> int:
        return 4 * self.pairs * self.texts * self.width

    def _forward_values(self) -> int:
        return (self.pairs + self.texts) * self.width

    def _backward_values(self) -> int:
        return 2 * (self.pairs + self.texts) * self.width


@dataclass(frozen=True)
class ModelShape(Shape):
    """A model of MODELS with `layers` layers per tower; 0 for all of its layers."""

    model: str
    batch: int
    layers: int = 0
    text: bool = False  # both towers, and as many texts as images

    def towers(self) -> list[Tower]:
        model = MODELS[self.model]
        towers = [model.vision, model.text] if self.text else [model.vision]
        return [dataclasses.replace(tower, layers=self.layers or tower.layers) for tower in towers]

    def sample(self) -> Self:
        return dataclasses.replace(self, batch=min(self.batch, 2))

    def _forward_flops(self) -> int:
        return sum(self.batch * tower.flops() for tower in self.towers())

    def _forward_values(self) -> int:
        return sum(tower.parameters() + 3 * self.batch * tower.image**2 for tower in self.towers())

    def _backward_values(self) -> int:
        return sum(2 * tower.parameters() for tower in self.towers())


@dataclass(frozen=True)
class TextShape(ModelShape):
    """The text tower alone, for `batch` texts."""

    def towers(self) -> list[Tower]:
        tower = MODELS[self.model].text
        return [dataclasses.replace(tower, layers=self.layers or tower.layers)]


@dataclass(frozen=True)
class NaFlexShape(ModelShape):
    """The vision tower of SigLIP 2 at native resolution, for images of different sizes.

    Both sides of each are drawn from a quarter of the model's grid to all of it, so that patches fill about 39 % of a
    batch that is padded to the model's number. Padding does not count.
    """

    def grids(self) -> list[tuple[int, int]]:
        """Height and width of each image in patches."""
        tower = MODELS[self.model].vision
        side = tower.image // tower.patch
        draw = random.Random(0)
        return [(draw.randint(side // 4, side), draw.randint(side // 4, side)) for _ in range(self.batch)]

    def _forward_flops(self) -> int:
        (tower,) = self.towers()
        return sum(dataclasses.replace(tower, tokens=height * width).flops() for height, width in self.grids())

    def _forward_values(self) -> int:
        (tower,) = self.towers()
        return tower.parameters() + sum(height * width for height, width in self.grids()) * 3 * tower.patch**2


@dataclass(frozen=True)
class EmbedShape(Shape):
    """JPEG files of `width` x `height` pixels, read by `workers` threads or processes. FLOPs are the tower's alone."""

    model: str
    images: int
    batch: int
    workers: int = 2
    width: int = 768
    height: int = 512

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 16:
            raise ValueError(f"shape {self.name!r}: width x height is {self.width}x{self.height}; supported: from 16")

    def sample(self) -> Self:
        return dataclasses.replace(self, images=min(self.images, 2))

    def _forward_flops(self) -> int:
        return self.images * MODELS[self.model].vision.flops()

    def _forward_values(self) -> int:
        return MODELS[self.model].vision.parameters()

    def _backward_values(self) -> int:
        return 0  # there is no backward


@dataclass(frozen=True)
class TrainShape(ModelShape):
    """Both towers and the loss."""

    text: bool = True

    def _loss(self) -> LossShape:
        return LossShape("", self.batch, MODELS[self.model].vision.width)

    def _forward_flops(self) -> int:
        return super()._forward_flops() + self._loss().flops("fwd")

    def _backward_flops(self) -> int:
        return 2 * super()._forward_flops() + self._loss().flops("bwd")


def parse(shape_class: type[Shape], text: str) -> Shape:
    """`batch=8,tokens=729,heads=16,head_dim=72` as a shape. ValueError names the fields."""
    fields = {field.name: field for field in dataclasses.fields(shape_class) if field.name != "name"}
    supported = ",".join(f"{name}=…" for name in fields)
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in fields or name in values:
            raise ValueError(f"shape {text!r}: {name!r}; supported: {supported}")
        try:
            values[name] = value if name == "model" else int(value)
        except ValueError:
            raise ValueError(f"shape {text!r}: {name} is {value!r}; supported: an integer") from None
        if name == "model" and value not in MODELS:
            raise ValueError(f"shape {text!r}: model is {value!r}; supported: {', '.join(MODELS)}")
        if name != "model" and values[name] < (
            name not in ("residual", "layers", "text", "peaked", "captions", "weighted", "negatives")
        ):
            raise ValueError(f"shape {text!r}: {name} is {value}; supported: 1 and more")
    missing = [name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"shape {text!r} lacks {', '.join(missing)}; supported: {supported}")
    flags = {name: bool(value) for name, value in values.items() if fields[name].type == "bool"}
    return shape_class(name=text, **{**values, **flags})
