"""Bulk embedding end to end, from JPEG files to rows on the disk, beside transformers with a DataLoader.

    python -m bench.embed [--images 256] [--size 768x512] [--layers 12] [--batch-size 32] [--workers 2] [--json]

Both read the same files with as many workers, threads here and processes there, prepare them with the same arithmetic,
and run the same random weights of SigLIP base at 224 pixels, transformers with SDPA and this project with the backend
`auto`, in fp32 on a CPU and bf16 on a GPU. The first round warms up; the others alternate, and their median counts. The
rows are compared before anything is printed. Last comes where this project's time goes, from a run of its own, because
measuring the stages costs their overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.environment import environment
from siglip_model import SiglipConfig, SiglipImageProcessor, SiglipModel
from siglip_model.embed import EmbedSummary, embed_images, load_embeddings

ROUNDS = 3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # length of the difference of unit rows


def write_photos(folder: Path, count: int, width: int, height: int) -> list[str]:
    """Smooth noise, which JPEG compresses about as photos are."""
    from PIL import Image

    draw = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        paths.append(str(folder / f"{number:06}.jpg"))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


class Photos(torch.utils.data.Dataset):
    """A file's pixel values, as a user of transformers prepares them in the workers of a DataLoader."""

    def __init__(self, paths: Sequence[str], processor: Any) -> None:
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


@torch.no_grad()
def with_transformers(
    model: Any, processor: Any, paths: Sequence[str], out: Path, batch_size: int, workers: int
) -> torch.Tensor:
    """The rows, which are also saved."""
    from safetensors.torch import save_file

    on_gpu = model.device.type == "cuda"
    photos = Photos(paths, processor)
    loader = torch.utils.data.DataLoader(photos, batch_size, num_workers=workers, pin_memory=on_gpu)
    rows = []
    for pixel_values in loader:
        pixel_values = pixel_values.to(model.device, model.dtype, non_blocking=on_gpu)
        embeds = model.get_image_features(pixel_values=pixel_values).pooler_output.float()
        rows.append(torch.nn.functional.normalize(embeds, dim=-1).cpu())
    save_file({"embeddings": torch.cat(rows)}, out)
    return torch.cat(rows)


def compare(
    images: int, size: tuple[int, int], layers: int, batch_size: int, workers: int, device: torch.device
) -> dict[str, Any]:
    """Images/s of both, and this project's profile. Raises ValueError where their rows differ."""
    import transformers

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes: dict[str, Any] = {"vision_config": {"num_hidden_layers": layers}, "text_config": {"num_hidden_layers": 1}}
    torch.manual_seed(0)
    ours = SiglipModel(SiglipConfig(**sizes), backend="auto").to(device, dtype).eval()
    theirs: Any = transformers.SiglipModel(transformers.SiglipConfig(**sizes)).eval()
    theirs.to(device, dtype)
    theirs.load_state_dict(ours.state_dict())
    our_processor, their_processor = SiglipImageProcessor(), transformers.SiglipImageProcessor()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_photos(folder, images, *size)
        out, other = folder / "ours.safetensors", folder / "theirs.safetensors"

        def embed(profile: bool = False) -> EmbedSummary:
            return embed_images(
                ours,
                our_processor,
                paths,
                out,
                batch_size=batch_size,
                num_workers=workers,
                overwrite=True,
                profile=profile,
            )

        contenders: dict[str, Callable[[], Any]] = {
            "siglip_model": embed,
            "transformers": lambda: with_transformers(theirs, their_processor, paths, other, batch_size, workers),
        }
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(1 + ROUNDS):
            for contender, run in contenders.items():
                started = time.perf_counter()
                run()
                seconds[contender].append(time.perf_counter() - started)
        rows, expected = load_embeddings(out), with_transformers(theirs, their_processor, paths, other, batch_size, 0)
        difference = (rows.embeddings - expected).norm(dim=1).max().item()
        if rows.files != paths or not difference < TOLERANCE[dtype]:
            raise ValueError(f"the rows of both differ by {difference:.2e}; supported: less than {TOLERANCE[dtype]}")
        report = embed(profile=True).profile
    assert report is not None
    rates = {contender: images / statistics.median(times[1:]) for contender, times in seconds.items()}
    stages = ("list", "decode", "copy", "compute", "write", "rest")
    return {
        "images": images,
        "size": f"{size[0]}x{size[1]}",
        "layers": layers,
        "batch_size": batch_size,
        "workers": workers,
        "backend": ours.backend,
        "dtype": str(dtype).removeprefix("torch."),
        "images_per_second": rates,
        "speed_up": rates["siglip_model"] / rates["transformers"],
        "difference": difference,
        "shares": {stage: getattr(report, stage) / report.total for stage in stages},
        "bound_by": report.bound_by,
    }


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and min(int(width), int(height)) >= 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT of at least 16 pixels")
    return int(width), int(height)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.embed", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=_size, default=(768, 512), metavar="WIDTHxHEIGHT")
    parser.add_argument("--layers", type=int, default=12, help="of the vision tower; 12 in SigLIP base")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=max(2, min(8, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one row with its environment")
    chosen = parser.parse_args(arguments)
    row = compare(chosen.images, chosen.size, chosen.layers, chosen.batch_size, chosen.workers, chosen.device)
    if chosen.json:
        print(json.dumps({**row, "environment": environment()}))
        return 0
    for contender, rate in row["images_per_second"].items():
        print(f"{contender:<14} {rate:8.1f} images/s")
    print(f"speed-up {row['speed_up']:.2f}x; rows differ by {row['difference']:.1e}")
    print(", ".join(f"{stage} {share:.0%}" for stage, share in row["shares"].items()))
    print(f"bound by {row['bound_by']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
