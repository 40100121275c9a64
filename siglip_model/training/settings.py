"""Settings of a training run: from a TOML or YAML file, the command line, and back. Imports no PyTorch."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from siglip_model.checkpoints.atomic import atomic_write

WARMUP_STEPS = 100


def _setting(
    text: str,
    default: Any = dataclasses.MISSING,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    choices: tuple[str, ...] = (),
    may_change: bool = False,
) -> Any:
    """A field with its help text and range. may_change: a run may be resumed with another value."""
    supported = [f"from {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
    supported += [f"to {most:g}"] * (most < math.inf) + [f"below {below:g}"] * (below < math.inf)
    metadata = {
        "help": text,
        "within": lambda value: least <= value <= most and above < value < below,
        "supported": " ".join(supported),
        "choices": choices,
        "may_change": may_change,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train. A step is one update of the weights. Raises ValueError for values out of range."""

    steps: int = _setting("Optimizer steps.", least=1)
    micro_batch: int | None = _setting(
        "Pairs whose activations a process holds at a time; the loss stays that of the batch. none: all its pairs.",
        None,
        least=1,
        may_change=True,
    )
    learning_rate: float = _setting("Peak learning rate: linear warm-up, then a cosine to 0.", 1e-3, above=0)
    warmup_steps: int | None = _setting(
        f"Steps of warm-up. none: {WARMUP_STEPS}, or all of a shorter run.", None, least=0
    )
    optimizer: str = _setting("adamw; or muon for the layers' matrices.", "adamw", choices=("adamw", "muon"))
    beta1: float = _setting("AdamW's decay of the gradients' mean.", 0.9, least=0, below=1)
    beta2: float = _setting("AdamW's decay of the gradients' square.", 0.95, least=0, below=1)
    weight_decay: float = _setting("Weight decay of matrices; vectors and scalars have none.", 0.1, least=0)
    gradient_clip: float = _setting("Largest norm of the gradient.", 1.0, above=0)
    layer_decay: float = _setting("Factor of the learning rate per layer towards the inputs.", 1.0, above=0, most=1)
    freeze: str = _setting("A tower that is not trained; vision is LiT.", "none", choices=("none", "vision", "text"))
    min_scale: float | None = _setting("Clamp the temperature t to at least this, from the start on.", None, above=0)
    max_scale: float | None = _setting("Clamp it to at most this, as CLIP does to 100.", None, above=0)
    min_bias: float | None = _setting("Clamp the bias b to at least this, from the start on.", None)
    max_bias: float | None = _setting("Clamp it to at most this.", None)
    average_decay: float = _setting("Decay of the weights' moving average; 0: none.", 0.998, least=0, below=1)
    bfloat16: bool = _setting("Compute in bfloat16; weights and the loss stay in float32.", False)
    global_loss: bool = _setting("Compare images with the texts of all processes.", True)
    parallel: str = _setting("How processes share the model.", "ddp", choices=("ddp", "fsdp"), may_change=True)
    recompute: bool = _setting(
        "Activation checkpointing: recompute layers in the backward pass.", False, may_change=True
    )
    compile: bool = _setting("Compile the model with torch.compile.", False, may_change=True)
    max_bad_steps: int = _setting("Stop after this many steps in a row whose loss is not finite.", 10, least=1)
    seed: int = _setting("Seed of all randomness.", 0, least=0, most=2**63 - 1)
    log_every: int = _setting("Steps between lines of the log.", 20, least=1, may_change=True)
    save_every: int = _setting("Steps between checkpoints.", 200, least=1, may_change=True)
    keep_checkpoints: int = _setting("Checkpoints to keep.", 2, least=1, may_change=True)
    evaluate_every: int = _setting("Steps between evaluations; 0: at the end only.", 0, least=0, may_change=True)
    tensorboard: bool = _setting("Also write TensorBoard's event files.", False, may_change=True)
    peak_tflops: float | None = _setting(
        "Peak TFLOP/s of a device, for MFU. none: of bfloat16 on usual GPUs.", None, above=0, may_change=True
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            value = _typed(field.name, given, hints[field.name])
            object.__setattr__(self, field.name, value)
            choices = field.metadata["choices"]
            if choices and value not in choices:
                raise refusal(field.name, value, ", ".join(choices))
            if isinstance(value, float) and not math.isfinite(value):  # such as 1e400
                raise refusal(field.name, given, f"finite numbers {field.metadata['supported']}".strip())
            if isinstance(value, (int, float)) and not field.metadata["within"](value):
                raise refusal(field.name, value, field.metadata["supported"])
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(WARMUP_STEPS, self.steps))
        elif self.warmup_steps > self.steps:
            raise refusal("warmup_steps", self.warmup_steps, f"0 to steps={self.steps}")
        for least, most in (("min_scale", "max_scale"), ("min_bias", "max_bias")):
            low, high = getattr(self, least), getattr(self, most)
            if None not in (low, high) and low > high:
                raise refusal(least, low, f"at most {most}={high:g}")

    def identity(self) -> dict[str, Any]:
        """The values that must be equal for a run to resume."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields if not field.metadata["may_change"]}


@dataclass(frozen=True, kw_only=True)
class RunSettings(TrainingConfig):
    """A run of `siglip train`. batch_size counts the pairs of all processes, so a run is the same on any number."""

    data: str = _setting("Folder of captioned images, or tar shards such as 'shards/{000..099}.tar'.")
    model: str = _setting("Checkpoint to start from: a folder or a Hub id.")
    out: str = _setting("Folder of the run.", may_change=True)
    weights: str = _setting("Where weights come from.", "checkpoint", choices=("checkpoint", "random"))
    paper_logits: bool = _setting("Start from t' = log 10 and b = -10, as random weights do.", False)
    lora_rank: int = _setting("Train adapters of this rank by PEFT, and merge them at the end; 0: none.", 0, least=0)
    batch_size: int = _setting("Pairs per batch, over all processes.", 64, least=1)
    crop_scale: float = _setting("Least area of random crops; 1: whole images.", 1.0, above=0, most=1)
    flip: bool = _setting("Mirror half of the images.", False)
    shuffle_buffer: int = _setting("Samples of shards to shuffle among, per worker.", 1000, least=1)
    num_workers: int = _setting("Processes that read data, per process.", 2, least=0, may_change=True)
    backend: str = _setting("Compute backend, see `siglip info`.", "auto", may_change=True)
    device: str = _setting("cpu or cuda; auto: a GPU if there is one.", "auto", may_change=True)
    timeout: float = _setting(
        "Seconds after which processes give up a silent one.", 600, above=0, most=1e6, may_change=True
    )
    evaluation_data: str | None = _setting("What to evaluate on, see `siglip evaluate`.", None, may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate_every and self.evaluation_data is None:
            raise refusal("evaluate_every", self.evaluate_every, "0 without evaluation_data")

    def save(self, path: Path) -> None:
        """Write the settings as TOML, which `--config` reads, atomically."""
        lines = [
            f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
            for name, value in vars(self).items()
            if value is not None
        ]
        text = "".join(lines).replace("\x7f", "\\u007f")  # the one character that TOML escapes and JSON does not
        atomic_write(path, text.encode(errors="surrogateescape"))


def read_settings(config: Path | None, given: Mapping[str, Any]) -> RunSettings:
    """The settings of a file, replaced by the `given` ones that are not None, and the defaults of the others.

    Values may be texts. Raises ValueError that names the setting, and the file if it is from there; OSError for a file
    that cannot be read.
    """
    known = {field.name: field for field in dataclasses.fields(RunSettings)}
    of_file = {} if config is None else _read_file(config)
    for name in of_file:
        if name not in known:
            raise ValueError(f"{config}: unknown setting {name!r}; known: {', '.join(known)}")
    of_options = {name: value for name, value in given.items() if value is not None}
    values = of_file | of_options
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise ValueError(f"{_option(name)} is missing; give it as an option or in a file with --config")
    try:
        return RunSettings(**values)
    except RefusedSetting as error:
        if error.setting in of_file and error.setting not in of_options:
            raise ValueError(f"{config}: {error}") from error
        raise


def _read_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".toml":
        try:
            return tomllib.loads(_text(path))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: {error}") from error
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--config is {str(path)!r}; supported: files named *.toml, *.yaml or *.yml")
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise RuntimeError("--config: reading YAML needs pip install pyyaml") from error
    try:
        text = _text(path)
        values, tree = yaml.safe_load(text), yaml.compose(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; supported: settings, each as name: value")
    names = [name.value for name, _ in tree.value]
    if len(set(names)) < len(names):  # YAML would take the last
        raise ValueError(f"{path}: {max(names, key=names.count)!r} is given more than once")
    return values


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape")  # as file names that are not UTF-8


class RefusedSetting(ValueError):
    """A value that is not supported. setting: its name."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


def refusal(name: str, value: Any, supported: str) -> RefusedSetting:
    """The error of a setting, under its name and its option's."""
    return RefusedSetting(name, f"{_option(name)} is {value!r}; supported: {supported}")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Says which setting it is whose data, within the block, are not there or of no use. Raises ValueError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ValueError(f"{_option(name)} cannot be used: {error}") from error


def _option(name: str) -> str:
    return f"{name} (--{name.replace('_', '-')})"


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as the field's type; numbers and truth values may be texts, as on the command line."""
    optional = isinstance(hint, types.UnionType)
    kind = get_args(hint)[0] if optional else hint
    if optional and value in (None, "none"):
        return None
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if kind in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            number = kind(value)
            if isinstance(value, str) or number == value:
                return number
        elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) and value != "":
            return value
    except (KeyError, ValueError, OverflowError):
        pass
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise refusal(name, value, names[kind] + " or none" * optional)
