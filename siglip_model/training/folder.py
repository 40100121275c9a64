"""Batches of a captioned folder. Their order depends on the seed alone, not on the number of processes or workers."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset

from siglip_model.images.files import load_image
from siglip_model.training.batch import Batch, BatchSource, seed_of
from siglip_model.training.captions import Captioned
from siglip_model.training.loader import load_batches
from siglip_model.training.preparation import Preparation, Prepared, collate
from siglip_model.training.skipped import Skipped

MOST_TRIES = 100  # broken images in a row before the run ends


def folder_batches(
    samples: Sequence[Captioned],
    preparation: Preparation,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    seed: int = 0,
    left_out: Sequence[Skipped] = (),
) -> BatchSource:
    """The source of this rank's share, batch_size // world pairs, of each batch.

    A pair's number, counted from the start of training, decides everything about it: its epoch, and so the order of the
    images, its caption and its augmentation. A position is a digest of the samples: others than before are used with a
    warning. left_out: samples to report with the first batch.
    """
    digest = hashlib.sha256("\n".join(map(repr, samples)).encode()).hexdigest()

    def batches(first: int, position: Any) -> Generator[Batch, None, None]:
        if position is not None and position != digest:
            warnings.warn("data: images or captions are not those of the saved run, nor is their order", stacklevel=2)
        found = load_batches(
            _Pairs(samples, preparation, seed),
            batch_sampler=_numbers(first, batch_size, rank, world),
            collate_fn=_collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        before = left_out
        for batch in found:
            yield replace(batch, skipped=(*before, *batch.skipped), position=digest)
            before = ()

    return batches


def _numbers(first: int, batch_size: int, rank: int, world: int) -> Iterator[range]:
    """The numbers of this rank's pairs, by batch."""
    share = batch_size // world
    while True:
        start = first * batch_size + rank * share
        yield range(start, start + share)
        first += 1


class _Pairs(Dataset[Any]):
    """Number -> the pair, and the samples that were broken: another one, drawn at random, takes their place.

    Or the error that ends the run, if too many are.
    """

    def __init__(self, samples: Sequence[Captioned], preparation: Preparation, seed: int) -> None:
        self.samples, self.preparation, self.seed = samples, preparation, seed
        self.epoch, self.order = -1, torch.empty(0)

    def __getitem__(self, number: int) -> tuple[Prepared, list[Skipped]] | ValueError:
        epoch, place = divmod(number, len(self.samples))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.samples), generator=generator)
        index = int(self.order[place])
        seed = f"{self.seed} {number}"
        chance = random.Random(f"{seed} instead")
        skipped: list[Skipped] = []
        while len(skipped) < MOST_TRIES:
            path, captions = self.samples[index]
            try:
                return self.preparation(path, load_image(path), captions, seed), skipped
            except Exception as error:  # decoders raise many types
                skipped.append(Skipped(path, str(error).removeprefix(f"{path}: ")))
            index = chance.randrange(len(self.samples))
        return ValueError(f"data: {MOST_TRIES} images in a row are broken; the last: {': '.join(skipped[-1])}")


def _collate(found: Sequence[Any]) -> Batch | ValueError:
    errors = [one for one in found if isinstance(one, ValueError)]
    if errors:
        return errors[0]
    return collate([pair for pair, _ in found], [one for _, skipped in found for one in skipped])
