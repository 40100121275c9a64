"""The training loop, on one process or several.

All randomness of a step is a function of the seed and the step's number, so a run that is interrupted resumes with
exactly the batches, moments and averages that it would have had.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from siglip_model import onednn
from siglip_model.model import SiglipModel
from siglip_model.training.average import average_weights
from siglip_model.training.batch import Batch, BatchSource, seed_of
from siglip_model.training.cached import Piece, cached_backward
from siglip_model.training.checkpoints import CHECKPOINTS, Checkpoints, TrainingState
from siglip_model.training.flops import flops_per_pair
from siglip_model.training.log import RunLog
from siglip_model.training.objective import Embedded, Embedder, clamp_logits, freeze, joined, mean_loss
from siglip_model.training.optimizer import learning_rate_factor, make_optimizers, set_learning_rate
from siglip_model.training.parallel import copy_to_ranks, make_loss, shard, whole_model, without_exchange
from siglip_model.training.peak import peak_tflops
from siglip_model.training.processes import Processes
from siglip_model.training.settings import TrainingConfig
from siglip_model.training.skipped import Skipped

Evaluate = Callable[[int, SiglipModel], dict[str, Any]]
"""From the number of steps done and the averaged model, in eval mode, to what the log shall hold. On every rank."""


@dataclass(frozen=True)
class Trained:
    """The steps that are done, the model in eval mode, with averaged weights and whole on every rank, and its scores.

    scores: what `evaluate` returned last; None if it was not called.
    """

    steps: int
    model: SiglipModel
    scores: Mapping[str, Any] | None = None


def train(
    model: SiglipModel,
    source: BatchSource,
    config: TrainingConfig,
    directory: str | Path,
    *,
    processes: Processes | None = None,
    identity: dict[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    evaluation_data: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    stop_after: int | None = None,
    show_progress: bool = True,
) -> Trained:
    """Train `model` in place, on each of the processes alike (by default one, on the CPU).

    directory: of the run: checkpoints/, and a log in JSON lines. The newest checkpoint of the same run is resumed.
    identity: what makes a run the same, by default the configuration.
    evaluation_data: what `evaluate` measures on, for the log. A run that resumes after an evaluation on something else
    evaluates at once.
    should_stop: asked after each step; if it holds on one rank, all save and return. stop_after: likewise, a step.
    show_progress: as in `RunLog`.
    A step whose loss or gradient is not finite leaves the weights as they are. Raises FloatingPointError that names the
    samples after config.max_bad_steps of them in a row, ValueError if the directory holds another run.
    """
    run = _Run(model, config, processes or Processes(torch.device("cpu")))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(directory / CHECKPOINTS, run.processes, config.keep_checkpoints)
    identity = config.identity() if identity is None else identity
    facts = checkpoints.resume(run.state, identity)
    first, position = 0, None
    if facts is not None:
        first, run.bad_steps, positions = facts["step"], facts["bad_steps"], facts["positions"]
        position = positions[min(run.processes.rank, len(positions) - 1)]
    last = config.steps if stop_after is None else min(config.steps, stop_after)
    writes = run.processes.rank == 0
    shown = dict(writes=writes, show_progress=show_progress, tensorboard=config.tensorboard)
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(source(first, position)) as batches,  # and with it the workers that read
        RunLog(directory, config.steps, first, **shown) as log,
    ):
        meter = _Meter(run)

        def evaluate_averages(step: int) -> dict[str, Any]:
            assert evaluate is not None
            found = evaluate(step, run.averaged_model())
            log.write({"step": step, "evaluation": found, "evaluation_data": evaluation_data})
            run.training_mode()
            log.draw()
            meter.restart()
            return found

        done = first
        scores = run.processes.gather(log.evaluation(first, evaluation_data) if writes else None)[0]
        # It was killed before or within an evaluation, or has other data to evaluate on.
        if evaluate is not None and first and _due(first, config) and scores is None:
            scores = evaluate_averages(first)
        while done < last:
            outcome = run.step(done, batches, should_stop())
            done += 1
            if outcome.stop:
                last = done
            meter.add(outcome)
            logs = done % config.log_every == 0 or done == last or outcome.bad
            saves = done % config.save_every == 0 or done == last
            if logs or saves:  # what a resumed run does not read again must be named
                log.skip(done, [one for skipped in run.processes.gather(meter.take_skipped()) for one in skipped])
            if logs:
                entry = meter.read(done, outcome)
                log.write({**entry, "skipped": len(log.skipped)})
                log.show(entry)
            if run.bad_in_a_row == config.max_bad_steps:
                checkpoints.wait()
                raise FloatingPointError(run.complaint(done, outcome))
            if saves:
                places = run.processes.gather(outcome.position)
                saved = {"identity": identity, "positions": places, "bad_steps": run.bad_steps}
                checkpoints.save(done, run.state, saved)
            # What a stop leaves out is made up for at resumption, and a complete run is not resumed.
            if evaluate is not None and _due(done, config) and (done == config.steps or not outcome.stop):
                scores = evaluate_averages(done)
        checkpoints.wait()
        log.draw()
    return Trained(done, run.averaged_model(), scores)


def _due(step: int, config: TrainingConfig) -> bool:
    """Whether there is an evaluation after a step."""
    return step == config.steps or (config.evaluate_every > 0 and step % config.evaluate_every == 0)


@dataclass(frozen=True)
class _Outcome:
    """Of a step: the global batch's loss, whether the step was left out or one rank wants to stop, and the samples."""

    loss: float
    gradient_norm: float
    learning_rate: float
    bad: bool
    stop: bool
    images: int
    names: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    position: Any


class _Run:
    """The model, its optimizers and its average, as one step changes them."""

    def __init__(self, model: SiglipModel, config: TrainingConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        model.to(processes.device)
        self.embedder = Embedder(model, autocast=torch.bfloat16 if config.bfloat16 else None)
        self.loss = make_loss(config, processes)
        self.training_mode()
        if config.recompute:
            model.activation_checkpointing_enable()
        clamp_logits(model, config)  # before the first step, too: the average begins with these values
        self.average: AveragedModel | None = None
        if config.average_decay > 0:
            self.average = average_weights(self.embedder, config.average_decay)
        if config.parallel == "fsdp":
            for embedder in (self.embedder, *([self.average.module] if self.average else [])):
                shard(embedder, config, processes)  # type: ignore[arg-type]
        self.optimizers: list[Optimizer] = make_optimizers(model, config)
        self.state = TrainingState(self.embedder, self.optimizers, self.average)
        self.parallel = copy_to_ranks(self.embedder, config, processes)
        if config.compile:
            self.embedder.compile()
        self.bad_steps = self.bad_in_a_row = 0

    def training_mode(self) -> None:
        self.embedder.train()
        freeze(self.embedder.model, self.config.freeze)

    def averaged_model(self) -> SiglipModel:
        return whole_model(self.embedder if self.average is None else self.average.module)  # type: ignore[arg-type]

    def step(self, step: int, batches: Iterator[Batch], wants_to_stop: bool) -> _Outcome:
        """One update of the weights, unless the loss or the gradient of one rank is not finite."""
        config, processes = self.config, self.processes
        factor = learning_rate_factor(step, config)
        set_learning_rate(self.optimizers, factor)
        batch = next(batches).to(processes.device)
        torch.manual_seed(seed_of(config.seed, step) + processes.rank)  # of dropout
        loss = self.backward(batch).item()
        norm = _value(nn.utils.clip_grad_norm_(self.embedder.parameters(), config.gradient_clip))
        fine = math.isfinite(loss) and math.isfinite(norm)
        loss_sum, fine_ranks, stopping = processes.sum(loss, fine, wants_to_stop)
        bad = fine_ranks < processes.world
        if bad:
            self.bad_steps += 1
            self.bad_in_a_row += 1
        else:
            self.bad_in_a_row = 0
            for optimizer in self.optimizers:
                optimizer.step()
            clamp_logits(self.embedder.model, config)
            if self.average is not None:
                self.average.update_parameters(self.embedder)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return _Outcome(
            loss=loss_sum / processes.world,
            gradient_norm=norm,
            learning_rate=config.learning_rate * factor,
            bad=bad,
            stop=stopping > 0,
            images=batch.images,
            names=batch.names,
            skipped=batch.skipped,
            position=batch.position,
        )

    def backward(self, batch: Batch) -> Tensor:
        """Adds the gradients of the batch's loss, which it returns."""
        with onednn.left_out():  # of a frozen tower and of embeddings without a graph
            return self._backward(batch.inputs(self.config.micro_batch))

    def _backward(self, parts: list[dict[str, Tensor]]) -> Tensor:
        if len(parts) == 1:
            loss = mean_loss(self.parallel(**parts[0]), self.loss)
            loss.backward()
            return loss.detach()
        pieces = [Piece(self._embed, part, part is parts[-1]) for part in parts]
        return cached_backward(pieces, lambda found: mean_loss(joined([Embedded(*one) for one in found]), self.loss))

    def _embed(self, inputs: dict[str, Tensor], last: bool) -> Embedded:
        """The embeddings of a micro-batch, to whose inputs it adds those that need not be computed again."""
        with without_exchange(self.parallel, last):
            found = self.parallel(**inputs)
        inputs |= {name: getattr(found, name) for name in self.embedder.frozen}
        return found

    def complaint(self, done: int, outcome: _Outcome) -> str:
        names = [name for names in self.processes.gather(outcome.names) for name in names]
        samples = f" The last batch holds {', '.join(names)}." if names else ""
        return (
            f"loss or gradient were not finite in {self.bad_in_a_row} steps in a row, the last of them step {done}; "
            f"try a lower learning rate.{samples}"
        )


class _Meter:
    """Speed, and samples left out, since the last line of the log."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.restart()
        self.skipped: list[Skipped] = []
        self.peak = run.config.peak_tflops or peak_tflops(run.processes.device)
        self.flops = flops_per_pair(run.embedder.model) if self.peak is not None else 0

    def restart(self) -> None:
        self.images, self.started = 0, time.perf_counter()

    def add(self, outcome: _Outcome) -> None:
        self.images += outcome.images
        self.skipped += outcome.skipped

    def take_skipped(self) -> list[Skipped]:
        taken, self.skipped = self.skipped, []
        return taken

    def read(self, done: int, outcome: _Outcome) -> dict[str, Any]:
        """A line of the log. images_per_second: of all processes."""
        speed = self.images * self.run.processes.world / (time.perf_counter() - self.started)
        self.restart()
        model = self.run.embedder.model
        entry: dict[str, Any] = {
            "step": done,
            "loss": _finite(outcome.loss),
            "learning_rate": outcome.learning_rate,
            "gradient_norm": _finite(outcome.gradient_norm),
            "scale": _finite(math.exp(_value(model.logit_scale.detach()))),
            "bias": _finite(_value(model.logit_bias.detach())),
            "images_per_second": speed,
            "bad_steps": self.run.bad_steps,
        }
        if self.peak is not None:
            entry["mfu"] = speed * self.flops / (self.run.processes.world * self.peak * 1e12)
        return entry


def _value(tensor: Tensor) -> float:
    """The number that a tensor of one element holds; a sharded one is gathered, so every rank must ask."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).item()


def _finite(value: float) -> float | None:
    """None, which JSON has, for NaN and infinity, which it has not."""
    return value if math.isfinite(value) else None
