"""The shapes of each suite, in order of importance: on a GPU, in a quick run, and on a CPU."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.cases.operations import DTYPES, OPERATIONS, Operation, Setting
from bench.cases.shapes import (
    DIRECTIONS,
    MODELS,
    AttentionShape,
    EmbedShape,
    LinearShape,
    LossShape,
    MLPShape,
    ModelShape,
    NaFlexShape,
    NormShape,
    PatchShape,
    PoolShape,
    PreNormAttentionShape,
    QKVShape,
    ResizeShape,
    SequencesShape,
    Shape,
    TextShape,
    TrainShape,
    parse,
)


@dataclass(frozen=True)
class Case:
    """A shape of an operation, and where it is measured by default.

    quick: in a quick run on a GPU. cpu: in a "quick" or only in a "full" run on a CPU; "" for neither.
    """

    operation: str
    shape: Shape
    quick: bool = False
    cpu: str = ""


@dataclass(frozen=True)
class Suite:
    """What `python -m bench run NAME` measures.

    hide_launches: whether kernels are timed back to back; otherwise a call is timed as its user waits for it.
    quick_peers: the slow peers that a quick run prepares after all other measurements.
    device: the only device where it is measured, "cpu"; "" for any.
    """

    name: str
    cases: tuple[Case, ...]
    hide_launches: bool = True
    quick_peers: tuple[str, ...] = ()
    device: str = ""

    def settings(
        self,
        device: str,
        dtypes: Sequence[str],
        quick: bool,
        patterns: Sequence[str] = (),
        directions: Sequence[str] = (),
    ) -> list[Setting]:
        """The settings, most important first. Named shapes are measured on any machine with the suite's device."""
        if self.device not in ("", device):
            return []
        chosen = self._named(patterns) if patterns else [case for case in self.cases if _usual(case, device, quick)]
        return [
            Setting(operation, case.shape, DTYPES[dtype], device, direction)
            for case in chosen
            for operation in [OPERATIONS[case.operation]]
            for direction in operation.directions + tuple(d for d in directions if d not in operation.directions)
            if (not directions or direction in directions) and direction in _possible(operation)
            for dtype in dtypes
        ]

    def shape_names(self) -> list[str]:
        return list(dict.fromkeys(case.shape.name for case in self.cases))

    def _named(self, patterns: Sequence[str]) -> list[Case]:
        """Cases whose shape has a name, matches a pattern such as so400m-384*, or is given as field=value,…"""
        found = []
        for pattern in patterns:
            if "=" in pattern:
                for name in dict.fromkeys(case.operation for case in self.cases):
                    with contextlib.suppress(ValueError):  # the sizes belong to another operation of the suite
                        found.append(Case(name, parse(OPERATIONS[name].shape_class, pattern)))
            else:
                found += [case for case in self.cases if fnmatch.fnmatchcase(case.shape.name, pattern)]
        return found


def _usual(case: Case, device: str, quick: bool) -> bool:
    if device == "cpu":
        return case.cpu == "quick" or (case.cpu == "full" and not quick)
    return case.quick or not quick


def _possible(operation: Operation) -> tuple[str, ...]:
    """A loss may compute its gradients in the forward."""
    if not operation.trains:
        return ("fwd",)
    return ("fwd", "fwd+bwd") if operation.shape_class in (LossShape, TrainShape) else DIRECTIONS


def _attention(model: str, batch: int, text: bool = False, peaked: int = 0, quick: bool = False, cpu: str = "") -> Case:
    tower = MODELS[model].text if text else MODELS[model].vision
    name = f"{model}{'-text' if text else ''}{'-peaked' if peaked else ''}-b{batch}"
    return Case("attention", AttentionShape(name, batch, tower.tokens, tower.heads, tower.head_dim, peaked), quick, cpu)


def _sequences(operation: str, model: str, batch: int, quick: bool = False) -> Case:
    tower = MODELS[model].vision
    name = f"{model}-{operation.partition('_')[0]}-b{batch}"
    return Case(operation, SequencesShape(name, batch, tower.tokens, tower.heads, tower.head_dim), quick)


def _rows(model: str, batch: int) -> int:
    return batch * MODELS[model].vision.tokens


def _linear(model: str, batch: int, part: str, quick: bool = False) -> Case:
    tower = MODELS[model].vision
    inputs, outputs, residual = {
        "fc1": (tower.width, tower.hidden, False),
        "fc2": (tower.hidden, tower.width, True),
        "out": (tower.width, tower.width, True),
        "qkv": (tower.width, 3 * tower.width, False),
    }[part]
    shape = LinearShape(f"{model}-{part}-b{batch}", _rows(model, batch), inputs, outputs, residual)
    return Case("linear", shape, quick)


def _qkv(model: str, batch: int, quick: bool = False, operation: str = "pre_norm_qkv") -> Case:
    tower = MODELS[model].vision
    shape = QKVShape(f"{model}-b{batch}", _rows(model, batch), tower.width, tower.heads)
    return Case(operation, shape, quick)


def _pre_norm_attention(model: str, batch: int, quick: bool = False, operation: str = "pre_norm_attention") -> Case:
    tower = MODELS[model].vision
    shape = PreNormAttentionShape(f"{model}-b{batch}", batch, tower.tokens, tower.heads, tower.head_dim)
    return Case(operation, shape, quick)


def _mlp(operation: str, model: str, batch: int, quick: bool = False) -> Case:
    tower = MODELS[model].vision
    return Case(operation, MLPShape(f"{model}-b{batch}", _rows(model, batch), tower.width, tower.hidden), quick)


def _norm(model: str, batch: int, quick: bool = False) -> Case:
    shape = NormShape(f"{model}-b{batch}", _rows(model, batch), MODELS[model].vision.width)
    return Case("layer_norm", shape, quick)


def _pool(model: str, batch: int, quick: bool = False, cpu: str = "") -> Case:
    tower = MODELS[model].vision
    shape = PoolShape(f"{model}-b{batch}", batch, tower.tokens, tower.width, tower.heads)
    return Case("attention_pool", shape, quick, cpu)


def _patch(model: str, batch: int, quick: bool = False) -> Case:
    tower = MODELS[model].vision
    return Case("patch_embed", PatchShape(f"{model}-b{batch}", batch, tower.image, tower.patch, tower.width), quick)


def _resize(batch: int, height: int, width: int, side: int, quick: bool = False) -> Case:
    shape = ResizeShape(f"{height}x{width}-to-{side}-b{batch}", batch, height, width, side)
    return Case("resize_normalize", shape, quick)


def _loss(
    pairs: int,
    width: int,
    captions: int = 0,
    weighted: bool = False,
    negatives: int = 0,
    operation: str = "sigmoid_loss",
    quick: bool = False,
    cpu: str = "",
) -> Case:
    count = f"n{pairs}{f'x{captions}' if captions else ''}{f'+{negatives}' if negatives else ''}"
    name = f"{count}-d{width}{'-weighted' if weighted else ''}"
    return Case(operation, LossShape(name, pairs, width, captions, weighted, negatives), quick, cpu)


def _losses(pairs: int, width: int, captions: int, cpu: str = "") -> tuple[Case, ...]:
    """Every kind of loss, of the same number of texts."""
    texts = pairs * captions
    loss = functools.partial(_loss, width=width, cpu=cpu)
    return (
        loss(texts),
        loss(pairs, negatives=texts - pairs),
        loss(pairs, captions=captions),
        loss(pairs, captions=captions, weighted=True, quick=not cpu),
        loss(pairs, captions=captions, operation="siglip_plus_loss"),
        loss(pairs, captions=captions, operation="image_losses"),
        loss(texts, operation="matryoshka_sigmoid_loss"),
    )


def _model(model: str, batch: int, text: bool = False, layers: int = 0, quick: bool = False, cpu: str = "") -> Case:
    name = f"{model}-b{batch}" + (f"-l{layers}" if layers else "")
    return Case("siglip" if text else "vision_tower", ModelShape(name, model, batch, layers, text), quick, cpu)


def _towers(model: str, batch: int, layers: int = 0, cpu: str = "") -> tuple[Case, Case]:
    """Each tower by itself."""
    end = f"b{batch}" + (f"-l{layers}" if layers else "")
    return (
        Case("image_features", ModelShape(f"{model}-{end}", model, batch, layers), cpu=cpu),
        Case("text_features", TextShape(f"{model}-text-{end}", model, batch, layers), cpu=cpu),
    )


def _naflex(batch: int, layers: int = 0, quick: bool = False, cpu: str = "") -> Case:
    name = f"base-naflex-b{batch}" + (f"-l{layers}" if layers else "")
    return Case("naflex_tower", NaFlexShape(name, "base-naflex", batch, layers), quick, cpu)


def _embed(model: str, images: int, batch: int, workers: int, quick: bool = False, cpu: str = "") -> Case:
    shape = EmbedShape(f"{model}-n{images}-b{batch}-w{workers}", model, images, batch, workers)
    return Case("embed", shape, quick, cpu)


def _train(model: str, batch: int, layers: int = 0, quick: bool = False, cpu: str = "") -> Case:
    name = f"{model}-b{batch}" + (f"-l{layers}" if layers else "")
    return Case("training_step", TrainShape(name, model, batch, layers), quick, cpu)


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "attention",
            (
                _attention("so400m-384", 64, quick=True),
                _attention("base-512", 64, quick=True),
                _attention("so400m-384", 1024, text=True, quick=True),
                _attention("so400m-384", 64, peaked=10, quick=True),
                _sequences("packed_attention", "so400m-384", 64, quick=True),
                _sequences("packed_attention", "base-512", 64),
                _sequences("padded_attention", "so400m-384", 64),
                _attention("base-512", 64, peaked=10),
                _attention("so400m-384", 2, cpu="quick"),
                _attention("base-224", 8, cpu="full"),
                *(_attention("so400m-384", batch) for batch in (8, 256)),
                *(_attention("so400m-224", batch) for batch in (64, 256)),
                *(_attention("large-384", batch) for batch in (8, 64, 256)),
                _attention("base-512", 8),
                _attention("base-224", 256),
                _attention("base-224", 4096, text=True),
                _attention("so400m-384", 4096, text=True),
            ),
        ),
        Suite(
            "loss",
            (
                _loss(65_536, 768, quick=True),
                _loss(32_768, 1152, quick=True),
                _loss(8192, 768, quick=True, cpu="full"),
                _loss(2048, 768, cpu="quick"),
                _loss(1024, 768, cpu="quick"),
                _loss(4096, 768, cpu="quick"),
                _loss(512, 768),
                _loss(16_384, 768, cpu="full"),
                _loss(32_768, 768),
                _loss(16_384, 1152),
                _loss(65_536, 1152),
                _loss(131_072, 768),
                _loss(1_048_576, 768),
            ),
        ),
        Suite("losses", (*_losses(2048, 768, captions=2, cpu="quick"), *_losses(16_384, 768, captions=4))),
        Suite(
            "model",
            (
                _model("so400m-384", 64, quick=True),
                _model("base-224", 128, quick=True),
                _model("base-224", 2, layers=2, cpu="quick"),
                _model("so400m-384", 1, layers=1, cpu="quick"),
                _model("base-224", 1, layers=2, cpu="quick"),
                *(_model("base-224", batch, layers=2, cpu="quick") for batch in (4, 8, 16)),
                _naflex(16, layers=2, cpu="quick"),
                _naflex(64),
                _model("so400m-384", 128),
                _model("so400m-384", 32),
                _model("so400m-384", 8),
                _model("so400m-224", 128),
                _model("large-384", 64),
                _model("base-512", 64),
                *(_model("base-224", batch, text=True) for batch in (1, 2, 4, 8, 16, 32, 64)),
            ),
            hide_launches=False,
            quick_peers=("transformers:sdpa:compile", "transformers:sdpa:cudnn:compile"),
        ),
        Suite(
            "mlp",
            (
                _mlp("mlp", "so400m-384", 64, quick=True),
                _mlp("pre_norm_mlp", "so400m-384", 64, quick=True),
                _mlp("mlp", "base-224", 256, quick=True),
                _mlp("pre_norm_mlp", "base-224", 256),
                _mlp("mlp", "so400m-384", 8),
            ),
        ),
        Suite(
            "train",
            (
                _train("base-224", 64, quick=True),
                _train("base-224", 2, layers=1, cpu="quick"),
                _train("so400m-384", 16),
                _train("so400m-224", 64),
                _train("base-224", 256),
            ),
            hide_launches=False,
            quick_peers=("transformers:sdpa:compile",),
        ),
        Suite(
            "latency",
            (
                _model("so400m-384", 1, quick=True),
                _model("base-224", 1, quick=True),
                _model("large-384", 1),
            ),
            hide_launches=False,
            quick_peers=("transformers:sdpa:reduce-overhead",),
        ),
        Suite(
            "cpu",
            (
                *_towers("base-224", 1, layers=2, cpu="quick"),
                *_towers("so400m-224", 1, layers=1, cpu="full"),
                *_towers("base-224", 16, layers=2, cpu="full"),
                *_towers("so400m-224", 16, layers=1, cpu="full"),
                *_towers("base-224", 4, layers=2, cpu="full"),
                *_towers("so400m-224", 4, layers=1, cpu="full"),
                *(case for batch in (1, 4, 16) for case in _towers("base-224", batch)),
                *(case for batch in (1, 4, 16) for case in _towers("so400m-224", batch)),
            ),
            hide_launches=False,
            device="cpu",
        ),
        Suite(
            "embed",
            (
                _embed("base-224", 512, 64, workers=8, quick=True),
                _embed("so400m-384", 512, 32, workers=8),
                _embed("demo", 256, 32, workers=2, cpu="quick"),
                _embed("base-224", 24, 8, workers=2, cpu="full"),
            ),
            hide_launches=False,
        ),
        Suite(
            "layer_norm",
            (
                _norm("so400m-384", 64, quick=True),
                _norm("base-224", 256, quick=True),
                _norm("so400m-384", 1),
            ),
        ),
        Suite(
            "linear",
            (
                _linear("so400m-384", 64, "fc1", quick=True),
                _linear("so400m-384", 64, "out", quick=True),
                _qkv("so400m-384", 64, quick=True),
                _pre_norm_attention("so400m-384", 64, quick=True),
                _linear("so400m-384", 64, "fc2"),
                _linear("so400m-384", 64, "qkv"),
                _linear("base-224", 256, "out"),
                _qkv("base-224", 256),
            ),
        ),
        Suite(
            "fp8",
            (
                _mlp("fp8_mlp", "so400m-384", 64, quick=True),
                _pre_norm_attention("so400m-384", 64, quick=True, operation="fp8_pre_norm_attention"),
                _mlp("fp8_pre_norm_mlp", "so400m-384", 64, quick=True),
                _qkv("so400m-384", 64, operation="fp8_pre_norm_qkv"),
            ),
        ),
        Suite(
            "resize",
            (
                _resize(64, 512, 768, 384, quick=True),
                _resize(8, 3000, 4000, 224),
            ),
        ),
        Suite(
            "pool",
            (
                _pool("so400m-384", 64, quick=True),
                _pool("so400m-384", 2, cpu="quick"),
                _pool("base-224", 256),
            ),
        ),
        Suite(
            "patch",
            (
                _patch("so400m-384", 64, quick=True),
                _patch("base-224", 256),
            ),
        ),
    )
}


# What decides whether the kernels are worth having: (suite, operation, direction, shape).
DECISIVE = (
    ("model", "vision_tower", "fwd", "so400m-384-b64"),
    ("attention", "attention", "fwd", "so400m-384-b64"),
    ("loss", "sigmoid_loss", "fwd+bwd", "n65536-d768"),
    ("mlp", "mlp", "fwd", "so400m-384-b64"),
    ("latency", "vision_tower", "fwd", "so400m-384-b1"),
    ("attention", "attention", "bwd", "so400m-384-b64"),
    ("attention", "attention", "fwd", "base-512-b64"),
    ("attention", "attention", "bwd", "base-512-b64"),
)


def _key(suite: str, setting: Setting) -> tuple[str, str, str, str]:
    return suite, setting.operation.name, setting.direction, setting.shape.name


def is_decisive(suite: str, setting: Setting) -> bool:
    return _key(suite, setting) in DECISIVE


def by_importance(settings: dict[str, list[Setting]]) -> list[tuple[str, Setting]]:
    """DECISIVE, then the first other of every suite, the second, and so on: a deadline drops the least important."""
    decisive = [(suite, one) for suite, found in settings.items() for one in found if is_decisive(suite, one)]
    others = ([(suite, one) for one in found if not is_decisive(suite, one)] for suite, found in settings.items())
    rounds = [one for each in itertools.zip_longest(*others) for one in each if one is not None]
    return sorted(decisive, key=lambda one: DECISIVE.index(_key(*one))) + rounds


def dtypes_of(device: str) -> list[str]:
    """The default dtypes: those that models use on the device."""
    return ["bf16"] if device == "cuda" else ["fp32"]


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
