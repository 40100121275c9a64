"""The noise of operations in fp8 beside torchao's, on the same tensors: `python -m bench.fp8_accuracy [--out FILE]`.

Decibels of signal to noise (SQNR) against the definition in fp64: 20 log₁₀ ‖exact‖ / ‖found − exact‖, where what the
operation adds to its input (the residual) is not part of the signal. On a GPU, or with TRITON_INTERPRET=1 without one.
torchao runs where it is installed; its formula in plain PyTorch (`scaled_mm`), and the definition in bf16, run always.

Inputs are normal; with an outlier channel, a thousand times as large as the others, whose column of the result is left
out where x is added to it; or saturating: half of the rows parallel to rows of the first weight, and a hundred times
as long, so that GELU's result comes as near as it can to the bound from which its scale is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.cases.operations import OPERATIONS, Contender, Inputs, Setting
from bench.cases.shapes import MLPShape, PreNormAttentionShape, QKVShape, Shape
from bench.environment import device, environment, is_gpu
from bench.measure.accuracy import forward
from bench.peers import Missing, Unsupported, peers_of
from siglip_kernels import reference

TOWERS = {"so400m": (1152, 4304, 16), "base": (768, 3072, 12)}  # width, hidden, heads: all depths of a product
ROWS = 64
CONTENDERS = ("triton", "torchao:float8", "scaled_mm", "bf16")
INPUTS = ("normal", "outlier", "saturating")
CHANNEL = 7  # of the outlier
LOSS = 0.5  # dB that this project may have less than torchao


@dataclass(frozen=True)
class Noise:
    """SQNR in dB by contender, or why there is none."""

    operation: str
    tower: str
    inputs: str
    decibels: dict[str, float | str]

    @property
    def loss(self) -> float:
        """dB that this project has less than torchao or, where that is missing, than its formula."""
        peers = [value for name in ("torchao:float8", "scaled_mm") if not isinstance(value := self.decibels[name], str)]
        ours = self.decibels["triton"]
        return peers[0] - ours if peers and not isinstance(ours, str) else math.nan


def shapes(tower: str, rows: int = ROWS) -> dict[str, Shape]:
    width, hidden, heads = TOWERS[tower]
    mlp = MLPShape(tower, rows, width, hidden)
    attention = PreNormAttentionShape(tower, 1, rows, heads, width // heads)
    return {
        "fp8_mlp": mlp,
        "fp8_pre_norm_mlp": mlp,
        "fp8_pre_norm_qkv": QKVShape(tower, rows, width, heads),
        "fp8_pre_norm_attention": attention,
    }


def draw(setting: Setting, kind: str) -> Inputs:
    """kind: of INPUTS."""
    inputs = setting.inputs()
    tensors = dict(inputs.tensors)
    tensors.pop("residual", None)
    x = tensors["x"] = tensors["x"].clone()
    if kind == "outlier":
        x[..., CHANNEL] *= 1000
    elif kind == "saturating":
        weight = tensors["fc1_weight" if "fc1_weight" in tensors else "q_weight"]
        rows = x.flatten(0, -2)
        rows[::2] = 100 * weight[: len(rows[::2])]
    return replace(inputs, tensors=tensors)


def measure(setting: Setting, kind: str, names: tuple[str, ...] = CONTENDERS) -> Noise:
    operation = setting.operation.name
    inputs = draw(setting, kind)
    added = inputs.tensors["x"].double() if operation in ("fp8_pre_norm_mlp", "fp8_pre_norm_attention") else None
    # In fp64, so that no rounding of x can hide in the signal.
    exact = forward(setting.operation.definition(setting, torch.float64), inputs.map(Tensor.double))
    found: dict[str, float | str] = {}
    for name in names:
        try:
            found[name] = decibels(forward(_prepare(name, setting), inputs), exact, added, kind)
        except (Missing, Unsupported) as error:
            found[name] = f"not measured: {error}"
    return Noise(operation, setting.shape.name, kind, found)


def _prepare(name: str, setting: Setting) -> Contender:
    operation = setting.operation.name
    if name == "bf16":
        return Contender(getattr(reference, operation.removeprefix("fp8_")))
    entry = peers_of(operation)[name]
    return replace(entry, cuda=False).prepare(setting)  # without a GPU: in the interpreter, or emulated


def decibels(found: list[Tensor], exact: list[Tensor], added: Tensor | None, kind: str) -> float:
    """Over all outputs. added: what of them is no signal."""
    signal = noise = 0.0
    for one, true in zip(found, exact, strict=True):
        keep: Any = slice(None)
        if kind == "outlier" and added is not None:
            keep = [column for column in range(true.shape[-1]) if column != CHANNEL]
        error = one.double() - true
        noise += float(error[..., keep].square().sum())
        signal += float((true if added is None else true - added)[..., keep].square().sum())
    return 10 * math.log10(signal / noise)


def rows(count: int = ROWS) -> Iterator[Noise]:
    for tower in TOWERS:
        for operation, shape in shapes(tower, count).items():
            for kind in INPUTS:
                yield measure(Setting(OPERATIONS[operation], shape, torch.bfloat16, device(), "fwd"), kind)


def table(noises: list[Noise]) -> str:
    """A page of Markdown with the environment."""
    facts = environment()
    installed = peers_of("fp8_mlp")["torchao:float8"].version()
    machine = facts["gpu"] if is_gpu(facts["gpu"]) else f"Triton's interpreter on a {facts['gpu']}"
    where = f"{machine}, torch {facts['torch']}, triton {facts['triton']}, torchao {installed or 'not installed'}"
    lines = [
        "# fp8 beside torchao",
        "",
        f"By `python -m bench.fp8_accuracy`: {where}, commit {facts['commit']}, {facts['date']}.",
        "",
        *(__doc__ or "").split("\n\n", 1)[1].strip().splitlines(),
        "",
        "| operation | tower | inputs | " + " | ".join(CONTENDERS) + " |",
        "| --- | --- | --- |" + " --: |" * len(CONTENDERS),
    ]
    for noise in noises:
        cells = [value if isinstance(value, str) else f"{value:.2f}" for value in map(noise.decibels.get, CONTENDERS)]
        lines.append(f"| {noise.operation} | {noise.tower} | {noise.inputs} | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def main(
    out: Annotated[Path | None, typer.Option(help="A Markdown file to write; otherwise it is printed.")] = None,
) -> None:
    """Exit with 1 if this project has more than 0.5 dB less than torchao anywhere."""
    environment()  # of the code that runs, whatever is committed meanwhile
    noises = []
    for noise in rows():
        noises.append(noise)
        typer.echo(f"{noise.operation} {noise.tower} {noise.inputs}: {noise.decibels}", err=True)
    if out is None:
        print(table(noises))
    else:
        out.write_text(table(noises))
    worst = max(noises, key=lambda noise: noise.loss)
    typer.echo(
        f"at most {worst.loss:.2f} dB less than torchao: {worst.operation} {worst.tower} {worst.inputs}", err=True
    )
    raise typer.Exit(0 if all(noise.loss <= LOSS for noise in noises) else 1)


if __name__ == "__main__":
    typer.run(main)
