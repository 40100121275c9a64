"""Bulk embedding end to end, from JPEG files to rows on the disk: this project beside transformers with a DataLoader.

Both read the same files with as many workers, threads here and processes there, prepare them with the same arithmetic,
run the same weights in the same batches, and save unit rows. A contender returns its rows, which are judged.

The process is set up as `siglip embed` sets up its own, for both; OMP_WAIT_POLICY=PASSIVE is left to whoever starts it,
because PyTorch reads it when it is imported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.cases.operations import Contender, Setting, image_processor, model_setting, project_model
from bench.cases.shapes import EmbedShape
from bench.peers.cpu import BF16
from bench.peers.models import transformers_model
from bench.peers.registry import Missing, peer, selecting
from siglip_model.cli.process import keep_freed_memory
from siglip_model.embed import embed_images
from siglip_model.embed.file import open_embedding_file
from siglip_model.embed.profile import ProfileReport

if TYPE_CHECKING:
    from PIL import Image

STAGES = ("list", "decode", "copy", "compute", "write", "rest")


def _shape(setting: Setting) -> EmbedShape:
    assert isinstance(setting.shape, EmbedShape)
    return setting.shape


def _project(backend: str, dtype: torch.dtype | None = None) -> Callable[[Setting], Contender]:
    def load(setting: Setting) -> Contender:
        keep_freed_memory()
        shape = _shape(setting)
        processor = image_processor(shape.model)
        model: Any = project_model(model_setting(setting), backend, dtype)
        folder = tempfile.TemporaryDirectory()  # deleted with the contender

        def embed(paths: list[str], profile: bool = False) -> Any:
            return embed_images(
                model,
                processor,
                paths,
                Path(folder.name) / "rows.safetensors",
                batch_size=shape.batch,
                num_workers=shape.workers,
                overwrite=True,
                profile=profile,
            )

        def rows(paths: list[str]) -> Tensor:
            with open_embedding_file(embed(paths).out) as file:
                return file.embeddings()

        contender = Contender(rows, environment=selecting("triton") if backend == "triton" else {})
        with contender.active():
            paths = setting.inputs().constants["paths"]
            embed(paths[: shape.batch])  # what only a first run does is in no stage
            contender.note = describe(embed(paths, profile=True).profile)
        return contender

    return load


def describe(report: ProfileReport) -> str:
    """The stages of a run of its own, because measuring them costs their overlap."""
    shares = ", ".join(f"{stage} {getattr(report, stage) / report.total:.0%}" for stage in STAGES)
    return f"{shares}; bound by {report.bound_by}"


peer("embed", "triton", package="triton", cuda=True)(_project("triton"))
peer("embed", "siglip_model:sdpa")(_project("sdpa"))
peer("embed", "siglip_model:sdpa:bf16", cpu=True, dtypes=("fp32",), **BF16)(_project("sdpa", torch.bfloat16))


class Photos(torch.utils.data.Dataset):
    """Files as images in RGB. Its `prepare` is the DataLoader's collate_fn: of the ways to call transformers' processor
    in a worker, a batch at a time takes the least time."""

    def __init__(self, paths: Sequence[str], processor: Any) -> None:
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return image.convert("RGB")

    def prepare(self, images: list[Image.Image]) -> Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"]


@peer("embed", "transformers:sdpa", package="transformers", install="pip install 'transformers>=5.17'")
def transformers_with_a_loader(setting: Setting) -> Contender:
    import transformers
    from safetensors.torch import save_file

    try:
        import torchvision  # noqa: F401
    except ImportError:
        raise Missing("pip install torchvision  # for transformers' SiglipImageProcessor") from None
    keep_freed_memory()
    shape, on_gpu = _shape(setting), setting.device == "cuda"
    model: Any = transformers_model(model_setting(setting), "sdpa")
    processor = transformers.SiglipImageProcessor(size=image_processor(shape.model).size)
    folder = tempfile.TemporaryDirectory()

    def rows(paths: list[str]) -> Tensor:
        photos = Photos(paths, processor)
        loader = torch.utils.data.DataLoader(
            photos, shape.batch, num_workers=shape.workers, collate_fn=photos.prepare, pin_memory=on_gpu
        )
        found = []
        for pixel_values in loader:
            pixel_values = pixel_values.to(model.device, model.dtype, non_blocking=on_gpu)
            embeds = model.get_image_features(pixel_values=pixel_values).pooler_output.float()
            found.append(torch.nn.functional.normalize(embeds, dim=-1).cpu())
        save_file({"embeddings": torch.cat(found)}, Path(folder.name) / "rows.safetensors")
        return torch.cat(found)

    return Contender(rows, note=f"with a DataLoader of {shape.workers} processes, whose memory does not count")
