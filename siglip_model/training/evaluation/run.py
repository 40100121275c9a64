"""Evaluate a model on a folder or on shards, by the task that the data suits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from siglip_model.images.files import list_images
from siglip_model.model import SiglipModel
from siglip_model.processor import SiglipProcessor
from siglip_model.text.prompts import TEMPLATE
from siglip_model.training.captions import captions_files, read_captions
from siglip_model.training.evaluation.encoder import Encoder
from siglip_model.training.evaluation.retrieval import Pair, retrieval_recall
from siglip_model.training.evaluation.zero_shot import find_classes, zero_shot_accuracy
from siglip_model.training.processes import Processes
from siglip_model.training.shards import (
    find_shards,
    is_shards,
    read_shard,
    sample_captions,
    sample_image,
    sample_name,
)
from siglip_model.training.skipped import Skipped


def evaluate_on(
    data: str,
    model: SiglipModel,
    processor: SiglipProcessor,
    *,
    templates: Sequence[str] | None = None,
    batch_size: int = 64,
    processes: Processes,
    on_failure: Callable[[Skipped], None] = lambda failure: None,
) -> dict[str, Any]:
    """Retrieval over shards or a captioned folder, zero-shot accuracy over a folder with a folder per class.

    templates: of zero-shot prompts, by default TEMPLATE. Each rank evaluates a share; the result is that of all.
    on_failure: called with the samples of this rank that cannot be read. Raises ValueError for data of neither kind and
    for templates beside captions.
    """
    encoder = Encoder(model, processor, batch_size)
    samples = captioned_samples(data, processes)
    if samples is None:
        return zero_shot_accuracy(encoder, find_classes(data), templates or (TEMPLATE,), processes, on_failure)
    if templates is not None:
        raise ValueError(
            f"template (--template) is {templates[0]!r}, but {data} has captions, which are used as they are; "
            "supported: templates for a folder of classes"
        )
    return retrieval_recall(encoder, samples, processes, on_failure)


def check_data(data: str) -> None:
    """Raises what `evaluate_on` would raise for data of neither kind, that is not there, or that holds no sample."""
    if is_shards(data):
        alone, skipped = Processes(torch.device("cpu")), []
        for sample in _of_shards(find_shards(data), alone):
            if isinstance(sample, Pair):
                return
            skipped.append(sample)
        first = f"; the first of {len(skipped)}: {': '.join(skipped[0])}" if skipped else ""
        raise ValueError(f"{data}: no captioned image can be read{first}")
    if is_captioned(data):
        read_captions(data)
    elif next(list_images(find_classes(data)), None) is None:
        raise ValueError(f"{data}: no folder of a class holds an image")


def captioned_samples(data: str, processes: Processes) -> Iterator[Pair | Skipped] | None:
    """This rank's share of shards or of a captioned folder; None for another folder."""
    if is_shards(data):
        return _of_shards(find_shards(data), processes)
    return _of_folder(data, processes) if is_captioned(data) else None


def is_captioned(folder: str) -> bool:
    """Whether a folder holds a captions file, or a name.txt beside an image. Raises NotADirectoryError."""
    tables = captions_files(Path(folder))
    return bool(tables) or any(Path(image).with_suffix(".txt").is_file() for image in list_images([folder]))


def _of_folder(folder: str, processes: Processes) -> Iterator[Pair | Skipped]:
    samples, skipped = read_captions(folder)
    if processes.rank == 0:
        yield from skipped
    for image, captions in samples[processes.rank :: processes.world]:
        yield Pair(image, image, list(captions))


def _of_shards(shards: Sequence[str], processes: Processes) -> Iterator[Pair | Skipped]:
    """Every rank reads all shards and decodes its share, so that few shards serve many ranks."""
    broken: list[Skipped] = []
    number = 0
    for shard in shards:
        for sample in read_shard(shard, broken.append):
            number += 1
            if number % processes.world == processes.rank:
                name = sample_name(sample)
                try:
                    yield Pair(name, sample_image(sample), sample_captions(sample))
                except Exception as error:  # decoders raise many types
                    yield Skipped(name, str(error).removeprefix(f"{name}: "))
        if processes.rank == 0:
            yield from broken
        broken.clear()
