"""`siglip train`: from settings to a trained checkpoint."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from siglip_model.auto import AutoConfig, AutoModelForZeroShotImageClassification, AutoProcessor
from siglip_model.fit import check_fit
from siglip_model.model import SiglipModel
from siglip_model.processor import SiglipProcessor
from siglip_model.training.batch import BatchSource
from siglip_model.training.captions import read_captions
from siglip_model.training.checkpoints import CHECKPOINTS, check_identity, has_checkpoints
from siglip_model.training.evaluation.run import check_data, evaluate_on
from siglip_model.training.evaluation.samples import plot_samples
from siglip_model.training.folder import folder_batches
from siglip_model.training.lock import locked
from siglip_model.training.log import CURVES, LOG, SKIPPED, summary_writer
from siglip_model.training.loop import Trained, train
from siglip_model.training.lora import add_adapters, merged
from siglip_model.training.objective import initialise_logits
from siglip_model.training.preparation import Preparation
from siglip_model.training.processes import Processes, joined_processes
from siglip_model.training.settings import RunSettings, naming, read_settings, refusal
from siglip_model.training.shards import find_shards, is_shards, shard_batches

SETTINGS, MODEL, PREDICTIONS = "settings.toml", "model", "predictions"


def run(settings: RunSettings, *, show_progress: bool = True) -> Trained:
    """Trains as the settings say, on all processes that torchrun started; a run that was stopped is resumed.

    Writes settings.toml, log.jsonl, skipped.jsonl, curves.png, predictions/, checkpoints/ and, at the end, model/, a
    checkpoint for `from_pretrained`. SIGTERM saves and returns early. Raises ValueError for settings that cannot be
    met.
    """
    out = Path(settings.out)
    with (
        joined_processes(settings.device, settings.timeout) as processes,
        _termination_noted() as terminated,
        ExitStack() as held,
    ):
        if settings.batch_size % processes.world:
            raise refusal("batch_size", settings.batch_size, f"a multiple of the {processes.world} processes")
        saved = _saved_settings(out)
        if saved is not None and has_checkpoints(out):
            check_identity(out, saved.identity(), settings.identity())
            if saved.evaluation_data not in (None, settings.evaluation_data) and processes.rank == 0:
                warnings.warn(f"evaluation_data: scores so far are of {saved.evaluation_data!r}", stacklevel=2)
        if settings.tensorboard:
            summary_writer()  # before anything is written
        if settings.evaluation_data is not None:
            with naming("evaluation_data"):
                check_data(settings.evaluation_data)
        model, processor = load(settings, processes)
        source = _source(settings, model, processor, processes)
        if processes.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out))
            settings.save(out / SETTINGS)

        def evaluate(step: int, averaged: SiglipModel) -> dict[str, Any]:
            assert settings.evaluation_data is not None
            with naming("evaluation_data"):
                scores = evaluate_on(settings.evaluation_data, averaged, processor, processes=processes)
            if processes.rank == 0:
                (out / PREDICTIONS).mkdir(exist_ok=True)
                picture = out / PREDICTIONS / f"step-{step:08}.png"
                plot_samples(settings.evaluation_data, averaged, processor, picture)
            return scores

        trained = train(
            model,
            source,
            settings,
            out,
            processes=processes,
            evaluate=None if settings.evaluation_data is None else evaluate,
            evaluation_data=settings.evaluation_data,
            should_stop=terminated,
            show_progress=show_progress,
        )
        if trained.steps == settings.steps and processes.rank == 0:
            whole = merged(trained.model) if settings.lora_rank else trained.model
            whole.save_pretrained(out / MODEL)
            processor.save_pretrained(out / MODEL)
    return trained


def _saved_settings(out: Path) -> RunSettings | None:
    """Those of the run in the folder, if any. Raises ValueError if it holds something else that a run would replace."""
    if (out / SETTINGS).exists():
        try:
            return read_settings(out / SETTINGS, {})
        except ValueError as error:
            raise refusal("out", str(out), f"a new folder or that of a run; {SETTINGS} is of none ({error})") from error
    found = [name for name in (LOG, SKIPPED, CURVES, CHECKPOINTS, MODEL, PREDICTIONS) if (out / name).exists()]
    if found:
        raise refusal("out", str(out), f"a new folder or that of a run; this one holds {', '.join(found)}")
    return None


def load(settings: RunSettings, processes: Processes) -> tuple[SiglipModel, SiglipProcessor]:
    """The model in fp32 and the processor of the checkpoint; with weights="random" a new model of its configuration."""
    processor = AutoProcessor.from_pretrained(settings.model)
    auto = AutoModelForZeroShotImageClassification  # a SiglipModel or a Siglip2Model
    torch.manual_seed(settings.seed)  # of new weights and adapters, which ranks must draw alike
    if settings.weights == "random":
        config = AutoConfig.from_pretrained(settings.model)
        model: Any = auto.from_config(config, backend="eager", dtype=torch.float32).to(processes.device)
        model.set_backend(settings.backend)
    else:
        model = auto.from_pretrained(
            settings.model, backend=settings.backend, dtype=torch.float32, device_map=processes.device
        )
    if settings.paper_logits or settings.weights == "random":
        initialise_logits(model)
    if settings.lora_rank:
        add_adapters(model, settings.lora_rank)
    check_fit(model.config, processor.tokenizer, processor.image_processor, settings.model)
    return model, processor


def _source(settings: RunSettings, model: SiglipModel, processor: SiglipProcessor, processes: Processes) -> BatchSource:
    length = model.config.text_config.max_position_embeddings
    preparation = Preparation(processor, length, settings.crop_scale, settings.flip)
    shared: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "rank": processes.rank,
        "world": processes.world,
        "num_workers": settings.num_workers,
        "pin_memory": processes.device.type == "cuda",
        "seed": settings.seed,
    }
    if is_shards(settings.data):
        with naming("data"):
            shards = find_shards(settings.data)
        return shard_batches(shards, preparation, shuffle_buffer=settings.shuffle_buffer, **shared)
    with naming("data"):
        samples, skipped = read_captions(settings.data)
    if len(samples) < settings.batch_size:
        left_out = f"; {len(skipped)} are left out, the first: {': '.join(skipped[0])}" if skipped else ""
        supported = f"at most the {len(samples)} captioned images of the data{left_out}"
        raise refusal("batch_size", settings.batch_size, supported)
    return folder_batches(samples, preparation, left_out=skipped if processes.rank == 0 else (), **shared)


@contextmanager
def _termination_noted() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM, which batch systems send, is noted instead of ending the process."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield noted.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noted.set())
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
