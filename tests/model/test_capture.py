"""CUDA graphs of the model. Without a GPU, a recorder that reruns the function replaces the graph: copies, checks,
clones and errors around it are the same."""

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.utils._pytree as pytree
from oracle import TINY_TEXT, TINY_VISION, randomised, worst_difference
from rerun_recorder import RerunRecorder

import siglip_model
from siglip_kernels import MissingBackendError
from siglip_model.capture import CapturedSiglip, CapturedText, CapturedVision, CudaGraphRecorder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
ONE_LAYER = {"num_hidden_layers": 1}
CONFIG = siglip_model.SiglipConfig(
    text_config={**TINY_TEXT, **ONE_LAYER}, vision_config={**TINY_VISION, **ONE_LAYER}, num_labels=5
)


def model(backend: str = "sdpa", kind: str = "SiglipModel", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    config = {"SiglipTextModel": CONFIG.text_config, "SiglipVisionModel": CONFIG.vision_config}.get(kind, CONFIG)
    return randomised(getattr(siglip_model, kind)(config, backend=backend)).to(DEVICE, **kwargs)


def capture(model: Any, **kwargs: Any) -> Any:
    """`model.capture(**kwargs)`, on the CPU with the stand-in."""
    if DEVICE == "cuda":
        return model.capture(**kwargs)
    record = RerunRecorder()
    if isinstance(model, siglip_model.SiglipModel):
        defaults = {"batch_size": 1, "text_batch_size": None, "image_size": None, "text_length": None}
        return CapturedSiglip(
            model, **{**defaults, "attention_mask": False, **kwargs}, record=record, compare=model.compare
        )
    if isinstance(model, siglip_model.SiglipTextModel):
        defaults = {"batch_size": 1, "text_length": None, "attention_mask": False}
        return CapturedText(model, **{**defaults, **kwargs}, record=record)
    return CapturedVision(model, **{"batch_size": 1, "image_size": None, **kwargs}, record=record)


def pixels(count: int = 1, size: tuple[int, int] = (48, 48), seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ids(count: int = 1, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 99, (count, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "triton"])
def test_the_same_results_as_the_model(backend: str) -> None:
    original = model(backend)
    fast = capture(original, batch_size=2, text_batch_size=3)
    for seed in range(2):
        images, texts = pixels(2, seed=seed), ids(3, seed=seed)
        with torch.no_grad():
            assert worst_difference(fast(texts, images), original(texts, images)) < TOLERANCE
            assert worst_difference(fast.get_image_features(images), original.get_image_features(images)) < TOLERANCE
            assert worst_difference(fast.get_text_features(texts), original.get_text_features(texts)) < TOLERANCE
    output = fast(input_ids=ids(3), pixel_values=pixels(2))  # as a processor returns them
    assert isinstance(output, siglip_model.model.SiglipOutput)
    assert not output.logits_per_image.requires_grad


@pytest.mark.parametrize("kind", ["SiglipModel", "SiglipTextModel", "SiglipVisionModel"])
def test_copies_of_a_graph_are_refused(kind: str) -> None:
    original = model(kind=kind)
    fast = capture(original)
    for twin in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="captured model: a copy or pickle .* supported: a copy of the model"):
            twin(fast)
    assert worst_difference(dict(copy.deepcopy(original).named_parameters()), dict(original.named_parameters())) == 0


def test_a_result_outlives_the_next_call() -> None:
    fast = capture(model())
    first = fast(ids(seed=1), pixels(seed=1))
    kept = pytree.tree_map_only(torch.Tensor, torch.clone, first)
    fast(ids(seed=2), pixels(seed=2))
    fast.get_image_features(pixels(seed=3))
    fast.get_text_features(ids(seed=3))
    assert worst_difference(first, kept) == 0


def test_the_given_tensors_stay_as_they_were() -> None:
    given = pixels()
    kept = given.clone()
    fast = capture(model())
    fast.get_image_features(given)
    fast.get_image_features(pixels(seed=1))
    assert torch.equal(given, kept)


@pytest.mark.parametrize("kind", ["SiglipVisionModel", "SiglipForImageClassification"])
def test_vision_models(kind: str) -> None:
    original = model(kind=kind)
    fast = capture(original, batch_size=2)
    with torch.no_grad():
        assert worst_difference(fast(pixels(2)), original(pixels(2))) < TOLERANCE
        assert worst_difference(fast(pixel_values=pixels(2, seed=4)), original(pixels(2, seed=4))) < TOLERANCE


def test_a_text_model() -> None:
    original = model(kind="SiglipTextModel")
    fast = capture(original, text_length=9)
    with torch.no_grad():
        assert worst_difference(fast(ids(length=9)), original(ids(length=9))) < TOLERANCE
        assert worst_difference(fast(ids(length=9).int()), original(ids(length=9))) < TOLERANCE


def test_images_of_another_size_are_interpolated() -> None:
    original = model()
    images = pixels(1, (64, 80))
    with torch.no_grad():
        expected = original.get_image_features(images, interpolate_pos_encoding=True)
        fast = capture(original, image_size=(64, 80))
        assert worst_difference(fast.get_image_features(images), expected) < TOLERANCE


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_masks(backend: str) -> None:
    original = model(backend)
    fast = capture(original, batch_size=2, attention_mask=True)
    masks = torch.ones(2, 2, 16, dtype=torch.long, device=DEVICE)
    masks[0, 1, 5:] = 0
    masks[1, 0, 11:] = 0
    for mask in (*masks, None, masks[0].bool()):  # a mask must not affect the next call
        with torch.no_grad():
            expected = original(ids(2), pixels(2), mask)
        assert worst_difference(fast(ids(2), pixels(2), mask), expected) < TOLERANCE
    if backend == "triton":
        with pytest.raises(ValueError, match="valid tokens after padding"):
            fast.get_text_features(ids(2), 1 - masks[0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 9\); supported: \(2, 16\)"):
        fast.get_text_features(ids(2), masks[0, :, :9])


def test_pixels_are_cast_to_the_weights() -> None:
    original = model(dtype=torch.bfloat16)
    fast = capture(original)
    with torch.no_grad():
        expected = original.get_image_features(pixels())
    found = fast.get_image_features(pixels())
    assert found.pooler_output.dtype == torch.bfloat16
    torch.testing.assert_close(found.pooler_output, expected.pooler_output)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda fast: fast.get_image_features(pixels(2)),
            r"pixel_values has shape \(2, 3, 48, 48\); supported: \(1, 3",
        ),
        (lambda fast: fast.get_image_features(pixels(1, (64, 64))), r"\(1, 3, 64, 64\); supported: \(1, 3, 48, 48\)"),
        (lambda fast: fast.get_image_features(pixels().byte()), "dtype torch.uint8; supported: floating point"),
        (lambda fast: fast.get_image_features(pixels().to("meta")), "pixel_values is on meta; supported: c"),
        (lambda fast: fast.get_image_features(None), "pixel_values is NoneType; supported: a tensor"),
        (lambda fast: fast.get_text_features(ids(1, 15)), r"input_ids has shape \(1, 15\); supported: \(1, 16\)"),
        (lambda fast: fast.get_text_features(ids().float()), "input_ids has dtype torch.float32; supported: int64"),
        (lambda fast: fast.get_text_features(ids().to("meta")), "input_ids is on meta; supported: c"),
        (lambda fast: fast.get_text_features(ids(), ids()), "attention_mask is given; supported: none, or capture"),
        (lambda fast: fast(ids(), pixels(3)), r"captured model: pixel_values has shape \(3, 3, 48, 48\)"),
        (lambda fast: fast(ids(2), pixels()), r"captured model: input_ids has shape \(2, 16\)"),
    ],
)
def test_what_does_not_fit_the_graph_is_named(call: Callable[[Any], Any], message: str) -> None:
    fast = capture(model())
    before = fast(ids(), pixels())
    with pytest.raises(ValueError, match=message):
        call(fast)
    assert worst_difference(fast(ids(), pixels()), before) == 0  # and the graph still works


def test_weights_may_change_in_place() -> None:
    original = model()
    fast = capture(original)
    with torch.no_grad():
        before = fast(ids(), pixels()).logits_per_image
        other = {name: value + 0.01 for name, value in original.state_dict().items()}
        original.load_state_dict(other)
        after = fast(ids(), pixels()).logits_per_image
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, original(ids(), pixels()).logits_per_image, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.float64),
        lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
        lambda model: setattr(model, "logit_scale", torch.nn.Parameter(torch.ones(1, device=DEVICE))),
    ],
    ids=["cast", "assigned", "one of its own"],
)
def test_weights_that_moved_are_noticed(change: Callable[[Any], Any]) -> None:
    original = model()
    fast = capture(original)
    change(original)
    with pytest.raises(RuntimeError, match="moved or replaced after `capture`.*call capture again"):
        fast(ids(), pixels())


def test_captured_within_inference_mode() -> None:
    original = model()
    with torch.inference_mode():
        fast = capture(original)
        inside = fast(ids(), pixels()).logits_per_image.clone()
    assert torch.equal(fast(ids(), pixels()).logits_per_image, inside)


def test_hidden_states_where_the_configuration_wants_them() -> None:
    original = model()
    original.config.vision_config.output_hidden_states = True
    output = capture(original).get_image_features(pixels())
    expected = original.get_image_features(pixels())
    assert len(output.hidden_states) == 2
    assert worst_difference(output, expected) < TOLERANCE


@pytest.mark.skipif(DEVICE == "cuda", reason="says that CUDA is needed")
@pytest.mark.parametrize(
    "kind", ["SiglipModel", "SiglipTextModel", "SiglipVisionModel", "SiglipForImageClassification"]
)
def test_without_a_gpu(kind: str) -> None:
    with pytest.raises(MissingBackendError, match="the model is on cpu, and CUDA graphs need a CUDA device"):
        model(kind=kind).capture()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size is 0; supported: integers from 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"text_batch_size": -1}, "text_batch_size is -1"),
    ],
)
def test_impossible_sizes(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"capture: {message}"):
        model().capture(**arguments)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="in training mode; supported: evaluation mode"):
        model().train().capture()


def test_each_capture_has_a_stream_of_its_own_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's default stream is of the process's first device, and shares cuBLAS's workspace between graphs."""
    captured_on = []

    class Stream:
        def __init__(self, device: Any = None):
            self.device = device

        def wait_stream(self, other: Any) -> None: ...

    def graph(graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        captured_on.append(stream)
        return contextlib.nullcontext()

    for name, stand_in in (
        ("Stream", Stream),
        ("CUDAGraph", MagicMock),
        ("graph", graph),
        ("graph_pool_handle", object),
        ("current_stream", Stream),
        ("stream", lambda _: contextlib.nullcontext()),
        ("device", lambda _: contextlib.nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for index in (0, 1, 1):
        record = CudaGraphRecorder(torch.device("cuda", index))
        results, _ = record(lambda: 1)
        assert results == 1 and record(lambda: 2)[0] == 2
    assert [stream.device.index for stream in captured_on] == [0, 0, 1, 1, 1, 1]
    assert len(set(captured_on)) == 3 and all(captured_on[i] is captured_on[i + 1] for i in (0, 2, 4))


@pytest.mark.gpu
def test_a_graph_outlives_another() -> None:
    """A graph's end frees the workspace of its stream."""
    original = model("sdpa", dtype=torch.bfloat16)
    fast = original.capture()
    expected = fast(ids(), pixels()).logits_per_image
    for _ in range(3):
        fast = original.capture()  # which destroys the previous one
        torch.cuda.empty_cache()
        torch.testing.assert_close(fast(ids(), pixels()).logits_per_image, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_a_graph_is_replayed_without_launches(backend: str, dtype: torch.dtype) -> None:
    """On a GPU: the results are the model's, and a call launches one graph, not the model's kernels."""
    original = model(backend, dtype=dtype)
    fast = original.capture(batch_size=1)
    with torch.no_grad():
        expected = original(ids(), pixels())
    assert worst_difference(fast(ids(), pixels()), expected) < (1e-5 if dtype == torch.float32 else 0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast.get_image_features(pixels())
    assert not any("linear" in event.key or "attention" in event.key for event in profile.key_averages())


@pytest.mark.gpu
def test_capture_under_autocast() -> None:
    original = model("sdpa")
    with torch.autocast("cuda", torch.bfloat16):
        fast = original.capture()
        expected = original.get_image_features(pixels()).pooler_output
    for seed in (1, 0):
        found = fast.get_image_features(pixels(seed=seed)).pooler_output
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.gpu
def test_a_mask_inside_of_a_foreign_capture_is_refused() -> None:
    original = model("triton")
    refused = pytest.raises(ValueError, match="while a CUDA graph is captured.*model.capture")
    with refused, torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        original.get_text_features(ids(), torch.ones(1, 16, device="cuda"))
    torch.cuda.synchronize()
