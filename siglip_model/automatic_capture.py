"""CUDA graphs for callers that repeat a shape, such as `pipeline` and `embed_images`, without a call of `capture`.

At small batch sizes inference is bound by launch overhead. The forward pass of a vision tower is recorded once a shape
has repeated, and replayed as long as the model is what was recorded. Everything else calls the model.
"""

from __future__ import annotations

import operator
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from siglip_model.capture import CudaGraphRecorder, Recorder, Recording, Weights, buffer_of
from siglip_model.naflex.capture import NaFlexRecording, Sizes
from siglip_model.naflex.layout import Layout

if TYPE_CHECKING:
    from siglip_model.pretrained import PreTrainedModel

REPEATS = 3  # calls with a shape before it is recorded, which takes as long as about four calls
MOST_GRAPHS = 4  # shapes; each graph keeps the memory of one forward pass


class CapturesRepeats:
    """`encode(pixel_values)` returns what `model.get_image_features(pixel_values)`, or another method, returns.

    So does `encode(pixel_values, pixel_attention_mask=, spatial_shapes=)` of images at native resolution, whose batches
    share a graph if they have about as many images and patches, and spatial_shapes is on the CPU.

    On a CUDA device, in evaluation mode and without gradients, a shape that repeats is replayed from a CUDA graph. It
    is recorded again if the model has changed: weights that moved, another backend or setting, replaced modules. A
    model with hooks, which a graph would not call, is never recorded; where recording fails, a warning says so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str = "get_image_features",
        recorder: Callable[[torch.device], Recorder] | None = None,  # a stand-in for CUDA graphs
    ):
        self._model = model
        self._method = method
        self._recorder = recorder
        self._lock = threading.Lock()  # a graph has one set of inputs and results
        self._forget()

    def __reduce__(self) -> Any:
        return type(self), (self._model, self._method)

    def _forget(self) -> None:
        self._form: _Form | None = None  # of the model that was counted and recorded
        self._graphs: dict[Any, Recording | NaFlexRecording] = {}
        self._calls: Counter[Any] = Counter()
        self._failed = False

    def __call__(self, pixel_values: Tensor, **others: Tensor) -> Any:
        sizes = _sizes(pixel_values, **others) if self._may_capture(pixel_values) else None
        if sizes is None:
            return self._call(pixel_values, **others)
        key = (sizes, pixel_values.dtype, _context(pixel_values.device))
        with self._lock:
            graph = self._graphs.get(key)
            if graph is not None:
                graph.replay(pixel_values=pixel_values, **others)
                if self._form is not None and self._form.holds():  # after the launch, to overlap with the GPU's work
                    return graph.copy_results()
            return self._call_and_count(key, pixel_values, others)

    def _call(self, pixel_values: Tensor, **others: Any) -> Any:
        return getattr(self._model, self._method)(pixel_values, **others)

    def _may_capture(self, pixel_values: Tensor) -> bool:
        model = self._model
        return (
            (pixel_values.device.type == "cuda" or self._recorder is not None)
            and pixel_values.device == model.device
            and pixel_values.is_floating_point()
            and not model.training
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not (_module._global_forward_hooks or _module._global_forward_pre_hooks)
        )

    def _call_and_count(self, key: Any, pixel_values: Tensor, others: dict[str, Tensor]) -> Any:
        if self._form is None or not self._form.holds():
            self._forget()
            self._form = _Form(self._model, self._method)
        self._calls[key] += 1
        result = self._call(pixel_values, **others)
        repeats = self._calls[key] >= REPEATS and len(self._graphs) < MOST_GRAPHS
        if repeats and self._form.may_be_recorded and not self._failed:
            self._record(key, pixel_values)
        return result

    def _record(self, key: Any, pixel_values: Tensor) -> None:
        record = (self._recorder or CudaGraphRecorder)(pixel_values.device)
        try:
            self._graphs[key] = self._recording(key[0], pixel_values.dtype, record)
        except RuntimeError as error:  # also out of memory
            self._failed = True
            warnings.warn(
                f"images of shape {tuple(pixel_values.shape)} could not be recorded into a CUDA graph, so the model is "
                f"called, which is slower for small batches: {error}",
                stacklevel=4,
            )

    def _recording(self, sizes: Any, dtype: torch.dtype, record: Recorder) -> Recording | NaFlexRecording:
        if not isinstance(sizes, Sizes):
            return Recording(self._call, {"pixel_values": buffer_of(self._model, sizes, dtype)}, record)

        def call(pixel_values: Tensor, where: Layout, spatial_shapes: Tensor) -> Any:
            return self._call(pixel_values, pixel_attention_mask=where, spatial_shapes=spatial_shapes)

        return NaFlexRecording(call, self._model, sizes, dtype, record)


def _sizes(pixel_values: Tensor, **others: Tensor) -> Sizes | tuple[int, ...] | None:
    """Those of a recording for this batch; None: it cannot be recorded."""
    if not others:
        return tuple(pixel_values.shape)
    shapes = others.get("spatial_shapes")
    return None if shapes is None or shapes.device.type != "cpu" else Sizes.around(pixel_values, shapes)


def _context(device: torch.device) -> tuple[Any, ...]:
    """What else a recording depends on: the stream on which it is replayed, and autocast."""
    kind = device.type
    stream = torch.cuda.current_stream(device).cuda_stream if kind == "cuda" else 0
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return stream, autocast


class _Form:
    """What a recording of a model depends on: its modules, their settings, and the weights, which this keeps alive."""

    def __init__(self, model: nn.Module, method: str):
        self._method = vars(model), method, vars(model).get(method)
        self._modules = [(module, _state(module)) for module in model.modules()]
        tensors = (
            tensor
            for module in model.modules()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        )
        plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)  # others may have no address
        self._weights = Weights(model.modules()) if plain else None

    @property
    def may_be_recorded(self) -> bool:
        """False with hooks, which a graph would not call."""
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module, _ in self._modules)
        return self._weights is not None and not hooked

    def holds(self) -> bool:
        """Whether the model is as it was. Takes the host about a millisecond for 600 modules."""
        owner, method, function = self._method
        return (
            owner.get(method) is function
            and all(_are_same(_state(module), state) for module, state in self._modules)
            and (self._weights is None or self._weights.moved() is None)
        )


def _state(module: nn.Module) -> list[Any]:
    """Class, children, number of hooks and attributes, such as the backend, `eps` and the configuration's fields."""
    attributes = module.__dict__
    config = attributes.get("config")
    state = [
        module.__class__,
        len(attributes["_forward_hooks"]),
        len(attributes["_forward_pre_hooks"]),
        *attributes["_modules"].values(),
        *attributes.values(),
    ]
    return state if config is None else [*state, *getattr(config, "__dict__", {}).values()]


def _are_same(state: list[Any], other: list[Any]) -> bool:
    """Whether both hold the same objects: a setting, such as a tensor, may not compare."""
    return len(state) == len(other) and all(map(operator.is_, state, other))
