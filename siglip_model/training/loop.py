"""Training with the sigmoid loss (Zhai et al. 2023, arXiv 2303.15343): AdamW, warm-up and cosine, averaged weights.

One process. All randomness of a step is a function of the seed and the step's number, so a run that is interrupted
resumes with exactly the batches, moments and averages that it would have had.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from siglip_model.checkpoints.atomic import sync_directory, sync_file
from siglip_model.outputs import pooled, unit_length

if TYPE_CHECKING:
    from siglip_model.model import SiglipModel

_STATE = "training_state.safetensors"
_LOG = "training_log.jsonl"


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. A step is one update of the weights, from `accumulate` batches.

    The loss is computed per batch: accumulated batches share no negatives. Raises ValueError for values out of range.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    accumulate: int = 1
    average_decay: float = 0.998  # of the exponential moving average of the weights; 0 turns it off
    bfloat16: bool = False  # autocast
    seed: int = 0
    log_every: int = 20
    save_every: int = 200

    def __post_init__(self) -> None:
        # huggingface_hub's strict dataclasses would do this, but their errors are not ValueErrors.
        for name in ("steps", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainingConfig: {name} is {getattr(self, name)}; supported: 1 and more")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"TrainingConfig: warmup_steps is {self.warmup_steps}; supported: 0 to steps={self.steps}")
        if not self.learning_rate > 0 or not self.gradient_clip > 0:
            raise ValueError("TrainingConfig: learning_rate and gradient_clip must be positive")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"TrainingConfig: average_decay is {self.average_decay}; supported: 0 up to below 1")


@dataclass(frozen=True)
class Batch:
    """N texts, and one or more images of each.

    input_ids: int64 (N, length). pixel_values: (V, N, C, H, W), where image [v, n] belongs to text n, or (N, C, H, W)
    for one view. The text tower runs once for all views. Raises ValueError for shapes that do not match.
    """

    input_ids: Tensor
    pixel_values: Tensor

    def __post_init__(self) -> None:
        views, texts = self.pixel_values.shape[:-3], self.input_ids.shape[0]
        if len(views) not in (1, 2) or views[-1] != texts:
            raise ValueError(
                f"Batch: pixel_values {tuple(self.pixel_values.shape)} for {texts} texts; "
                "supported: (N, C, H, W) or (V, N, C, H, W)"
            )


BatchSource = Callable[[int, torch.Generator], Batch]
"""Returns a batch from its number (0, 1, ...) and a generator seeded by that number."""


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """What the learning rate is multiplied by at a step, 0 for the first update: linear warm-up, then half a cosine."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def initialise_logits(model: SiglipModel) -> None:
    """The paper's initial t' = log 10 and b = -10, with which the many negatives do not dominate the first steps."""
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)


def make_optimizer(model: SiglipModel, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019). Vectors and scalars (biases, norms, t' and b) are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    for group in groups:
        group["initial_lr"] = config.learning_rate  # a schedule that starts at a later step reads it
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def batch_loss(model: SiglipModel, batch: Batch, bfloat16: bool = False) -> Tensor:
    """The sigmoid loss, a scalar: the mean over the views. bfloat16: autocast of the towers; the loss stays in fp32."""
    pixel_values = batch.pixel_values if batch.pixel_values.ndim == 5 else batch.pixel_values[None]
    views = len(pixel_values)
    device = batch.input_ids.device.type
    with torch.autocast(device, torch.bfloat16) if bfloat16 else nullcontext():
        texts = pooled(model.get_text_features(batch.input_ids))
        images = pooled(model.get_image_features(pixel_values.flatten(0, 1)))
    # A zero embedding, such as a new head may give, stays zero instead of ending the run with NaN.
    texts = unit_length(texts.float(), eps=1e-12)  # [N, D]
    images = unit_length(images.float(), eps=1e-12).unflatten(0, (views, -1))  # [V, N, D]
    scale, bias = model.logit_scale.exp().squeeze(), model.logit_bias.squeeze()
    return torch.stack([model.ops.sigmoid_loss(view, texts, scale, bias) for view in images]).mean()


def average_weights(model: SiglipModel, decay: float) -> AveragedModel:
    """An exponential moving average of the model's weights; the decay grows to its value over the first steps.

    Its `module` is a second model, a deep copy in eval mode, with the averages as weights.
    """

    def update(averages: Any, weights: Any, count: Any) -> None:
        count = int(count)
        get_ema_multi_avg_fn(min(decay, count / (9 + count)))(averages, weights, count)

    average = AveragedModel(model, multi_avg_fn=update).eval()
    average.n_averaged.fill_(1)  # the initial weights are the first of the average; from 0, an update would drop them
    return average


AfterSave = Callable[[int, "SiglipModel", AveragedModel], None]
"""Called after each save with the number of steps done, the model and its averaged weights."""


def train(
    model: SiglipModel,
    batches: BatchSource,
    config: TrainingConfig,
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    show_progress: bool = True,
    after_save: AfterSave | None = None,
    stop_after: int | None = None,
) -> SiglipModel:
    """Train `model` in place and return it, in eval mode, with its averaged weights.

    directory: holds the state of the run (weights, moments, averages; replaced atomically every `save_every` steps)
        and a log in JSON lines. A state of an interrupted run with the same configuration is resumed.
    after_save: called after each save, to measure progress.
    stop_after: stop after this many steps, as if interrupted; the model then has the last weights, not the averages.
    Raises ValueError if the directory holds the state of another configuration or model, FloatingPointError when the
    loss is not finite.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(device).train()
    optimizer = make_optimizer(model, config)
    average = average_weights(model, config.average_decay)
    first = _load_state(directory / _STATE, model, optimizer, average, config)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, config), last_epoch=first - 1)
    _forget_after(directory / _LOG, first)
    last = config.steps if stop_after is None else min(config.steps, stop_after)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, disable=not show_progress) as progress, open(directory / _LOG, "a") as log:
        bar = progress.add_task("training", total=config.steps, completed=first)
        images, started = 0, time.perf_counter()
        for step in range(first, last):
            rate = schedule.get_last_lr()[0]
            loss_sum = 0.0
            for micro in range(config.accumulate):
                number = step * config.accumulate + micro
                seed = _seed_of_batch(config.seed, number)
                torch.manual_seed(seed)  # of dropout
                batch = batches(number, torch.Generator().manual_seed(seed))
                batch = Batch(batch.input_ids.to(device), batch.pixel_values.to(device))
                loss = batch_loss(model, batch, config.bfloat16) / config.accumulate
                loss.backward()
                loss_sum += loss.item()
                images += batch.pixel_values.shape[:-3].numel()
            if not math.isfinite(loss_sum):
                raise FloatingPointError(f"the loss is {loss_sum} at step {step}; try a lower learning rate")
            gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(model)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                speed = images / (time.perf_counter() - started)
                entry = {
                    "step": done,
                    "loss": loss_sum,
                    "learning_rate": rate,
                    "gradient_norm": float(gradient_norm),
                    "scale": model.logit_scale.exp().item(),
                    "bias": model.logit_bias.item(),
                    "images_per_second": speed,
                }
                log.write(json.dumps(entry) + "\n")
                log.flush()
                progress.update(bar, description=f"loss {loss_sum:.3f}  {speed:.0f} images/s")
                images, started = 0, time.perf_counter()
            progress.update(bar, completed=done)
            if done % config.save_every == 0 or done == last:
                _save_state(directory / _STATE, done, model, optimizer, average, config)
                if after_save is not None:
                    after_save(done, model, average)
                    images, started = 0, time.perf_counter()
    if last == config.steps and config.average_decay > 0:
        model.load_state_dict(average.module.state_dict())
    return model.eval()


def _seed_of_batch(seed: int, number: int) -> int:
    """Knuth's multiplier spreads seeds, so that runs with neighbouring seeds share no batches."""
    return (seed * 2654435761 + number * 40503 + 1) % 2**63


def _forget_after(log: Path, step: int) -> None:
    """Drop the log lines of steps after the last save, which will be repeated."""
    if log.exists():
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))


def _save_state(
    path: Path,
    step: int,
    model: SiglipModel,
    optimizer: torch.optim.AdamW,
    average: AveragedModel,
    config: TrainingConfig,
) -> None:
    tensors: dict[str, Tensor] = {}
    averages = dict(average.module.named_parameters())
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        tensors[f"average.{name}"] = averages[name].detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    temporary = path.with_name(path.name + ".part")
    save_file(tensors, temporary, metadata={"step": str(step), "config": json.dumps(_identity(config))})
    sync_file(temporary)
    temporary.replace(path)  # atomic: an interruption keeps the previous state
    sync_directory(path.parent)


def _load_state(
    path: Path, model: SiglipModel, optimizer: torch.optim.AdamW, average: AveragedModel, config: TrainingConfig
) -> int:
    """Restore the saved state, if any, and return the number of completed steps."""
    if not path.exists():
        return 0
    try:
        state = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not the state of a run: {error}; remove it to start again") from error
    with state as file:
        metadata = file.metadata() or {}
        if not {"step", "config"} <= metadata.keys():
            raise ValueError(f"{path} is not the state of a run: no step and config; remove it to start again")
        saved, wanted = json.loads(metadata["config"]), json.loads(json.dumps(_identity(config)))
        if saved != wanted:
            differing = [key for key in wanted if saved.get(key) != wanted[key]]
            changed = ", ".join(f"{key} was {saved.get(key)}, is {wanted[key]}" for key in differing)
            raise ValueError(f"{path} is the state of another run ({changed}); use another directory or remove it")
        names = set(file.keys())
        averages = dict(average.module.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if f"model.{name}" not in names:
                    raise ValueError(f"{path} is the state of another model: it has no {name}")
                stored = file.get_tensor(f"model.{name}")
                if stored.shape != parameter.shape:
                    shapes = f"{name} is {tuple(stored.shape)}, not {tuple(parameter.shape)}"
                    raise ValueError(f"{path} is the state of another model: {shapes}")
                parameter.copy_(stored)
                averages[name].copy_(file.get_tensor(f"average.{name}"))
                moments: dict[str, Any] = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"optimizer.{key}.{name}" in names:
                        value = file.get_tensor(f"optimizer.{key}.{name}")
                        moments[key] = value if key == "step" else value.to(parameter.device)
                if moments:
                    optimizer.state[parameter] = moments
        step = int(metadata["step"])
        average.n_averaged.fill_(1 + step)
        return step


def _identity(config: TrainingConfig) -> dict[str, Any]:
    """What must be equal for a run to resume; how often it logs and saves may change."""
    return {key: value for key, value in asdict(config).items() if key not in ("log_every", "save_every")}
