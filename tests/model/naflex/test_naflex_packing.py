"""Padding is dropped before the first layer and restored after the last one, under every backend that can."""

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from error_budget import check_error
from naflex import MIXED, images, peer_model, project_model, texts
from oracle import worst_difference

import siglip_model
from siglip_model import backends
from siglip_model.naflex.layout import Packed, Padded, layout

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


SIZES = {
    "head dim 32": {"num_hidden_layers": 1},
    "head dim 72": {"hidden_size": 144, "intermediate_size": 538, "num_hidden_layers": 1},
}


def tower(backend: str, **sizes: Any) -> siglip_model.Siglip2VisionModel:
    """With the same weights for every backend."""
    torch.manual_seed(0)
    return project_model(peer_model(**sizes), backend).vision_model


def counting(ops: backends.Backend) -> tuple[backends.Backend, list[int]]:
    """The backend, and the number of tokens that each call of its MLP sees."""
    tokens: list[int] = []

    def pre_norm_mlp(x: torch.Tensor, *parameters: Any) -> torch.Tensor:
        tokens.append(x.shape[0] * x.shape[1])
        return ops.pre_norm_mlp(x, *parameters)

    return replace(ops, pre_norm_mlp=pre_norm_mlp), tokens


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_layers_see_no_padding(backend: str) -> None:
    model = tower(backend, num_hidden_layers=2)
    ops, tokens = counting(backends.BACKENDS[backend])
    for layer in model.encoder.layers:
        layer.ops = layer.mlp.ops = layer.self_attn.ops = ops
    for inputs, expected in ((images(), sum(h * w for h, w in MIXED)), (images(((4, 4), (2, 8)), 16), 32)):
        tokens.clear()
        model(**inputs)
        assert tokens == [expected] * 2


def test_half_a_packed_layer_is_one_operation() -> None:
    model, seen = tower("triton", num_hidden_layers=2), []

    def pre_norm_attention(x: torch.Tensor, *parameters: Any, **packing: Any) -> torch.Tensor:
        seen.append((x.shape[1], packing["max_seqlen"]))
        return backends.TRITON.pre_norm_attention(x, *parameters, **packing)

    ops = replace(backends.TRITON, pre_norm_attention=pre_norm_attention)
    for layer in model.encoder.layers:
        layer.ops = layer.mlp.ops = layer.self_attn.ops = ops
    model(**images())
    assert seen == [(62, 21)] * 2


def results(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pooled output, tokens and every gradient."""
    torch.manual_seed(1)
    output = model(**inputs)
    tokens = output.last_hidden_state * inputs["pixel_attention_mask"][..., None]
    loss = (output.pooler_output * torch.randn_like(output.pooler_output)).sum() + (
        tokens * torch.randn_like(tokens)
    ).sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"pooled": output.pooler_output.detach(), "tokens": tokens.detach(), **gradients}


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ("head dim 72", torch.float32), ("head dim 72", torch.float16), ("head dim 32", torch.bfloat16),
    ],
)  # fmt: skip
def test_triton_within_the_budget(sizes: str, dtype: torch.dtype) -> None:
    inputs = images()
    found, eager, exact = (
        results(tower(backend, **SIZES[sizes]).to(precision), inputs)
        for backend, precision in (("triton", dtype), ("eager", dtype), ("eager", torch.float64))
    )
    for name, expected in exact.items():
        # A bias of the keys changes no softmax, so that its gradient is zero up to the roundings of larger terms.
        terms = exact[name.replace("k_proj.bias", "q_proj.bias")].norm() if "k_proj.bias" in name else 0.0
        check_error(found[name], eager[name], expected, name, slack=2 * torch.finfo(dtype).eps * terms)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "triton"])
def test_results_are_those_of_padded_execution(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile and CUDA graphs record: the shapes are not read."""
    model = tower(backend, num_hidden_layers=2)
    inputs = images()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        monkeypatch.setattr("siglip_model.naflex.layout.can_read_values", lambda tensor: False)
        assert worst_difference(model(**inputs, output_hidden_states=True), expected) < TOLERANCE
    assert isinstance(where(backend, inputs), Padded)


def where(backend: str, inputs: dict[str, torch.Tensor], **options: Any) -> Padded | Packed:
    mask, shapes = inputs["pixel_attention_mask"], inputs["spatial_shapes"]
    return layout(backends.BACKENDS[backend], inputs["pixel_values"], mask, shapes, **{"dense": False, **options})


def test_layouts() -> None:
    mixed, full = images(), images(((4, 4), (2, 8)), 16)
    for backend, packed in (("eager", False), ("sdpa", True), ("triton", True)):
        assert isinstance(where(backend, mixed), Packed) == packed
        assert isinstance(where(backend, full), Padded) and where(backend, full).mask == {}
        assert isinstance(where(backend, mixed, dense=True), Padded)
    packed = where("sdpa", mixed)
    assert packed.mask["cu_seqlens"].tolist() == [0, 16, 22, 23, 44, 62] and packed.mask["max_seqlen"] == 21
    tokens = packed.drop_padding(mixed["pixel_values"])
    assert tokens.shape[:2] == (1, 62)
    assert torch.equal(packed.restore_padding(tokens), mixed["pixel_values"] * mixed["pixel_attention_mask"][..., None])


def test_attention_of_packed_sequences_groups_equal_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor([3, 3, 5, 1, 1, 1, 0, 4])
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    q, k, v = torch.randn(3, 1, int(lengths.sum()), 2, 8, dtype=torch.float64).unbind()
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        backends.F, "scaled_dot_product_attention", lambda *a, **o: calls.append(a[0].shape) or attend(*a, **o)
    )
    found = backends.SDPA.attention(q, k, v, cu_seqlens=boundaries, max_seqlen=5)
    assert [shape[0] for shape in calls] == [2, 1, 3, 1, 1]
    for begin, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        alone = backends.EAGER.attention(q[:, begin:end], k[:, begin:end], v[:, begin:end])
        assert torch.allclose(found[:, begin:end], alone)


def test_flash_attention_gets_packed_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn itself needs a GPU: its call is checked with the specification in its place."""

    def flash_attn_varlen_func(q, k, v, starts_q, starts_k, longest_q, longest_k, dropout_p, softmax_scale):
        assert q.shape == (62, 2, 8) and starts_q is starts_k and longest_q == longest_k == 21 and dropout_p == 0
        return backends.SDPA.attention(q[None], k[None], v[None], scale=softmax_scale, cu_seqlens=starts_q)[0]

    module = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_func=None)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    boundaries = where("sdpa", images()).mask

    class OnGpu(torch.Tensor):
        is_cuda = True

    q, k, v = torch.randn(3, 1, 62, 2, 8, dtype=torch.float16).unbind()
    found = backends.FLASH.attention(*(each.as_subclass(OnGpu) for each in (q, k, v)), **boundaries)
    assert torch.equal(torch.Tensor(found), torch.Tensor(backends.SDPA.attention(q, k, v, **boundaries)))


def test_whole_model_with_triton() -> None:
    inputs = {**images(), **texts()}
    peer = peer_model(num_hidden_layers=1)
    expected = peer(**inputs, return_loss=True)
    output = project_model(peer, "triton")(**inputs, return_loss=True)
    for name in ("loss", "logits_per_image", "image_embeds"):
        assert worst_difference(output[name], expected[name]) < TOLERANCE


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_compiled_in_one_graph(backend: str) -> None:
    model = tower(backend, num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = images()
    with torch.no_grad():
        assert worst_difference(compiled(**inputs), model(**inputs)) < TOLERANCE


def test_compiled_layers_keep_batches_packed() -> None:
    """In one graph for batches of any number of images and tokens."""
    plain, model = tower("triton", num_hidden_layers=1), tower("triton", num_hidden_layers=1)
    frames = torch._dynamo.testing.CompileCounter()
    model.encoder.compile(fullgraph=True, dynamic=True, backend=frames)
    tokens: list[int] = []
    model.embeddings.register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[1]))
    counts = []
    for shapes in (MIXED, ((1, 1), (5, 4))):
        inputs = images(shapes)
        assert worst_difference(results(model, inputs), results(plain, inputs)) < TOLERANCE
        counts.append(frames.frame_count)
    assert tokens == [62, 21] and counts[0] == counts[-1]


def test_exported_with_any_number_of_images_and_patches() -> None:
    model = tower("sdpa", num_hidden_layers=1)
    batch, patches = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("patches", min=2, max=1024)
    sizes = {"pixel_values": {0: batch, 1: patches}, "pixel_attention_mask": {0: batch, 1: patches}}
    program = torch.export.export(model, (), images(), dynamic_shapes={**sizes, "spatial_shapes": {0: batch}}).module()
    for inputs in (images(), images(((2, 2), (3, 3)), 12)):
        assert worst_difference(program(**inputs).pooler_output, model(**inputs).pooler_output) < TOLERANCE


def test_dropout_and_checkpointing() -> None:
    model = tower("sdpa", attention_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    model(**images()).pooler_output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
