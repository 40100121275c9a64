"""CUDA graphs at native resolution: one number of tokens, shared by images of any shapes.

Without a GPU, a recorder that reruns the function replaces the graph, and fake tensors show that nothing waits for
values.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from naflex import MIXED, VALUES, images, peer_config, peer_model, project_model, texts
from oracle import leaves, randomised, worst_difference
from rerun_recorder import RerunRecorder
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import siglip_model
from siglip_kernels import MissingBackendError
from siglip_model import backends
from siglip_model.automatic_capture import REPEATS, CapturesRepeats
from siglip_model.naflex.capture import CapturedNaFlex, CapturedSiglip2, Sizes

TOLERANCE = 1e-5
SMALL = {"num_hidden_layers": 1}
SIZES = (5, 24)  # images and patches of a graph
OTHER = ((2, 2), (1, 5), (5, 4))
KINDS = ["Siglip2VisionModel", "Siglip2ForImageClassification", "Siglip2Model"]


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    padding = replace(backends.SDPA, name="padding", packs_on=("cuda",))  # as sdpa does on a GPU; on a CPU it packs
    monkeypatch.setitem(backends.BACKENDS, padding.name, padding)


def model(backend: str, kind: str = "Siglip2Model") -> Any:
    peer = peer_model(**SMALL)
    if kind == "Siglip2ForImageClassification":
        config = siglip_model.Siglip2Config.from_dict(peer.config.to_dict())
        return randomised(siglip_model.Siglip2ForImageClassification(config, backend=backend))
    whole = project_model(peer, backend)
    return whole if kind == "Siglip2Model" else whole.vision_model


def capture(model: Any, budget: int | None = None, record: Any = None) -> Any:
    record = record or RerunRecorder()
    if isinstance(model, siglip_model.Siglip2Model):
        sizes = (SIZES[0], 3, SIZES[1], budget, None, False)
        return CapturedSiglip2(model, *sizes, record, compare=model.compare)
    return CapturedNaFlex(model, *SIZES, budget, record)


BATCHES = [images(MIXED, 24), images(OTHER, 20), images(MIXED, 24)]


@pytest.mark.parametrize(
    ("kind", "backend", "budget"),
    [
        *((kind, backend, None) for kind in KINDS for backend in ("padding", "eager")),
        *((kind, "sdpa", budget) for kind in KINDS for budget in (None, 64)),
    ],
)
def test_the_same_results_as_the_model(backend: str, budget: int | None, kind: str) -> None:
    original = model(backend, kind)
    fast = capture(original, budget)
    ids = texts(3) if kind == "Siglip2Model" else {}
    for inputs in BATCHES:
        with torch.no_grad():
            expected = original(**inputs, **ids)
        output = fast(**inputs, **ids)
        assert type(output) is type(expected)
        shapes = {name: leaf.shape for name, leaf in leaves(output).items()}
        assert shapes == {name: leaf.shape for name, leaf in leaves(expected).items()}
        assert worst_difference(output, expected) < TOLERANCE
    if kind == "Siglip2Model":
        assert worst_difference(fast.get_image_features(**inputs), expected.vision_model_output) < TOLERANCE
        assert worst_difference(fast.get_text_features(**ids), expected.text_model_output) < TOLERANCE


def test_with_kernels() -> None:
    original = model("triton", "Siglip2VisionModel")
    inputs = images(((2, 3), (1, 1)), 6)
    with torch.no_grad():
        assert worst_difference(capture(original, 16)(**inputs), original(**inputs)) < TOLERANCE


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_what_the_configuration_asks_for(option: str) -> None:
    original = model("sdpa", "Siglip2VisionModel")
    setattr(original.config, option, True)
    fast = capture(original)
    with torch.no_grad():
        assert worst_difference(fast(**BATCHES[1]), original(**BATCHES[1])) < TOLERANCE


@pytest.mark.parametrize("backend", ["sdpa", "padding", "eager"])
def test_nothing_of_an_earlier_call_remains(backend: str) -> None:
    original = model(backend, "Siglip2VisionModel")
    fast = capture(original)
    first = fast(**BATCHES[0])
    kept = first.pooler_output.clone()
    fast(**{**BATCHES[0], "pixel_values": torch.full_like(BATCHES[0]["pixel_values"], torch.inf)})
    with torch.no_grad():
        assert worst_difference(fast(**BATCHES[1]), original(**BATCHES[1])) < TOLERANCE
    assert torch.equal(first.pooler_output, kept)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("backend", ["triton", "padding", "eager"])
def test_nothing_waits_for_values(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = siglip_model.Siglip2Config.from_dict(peer_config(**SMALL).to_dict())
    with torch.device("meta"):
        original = siglip_model.Siglip2VisionModel(config.vision_config, backend=backend).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        original.to_empty(device="cpu")
        output = capture(original, None, lambda function: (function(), lambda: None)).recording.results
        assert output.pooler_output.shape == (SIZES[0], 64) and output.last_hidden_state.shape == (*SIZES, 64)
        if backend == "triton":  # and the model itself would have waited
            monkeypatch.setattr("siglip_model.naflex.layout.can_read_values", lambda tensor: True)
            with pytest.raises(DataDependentOutputException):
                original(torch.empty(2, 4, VALUES), None, torch.empty(2, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (images(((2, 2),) * 6, 24), r"pixel_values has shape \(6, 24, 768\); supported: up to \(5, 24, 768\)"),
        (images(((2, 2),), 25), r"pixel_values has shape \(1, 25, 768\); supported: up to"),
        (images(((4, 6), (4, 6)), 24), "spatial_shapes says 48 patches of all images; .* a token_budget of 40"),
        ({"pixel_attention_mask": torch.ones(3, 20)}, "pixel_attention_mask does not mark .* image 0"),
        ({"pixel_attention_mask": None}, "pixel_attention_mask is None, so all are valid"),
        ({"spatial_shapes": None}, "spatial_shapes is NoneType"),
        ({"spatial_shapes": torch.tensor([[2, 2], [0, 5], [5, 4]])}, "0 × 5 patches for image 1"),
        ({"pixel_values": torch.rand(3, 20, 768, device="meta")}, "pixel_values is on meta; supported: cpu"),
        ({"pixel_values": None}, "pixel_values is None"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_graph_is_named(changed: dict[str, Any], message: str) -> None:
    fast = capture(model("sdpa", "Siglip2VisionModel"), 40)
    before = fast(**BATCHES[1])
    with pytest.raises(ValueError, match=message):
        fast(**{**BATCHES[1], **changed})
    assert worst_difference(fast(**BATCHES[1]), before) == 0  # and the graph still works


def test_budgets_need_a_backend_that_packs() -> None:
    with pytest.raises(ValueError, match="token_budget is 64 with the backend padding, which computes padding"):
        capture(model("padding"), 64)
    with pytest.raises(ValueError, match="token_budget is 121; supported: up to the 120 patches of a full batch"):
        capture(model("sdpa"), 121)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that CUDA is needed")
@pytest.mark.parametrize("kind", KINDS)
def test_arguments(kind: str) -> None:
    original = model("sdpa", kind)
    with pytest.raises(MissingBackendError, match="the model is on cpu, and CUDA graphs need a CUDA device"):
        original.capture(batch_size=2, max_num_patches=64, token_budget=100)
    for wrong in ({"batch_size": 0}, {"max_num_patches": 0}, {"token_budget": 1.5}):
        with pytest.raises(ValueError, match=f"capture: {next(iter(wrong))} is .*; supported: integers from 1"):
            original.capture(**wrong)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_similar_batches_share_a_recording(backend: str) -> None:
    original, recorder = model(backend), RerunRecorder()
    encode = CapturesRepeats(original, recorder=lambda device: recorder)
    shapes = [((16, 15), (14, 17)), ((15, 16), (17, 14)), ((2, 120), (238, 1)), ((30, 8), (12, 20)), ((3, 80), (8, 30))]
    with torch.no_grad():
        for each in shapes:
            inputs = images(each, max(height * width for height, width in each))
            assert worst_difference(encode(**inputs), original.get_image_features(**inputs)) < TOLERANCE
    assert (recorder.recorded, recorder.replays) == (1, len(shapes) - REPEATS)


def test_sizes_of_recordings() -> None:
    pixels, shapes = torch.empty(9, 250, 1), torch.tensor([[15, 16]] * 9)
    assert Sizes.around(pixels, shapes) == (9, 256, 2304)  # of 2,160 tokens
    for number in range(1, 20_000, 7):
        tokens = Sizes.around(torch.empty(1, 30_000, 1), torch.tensor([[1, number]])).tokens
        assert number <= tokens <= number * 9 / 8 and tokens < number + 512


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, 64])
def test_a_cuda_graph(budget: int | None) -> None:
    original = model("triton").cuda()
    fast = original.capture(5, text_batch_size=3, max_num_patches=24, token_budget=budget)
    ids = {name: tensor.cuda() for name, tensor in texts(3).items()}
    for inputs in BATCHES:
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].cuda()}
        with torch.no_grad():
            assert worst_difference(fast(**inputs, **ids), original(**inputs, **ids)) < 1e-4
