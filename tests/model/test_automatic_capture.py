"""Shapes that repeat are replayed from a graph, as long as the model is the one that was recorded. Without a GPU, a
recorder that reruns the function replaces the graph."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import TINY_VISION, randomised
from rerun_recorder import RerunRecorder
from torch import nn

import siglip_model
from siglip_model.automatic_capture import MOST_GRAPHS, REPEATS, CapturesRepeats

CONFIG = siglip_model.SiglipVisionConfig(**{**TINY_VISION, "num_hidden_layers": 1})


@pytest.fixture
def recorder() -> RerunRecorder:
    return RerunRecorder()


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return randomised(siglip_model.SiglipVisionModel(CONFIG)).eval()


def pixels(count: int = 1, seed: int = 0) -> torch.Tensor:
    size = CONFIG.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def calls(encode: CapturesRepeats, count: int, images: int = 1) -> list[torch.Tensor]:
    return [encode(pixels(images, seed)).pooler_output for seed in range(count)]


@torch.no_grad()
def expected(model: Any, count: int, images: int = 1) -> list[torch.Tensor]:
    return [model(pixels(images, seed)).pooler_output for seed in range(count)]


def test_a_shape_is_recorded_when_it_has_repeated(model: Any, recorder: RerunRecorder) -> None:
    results = calls(CapturesRepeats(model, "__call__", lambda device: recorder), REPEATS + 2)
    assert (recorder.recorded, recorder.replays) == (1, 2)
    assert all(torch.equal(*pair) for pair in zip(results, expected(model, REPEATS + 2), strict=True))


def test_each_shape_has_its_graph_and_their_number_is_limited(model: Any, recorder: RerunRecorder) -> None:
    encode = CapturesRepeats(model, "__call__", lambda device: recorder)
    for images in range(1, MOST_GRAPHS + 3):
        results = calls(encode, REPEATS + 1, images)
        assert torch.equal(results[-1], expected(model, REPEATS + 1, images)[-1])
    assert (recorder.recorded, recorder.replays) == (MOST_GRAPHS, MOST_GRAPHS)


def _set_backend(model: Any) -> None:
    model.set_backend("eager")


def _move_weights(model: Any) -> None:
    model.post_layernorm.weight = nn.Parameter(model.post_layernorm.weight * 2)


def _override_method(model: Any) -> None:
    forward = model.forward
    model.forward = lambda pixel_values: forward(-pixel_values)


def _replace_module(model: Any) -> None:
    model.encoder.layers[0].mlp.fc1 = nn.Sequential(model.encoder.layers[0].mlp.fc1, nn.ReLU())


def _set_epsilon(model: Any) -> None:
    model.encoder.layers[0].layer_norm1.eps = 0.5


def _set_class(model: Any) -> None:
    class Doubling(type(model.post_layernorm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.post_layernorm.__class__ = Doubling


CHANGES = [_set_backend, _move_weights, _override_method, _replace_module, _set_epsilon, _set_class]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_recorded_again(model: Any, recorder: RerunRecorder, change: Callable[[Any], None]) -> None:
    encode = CapturesRepeats(model, "__call__", lambda device: recorder)
    calls(encode, REPEATS + 1)
    change(model)
    results = calls(encode, REPEATS + 1)
    assert recorder.recorded == 2
    assert all(torch.equal(*pair) for pair in zip(results, expected(model, REPEATS + 1), strict=True))


@torch.no_grad()
def test_what_a_configuration_asks_for_is_returned(recorder: RerunRecorder) -> None:
    config = copy.deepcopy(CONFIG)
    model = randomised(siglip_model.SiglipVisionModel(config)).eval()
    encode = CapturesRepeats(model, "__call__", lambda device: recorder)
    calls(encode, REPEATS + 1)
    config.output_hidden_states = True
    assert len(encode(pixels()).hidden_states) == 2
    config.return_dict = False
    assert isinstance(encode(pixels()), tuple)


def test_hooks_are_called_every_time(model: Any, recorder: RerunRecorder) -> None:
    encode = CapturesRepeats(model, "__call__", lambda device: recorder)
    calls(encode, REPEATS + 1)
    assert recorder.replays == 1
    seen: list[int] = []
    handle = model.encoder.layers[0].register_forward_hook(lambda *_: seen.append(1))
    calls(encode, REPEATS + 1)
    discarded = recorder.replays - 1  # by which the change is found; a graph's would not call the hook
    assert len(seen) - discarded == REPEATS + 1
    handle.remove()
    calls(encode, REPEATS + 1)
    assert recorder.recorded == 2


def test_hooks_of_all_modules_are_called_every_time(model: Any, recorder: RerunRecorder) -> None:
    encode = CapturesRepeats(model, "__call__", lambda device: recorder)
    calls(encode, REPEATS + 1)
    seen: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        calls(encode, 2)
    finally:
        handle.remove()
    assert sum(module is model for module in seen) == 2
    assert recorder.replays == 1


def test_training_and_gradients_are_never_captured(model: Any, recorder: RerunRecorder) -> None:
    encode = CapturesRepeats(model, "__call__", lambda device: recorder)
    calls(encode, REPEATS + 1)
    for _ in range(REPEATS + 1):
        assert encode(pixels()).pooler_output.requires_grad
    calls(CapturesRepeats(model.train(), "__call__", lambda device: recorder), REPEATS + 1)
    assert (recorder.recorded, recorder.replays) == (1, 1)


def test_autocast_and_inference_mode(model: Any, recorder: RerunRecorder) -> None:
    encode = CapturesRepeats(model, "__call__", lambda device: recorder)
    calls(encode, REPEATS)
    with torch.autocast("cpu", torch.bfloat16):
        results = calls(encode, REPEATS + 1)
        assert all(torch.equal(*pair) for pair in zip(results, expected(model, REPEATS + 1), strict=True))
    with torch.inference_mode():
        calls(encode, REPEATS + 1)
    assert recorder.recorded == 2


def test_a_failed_recording_is_reported_once(model: Any) -> None:
    def refuse(device: torch.device) -> Any:
        def record(function: Callable[[], Any]) -> Any:
            raise torch.OutOfMemoryError("no memory left")

        return record

    encode = CapturesRepeats(model, "__call__", refuse)
    with pytest.warns(UserWarning, match=r"shape \(1, 3, 48, 48\).*no memory left"):
        calls(encode, REPEATS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(calls(encode, REPEATS)[-1], expected(model, REPEATS)[-1])


def test_without_a_gpu_the_model_is_called(model: Any) -> None:
    encode = CapturesRepeats(model, "__call__")
    results = calls(encode, REPEATS + 2)
    assert not encode._graphs
    assert torch.equal(results[-1], expected(model, REPEATS + 2)[-1])


def test_copies_have_no_graphs(model: Any, recorder: RerunRecorder) -> None:
    encode = CapturesRepeats(model, "__call__", lambda device: recorder)
    calls(encode, REPEATS + 1)
    for other in (copy.deepcopy(encode), pickle.loads(pickle.dumps(encode))):
        assert not other._graphs and other._model is not model
        assert torch.equal(calls(other, 1)[0], expected(model, 1)[0])


@pytest.mark.gpu
def test_a_cuda_graph(model: Any) -> None:
    model.cuda()
    encode = CapturesRepeats(model, "__call__")
    with torch.no_grad():
        for seed in range(REPEATS + 2):
            image = pixels(seed=seed).cuda()
            torch.testing.assert_close(encode(image).pooler_output, model(image).pooler_output)
    assert len(encode._graphs) == 1
