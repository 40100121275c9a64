"""The way of a batch to the device and back, beside the device's computation. On a CPU nothing is to be overlapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from siglip_kernels import resize_normalize
from siglip_kernels.device import kernels_run_on
from siglip_model.images.model_inputs import Inputs
from siglip_model.images.tensor import SiglipImageProcessor


class Transfers:
    """Copies to a CUDA device from pinned memory on a stream of its own, and back without waiting.

    The host then prepares the next batch while the device computes this one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.batches_behind = 0 if device.type != "cuda" else 1  # on the device, while the host goes on
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors on the device, in the order of its computation."""
        if self._stream is None:
            return [tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            copies = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)  # its memory was taken on the other stream
        return copies

    def fetch(self, rows: Tensor) -> Callable[[], Tensor]:
        """Starts the way back; calling the result waits for the rows, and gives them on the CPU."""
        if self._stream is None:
            return rows.cpu
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))

        def wait() -> Tensor:
            event.synchronize()
            return host

        return wait


class Preparation:
    """The model's inputs of images in uint8 (1, 3, height, width): resized and normalised on the device, in `dtype`.

    The arithmetic is that of the image processor on that device: levels are rounded once after resizing, where on the
    CPU they are rounded after each of both passes. On a GPU that runs the kernels it is one launch per image,
    elsewhere, and for steps that the kernel lacks, the processor's operations in PyTorch.
    """

    def __init__(self, transfers: Transfers, image_processor: SiglipImageProcessor, dtype: torch.dtype) -> None:
        self._transfers, self._image_processor, self._dtype = transfers, image_processor, dtype
        device = transfers.device
        fused = device.type == "cuda" and kernels_run_on(device)
        # Made once: a copy from memory that is not pinned would wait for the model
        self._steps = image_processor.fused_steps(device) if fused else None

    def __call__(self, images: Sequence[Inputs]) -> Inputs:
        levels = self._transfers.put([image["pixel_values"][0] for image in images])
        if self._steps is not None:
            return {"pixel_values": resize_normalize(levels, **self._steps, dtype=self._dtype)}
        options = {"device": self._transfers.device, "input_data_format": "channels_first", "return_tensors": "pt"}
        return {"pixel_values": self._image_processor(images=levels, **options)["pixel_values"].to(self._dtype)}
