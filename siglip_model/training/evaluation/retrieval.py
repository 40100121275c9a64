"""Image-text retrieval over captioned data: of how many the right partner is among the k best.

Embeddings go to a temporary file, and similarities are computed in blocks: memory holds a few numbers per sample.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from siglip_model.training.evaluation.encoder import Encoder
from siglip_model.training.processes import Processes
from siglip_model.training.skipped import Skipped

BLOCK = 1024  # rows and columns of similarities at a time
RANKS = (1, 5, 10)
SLACK = 1e-6  # scores this near are a tie, which counts as wrong, as NaN does


class Pair(NamedTuple):
    """An image, as `load_image` takes it, and its captions, at least one."""

    name: str
    image: Any
    captions: list[str]


def retrieval_recall(
    encoder: Encoder,
    samples: Iterable[Pair | Skipped],
    processes: Processes,
    on_failure: Callable[[Skipped], None],
) -> dict[str, Any]:
    """R@1, R@5 and R@10, from images to texts, where any own caption is right, and from texts to images.

    The same caption of another image is wrong: fewer `distinct_texts` than `texts` bound the recall.

    samples: this rank's, about as many on each.
    """
    failed = 0

    def readable() -> Iterator[Pair]:
        nonlocal failed
        for sample in samples:
            if isinstance(sample, Skipped):
                failed += 1
                on_failure(sample)
            else:
                yield sample

    def embedded() -> Iterator[tuple[np.ndarray, np.ndarray, list[int], np.ndarray]]:
        nonlocal failed
        for found, vectors in encoder.images(readable(), lambda pair: pair.image, lambda pair: pair.name):
            if isinstance(found, Skipped):
                failed += 1
                on_failure(found)
                continue
            captions = [caption for pair in found for caption in pair.captions]
            counts = [len(pair.captions) for pair in found]
            yield vectors.cpu().numpy(), encoder.texts(captions).cpu().numpy(), counts, _digests(captions)

    with tempfile.TemporaryDirectory() as folder:
        images, texts = _Vectors(Path(folder) / "images"), _Vectors(Path(folder) / "texts")
        owners: list[np.ndarray] = []  # the image of each text
        digests: list[np.ndarray] = []
        own = embedded()
        while any(parts := processes.gather(next(own, None))):
            for vectors, captions, counts, digested in filter(None, parts):
                owners.append(np.repeat(np.arange(images.count, images.count + len(vectors)), counts))
                images.add(vectors)
                texts.add(captions)
                digests.append(digested)
        total_failed = int(processes.sum(failed)[0])
        if images.count == 0:
            raise ValueError("no captioned image could be read")
        owner = torch.from_numpy(np.concatenate(owners))
        of_images, of_texts = ranks_of_partners(images.tensor(), texts.tensor(), owner, encoder.model.device, processes)
    recall = {f"image_to_text_r{k}": float((of_images < k).float().mean()) for k in RANKS}
    recall |= {f"text_to_image_r{k}": float((of_texts < k).float().mean()) for k in RANKS}
    counted = {"images": images.count, "texts": texts.count, "distinct_texts": len(np.unique(np.concatenate(digests)))}
    return {"task": "retrieval", **counted, "failed": total_failed, **recall}


def _digests(captions: list[str]) -> np.ndarray:
    """uint64 (captions,), the same on all ranks, as `hash` is not."""
    digests = [blake2b(caption.encode(), digest_size=8).digest() for caption in captions]
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def ranks_of_partners(
    images: Tensor, texts: Tensor, owner: Tensor, device: torch.device, processes: Processes
) -> tuple[Tensor, Tensor]:
    """How many wrong texts are as near to an image as its nearest own, and how many wrong images to a text as its own.

    images: (N, D); texts: (M, D); owner: int64 (M,), the image of each text. Returns int64 (N,) and (M,).
    """
    own = torch.cat(
        [
            (part * images[owner[start : start + BLOCK]]).sum(1) - SLACK
            for start, part in zip(range(0, len(texts), BLOCK), texts.split(BLOCK), strict=True)
        ]
    )
    best = torch.full((len(images),), -torch.inf).scatter_reduce_(0, owner, own, "amax")
    of_images, of_texts = torch.zeros(len(images), dtype=torch.int64), torch.zeros(len(texts), dtype=torch.int64)
    for start in range(processes.rank * BLOCK, len(images), processes.world * BLOCK):
        rows = slice(start, min(start + BLOCK, len(images)))
        block, numbers = images[rows].to(device), torch.arange(rows.start, rows.stop, device=device)
        for first in range(0, len(texts), BLOCK):
            columns = slice(first, first + BLOCK)
            scores = block @ texts[columns].to(device).T
            scores.masked_fill_(owner[columns].to(device) == numbers[:, None], -torch.inf)
            of_images[rows] += (~(scores < best[rows, None].to(device))).sum(1).cpu()
            of_texts[columns] += (~(scores < own[columns].to(device))).sum(0).cpu()
    return _summed(of_images, processes), _summed(of_texts, processes)


def _summed(counts: Tensor, processes: Processes) -> Tensor:
    if processes.control is not None:
        torch.distributed.all_reduce(counts, group=processes.control)
    return counts


class _Vectors:
    """Rows of fp32 in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.count, self.width = path, 0, 0

    def add(self, rows: np.ndarray) -> None:
        with open(self.path, "ab") as file:
            file.write(np.ascontiguousarray(rows, dtype=np.float32).tobytes())
        self.count, self.width = self.count + len(rows), rows.shape[1]

    def tensor(self) -> Tensor:
        """Mapped from the file, (count, width)."""
        size = self.count * self.width
        return torch.from_file(str(self.path), shared=False, size=size, dtype=torch.float32).view(
            self.count, self.width
        )
