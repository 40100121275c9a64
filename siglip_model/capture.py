"""CUDA graphs: a forward pass is recorded once and replayed, which removes the launch overhead of small batches.

The models' `capture` returns these objects. A graph reads and writes tensors at fixed addresses: a call copies its
arguments there, replays, and returns copies of the results. A graph has one shape; weights may change in place but not
move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from siglip_kernels import MissingBackendError
from siglip_kernels.errors import unsupported
from siglip_model.backends import BACKENDS, Backend
from siglip_model.outputs import BaseModelOutputWithPooling, SiglipOutput

if TYPE_CHECKING:
    from siglip_model.pretrained import PreTrainedModel

_WARM_UPS = 3  # compilation, autotuning and allocation of workspaces must not happen during the capture

Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Runs a function of tensors with fixed addresses; returns its results and a function that recomputes them in place."""


class CudaGraphRecorder:
    """Records CUDA graphs that share one memory pool, so they must never be replayed concurrently."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        # A stream of its own. By default `torch.cuda.graph` uses one stream of the process: it may belong to another
        # device, and the end of a graph frees cuBLAS's workspace of that stream, which other graphs captured on it
        # still use (pytorch/pytorch#193402). Not the stream of the warm-ups, whose workspace lies outside the pool.
        self.stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), _autocast_without_cache(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    function()
            torch.cuda.current_stream().wait_stream(side)
            # thread_local: a data loader's thread may use the device during the capture.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                results = function()
        return results, graph.replay


def _autocast_without_cache(device: torch.device) -> torch.autocast:
    """The current autocast without its weight cache, which would free cast weights that a graph still reads."""
    kind = device.type
    enabled = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled, cache_enabled=False)


class Weights:
    """The weights that a graph reads. Keeps them alive and detects that the model has others now."""

    def __init__(self, modules: Iterable[torch.nn.Module]):
        self._tensors = [
            (owner, name, tensor.detach(), tensor.data_ptr())
            for module in modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]

    def moved(self) -> str | None:
        """The name of a tensor that the model no longer has at its address."""
        for owner, name, _, address in self._tensors:
            tensor = owner.get(name)
            if tensor is None or tensor.data_ptr() != address:
                return name
        return None

    def check(self) -> None:
        if (name := self.moved()) is not None:
            raise RuntimeError(
                f"the model's weights were moved or replaced after `capture` (one named {name!r}); "
                "call capture again (loading values in place needs no new capture)"
            )


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise unsupported("capture", name, f"is {size!r}", "integers from 1")


def recorder_of(model: PreTrainedModel, **sizes: int) -> CudaGraphRecorder:
    """A recorder for the model. Raises if it, or one of the sizes, cannot be captured."""
    check_sizes(**sizes)
    if model.training:
        raise unsupported("capture", "the model", "is in training mode", "evaluation mode: model.eval()")
    if model.device.type != "cuda":
        raise MissingBackendError(
            f"capture: the model is on {model.device}, and CUDA graphs need a CUDA device: model.to('cuda'); "
            "elsewhere call the model itself"
        )
    return CudaGraphRecorder(model.device)


def buffer_of(model: PreTrainedModel, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
        return torch.zeros(shape, dtype=dtype, device=model.device)


def _check(name: str, tensor: Any, buffer: Tensor) -> None:
    """Raises ValueError unless the tensor can be copied to `buffer`, apart from its dtype."""
    if not isinstance(tensor, Tensor):
        raise refused(name, f"is {type(tensor).__name__}", "a tensor")
    if tensor.shape != buffer.shape:
        raise refused(name, f"has shape {tuple(tensor.shape)}", f"{tuple(buffer.shape)}; capture again for another")
    if tensor.device != buffer.device:
        raise refused(name, f"is on {tensor.device}", f"{buffer.device}")


def refused(name: str, got: str, supported: str) -> Exception:
    return unsupported("captured model", name, got, supported)


class Recording:
    """A recorded function with the tensors that it reads and returns."""

    def __init__(self, function: Callable[..., Any], inputs: dict[str, Tensor], record: Recorder):
        self.inputs = inputs
        with torch.inference_mode(False), torch.no_grad():
            self.results, self._replay = record(lambda: function(**inputs))

    def replay(self, **given: Tensor) -> None:
        with torch.no_grad():
            for name, tensor in given.items():
                self.inputs[name].copy_(tensor)
            self._replay()

    def copy_results(self) -> Any:
        """Copies of what the last replay computed, which the next one does not overwrite."""
        return pytree.tree_map_only(Tensor, torch.clone, self.results)


class Captured:
    """Base of the captured models."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise refused(
            "a copy or pickle", "is asked for, and a graph has fixed addresses", "a copy of the model, captured again"
        )


class CapturedVision(Captured):
    """A vision tower, or an image classifier, for images of one shape: `captured(pixel_values)`."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int,
        image_size: int | tuple[int, int] | None,
        record: Recorder | None = None,
    ):
        config = getattr(model.config, "vision_config", model.config)
        size = config.image_size if image_size is None else image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        record = record or recorder_of(model, batch_size=batch_size, image_height=height, image_width=width)
        dtype = model.get_input_embeddings().weight.dtype
        pixels = buffer_of(model, (batch_size, config.num_channels, height, width), dtype)

        def encode(pixel_values: Tensor) -> Any:
            return model(pixel_values, interpolate_pos_encoding=image_size is not None, return_dict=True)

        self._weights = Weights(model.modules())
        self.recording = Recording(encode, {"pixel_values": pixels}, record)

    def replay(self, pixel_values: Tensor) -> None:
        buffer = self.recording.inputs["pixel_values"]
        _check("pixel_values", pixel_values, buffer)
        if not pixel_values.is_floating_point():
            raise refused("pixel_values", f"has dtype {pixel_values.dtype}", "floating point")
        self.recording.replay(pixel_values=pixel_values)
        self._weights.check()  # after the launch, so that it overlaps with the GPU's work

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Any:
        """pixel_values: floating point, of the captured shape, cast to the weights' dtype. Returns as the model."""
        self.replay(pixel_values)
        return self.recording.copy_results()


class CapturedText(Captured):
    """A text tower for texts of one shape: `captured(input_ids)`, or `captured(input_ids, attention_mask)`."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int,
        text_length: int | None,
        attention_mask: bool,
        record: Recorder | None = None,
    ):
        length = model.config.max_position_embeddings if text_length is None else text_length
        record = record or recorder_of(model, batch_size=batch_size, text_length=length)
        ops: Backend = model.ops  # type: ignore[assignment]
        if attention_mask and ops.masks_sync:
            got = f"is True with the backend {ops.name}, whose masked attention makes the host wait for the GPU"
            supported = ", ".join(name for name, backend in BACKENDS.items() if not backend.masks_sync)
            raise unsupported("capture", "attention_mask", got, f"True with {supported}")
        ids = buffer_of(model, (batch_size, length), torch.int64)
        # A backend may read a mask's values, which a graph cannot: the converted mask is the graph's input.
        self._convert_mask = ops.attention_mask
        self._no_padding = self._convert_mask(ids + 1) if attention_mask else {}

        def encode(input_ids: Tensor, **mask: Tensor) -> Any:
            return model(input_ids, mask or None, return_dict=True)

        self._weights = Weights(model.modules())
        mask = {name: buffer_of(model, tensor.shape, tensor.dtype) for name, tensor in self._no_padding.items()}
        self.recording = Recording(encode, {"input_ids": ids, **mask}, record)

    def replay(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        buffer = self.recording.inputs["input_ids"]
        _check("input_ids", input_ids, buffer)
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise refused("input_ids", f"has dtype {input_ids.dtype}", "int64, int32")
        mask = self._no_padding
        if attention_mask is not None:
            if not mask:
                raise refused("attention_mask", "is given", "none, or capture(..., attention_mask=True)")
            _check("attention_mask", attention_mask, buffer)
            mask = self._convert_mask(attention_mask)
        self.recording.replay(input_ids=input_ids, **mask)
        self._weights.check()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """input_ids: int64 or int32 of the captured shape; attention_mask: of that shape, if captured with one."""
        self.replay(input_ids, attention_mask)
        return self.recording.copy_results()


class CapturedSiglip(Captured):
    """A SiglipModel for images of one shape and texts of one shape, together or separately."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int,
        text_batch_size: int | None,
        image_size: int | tuple[int, int] | None,
        text_length: int | None,
        attention_mask: bool,
        record: Recorder | None = None,
        *,
        compare: Callable[[Any, Any], SiglipOutput],  # SiglipModel.compare
    ):
        def capture_vision(record: Recorder) -> CapturedVision:
            tower: Any = model.vision_model
            return CapturedVision(tower, batch_size, image_size, record)

        self._capture(model, capture_vision, batch_size, text_batch_size, text_length, attention_mask, record, compare)

    def _capture(
        self,
        model: PreTrainedModel,
        capture_vision: Callable[[Recorder], Any],
        batch_size: int,
        text_batch_size: int | None,
        text_length: int | None,
        attention_mask: bool,
        record: Recorder | None,
        compare: Callable[[Any, Any], SiglipOutput],
    ) -> None:
        text_model: PreTrainedModel = model.text_model  # type: ignore[assignment]
        texts = batch_size if text_batch_size is None else text_batch_size
        record = record or recorder_of(model, batch_size=batch_size, text_batch_size=texts)
        self._vision = capture_vision(record)
        self._text = CapturedText(text_model, texts, text_length, attention_mask, record)
        self._weights = Weights([model])  # its own parameters: the towers check theirs
        vision, text = self._vision.recording.results, self._text.recording.results
        self._comparison = Recording(lambda: compare(vision, text), {}, record)

    @torch.no_grad()
    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """See the model's. pixel_values: floating point, of the captured shape, cast to the weights' dtype."""
        return self._vision(pixel_values)

    @torch.no_grad()
    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """See the model's. input_ids: int64 or int32 of the captured shape; attention_mask: if captured with one."""
        return self._text(input_ids, attention_mask)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> SiglipOutput:
        """See the model's forward; without loss."""
        self._vision.replay(pixel_values)
        self._text.replay(input_ids, attention_mask)
        return self._compare_towers()

    def _compare_towers(self) -> SiglipOutput:
        self._comparison.replay()
        self._weights.check()
        return self._comparison.copy_results()
