"""accelerate(fp8=True): near the library's results, inference only, and a report of what is in fp8."""

import copy
import pickle

import machines
import open_clip
import pytest
import tiny_timm
import torch
import torch.nn.functional as F
from acceleration import randomise
from tiny_transformers import inputs, naflex_inputs, siglip, siglip2, to
from torch import nn

from siglip_kernels import MissingBackendError, UnsupportedInputError
from siglip_kernels import fp8 as fp8_operations
from siglip_kernels.fp8 import weights
from siglip_kernels.integrations import open_clip as siglip_open_clip
from siglip_kernels.integrations import timm as siglip_timm
from siglip_kernels.integrations import transformers as siglip_transformers

LAYER = ("fp8.pre_norm_attention", "fp8.pre_norm_mlp")


def tower(dtype=torch.bfloat16):
    """transformers' vision tower: one layer and a pooling head."""
    return siglip(head_dim=16).vision_model.to(dtype)


def timm_tower():
    return tiny_timm.tower(head_dim=16, act_layer="gelu_tanh").bfloat16()


def open_clip_text():
    config = dict(context_length=6, vocab_size=40, width=32, heads=2, layers=1, no_causal_mask=True, proj_bias=True)
    text = dict(config, pool_type="last", norm_kwargs=dict(eps=1e-6), act_kwargs=dict(approximate="tanh"))
    vision = dict(image_size=28, timm_model_name="vit_tiny_siglip", timm_model_pretrained=False, timm_pool="map")
    model = open_clip.CustomTextCLIP(embed_dim=32, vision_cfg={**vision, "timm_proj": "none"}, text_cfg=text)
    return randomise(model).eval().bfloat16().text


PIXELS = inputs()["pixel_values"].bfloat16()


def pooled(model, pixels=PIXELS):
    with torch.no_grad():
        out = model(pixels)
    return getattr(out, "pooler_output", out).float()


def check_near(found, wanted):
    """But not equal: equal ones were not computed in fp8."""
    assert F.cosine_similarity(found, wanted, dim=-1).min() > 0.99 and not torch.equal(found, wanted)


def operations(report, path):
    return next(entry.operations for entry in report.replaced if entry.path == path)


# Results and reports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "arguments"), [(siglip, inputs()), (siglip2, naflex_inputs())], ids=["siglip", "siglip2"]
)
def test_models_of_transformers(make, arguments):
    model, arguments = make(head_dim=16).bfloat16(), to(torch.bfloat16, arguments)

    @torch.no_grad()
    def embeddings():
        output = model(**arguments)
        return torch.cat([output.image_embeds, output.text_embeds]).float()

    before = embeddings()
    report = siglip_transformers.accelerate(model, fp8=True)
    check_near(embeddings(), before)
    for part in ("vision_model", "text_model"):
        assert operations(report, f"{part}.encoder.layers.0") == LAYER
        assert operations(report, f"{part}.encoder.layers.0.mlp") == ("fp8.mlp",)
        assert operations(report, f"{part}.encoder.layers.0.self_attn") == ("attention",)
    assert operations(report, "vision_model.head") == ("attention_pool", "fp8.pre_norm_mlp")
    # Two layers and the MLP of the head: a byte per weight, and per row a scale and a bias of two bytes.
    layer, mlp = 4 * 32 * 32 + 2 * 32 * 49, 2 * 32 * 49
    assert report.fp8.projections == 2 * 6 + 2
    assert report.fp8.bytes == 2 * (layer + 6 * (5 * 32 + 49)) + mlp + 6 * (32 + 49)
    assert "14 projections in fp8, 0.0 MiB beside the original weights" in str(report)
    siglip_transformers.restore(model)
    assert torch.equal(embeddings(), before)


def test_timm():
    model = timm_tower()
    before = pooled(model)
    report = siglip_timm.accelerate(model, fp8=True)
    check_near(pooled(model), before)
    assert operations(report, "blocks.0") == LAYER
    assert operations(report, "attn_pool") == ("attention_pool", "fp8.pre_norm_mlp")
    assert report.fp8.projections == 4 + 2  # one of q, k and v together
    siglip_timm.restore(model)
    assert torch.equal(pooled(model), before)


def test_open_clip():
    model, tokens = open_clip_text(), torch.randint(2, 40, (3, 6), generator=torch.Generator().manual_seed(2))
    before = pooled(model, tokens)
    report = siglip_open_clip.accelerate(model, fp8=True)
    check_near(pooled(model, tokens), before)
    assert operations(report, "transformer.resblocks.0") == LAYER
    assert report.fp8.projections == 4
    siglip_open_clip.restore(model)
    assert torch.equal(pooled(model, tokens), before)


def test_without_fp8_nothing_is_said_of_it_and_nothing_is_in_it():
    model, other = tower(), tower()
    plain = siglip_transformers.accelerate(other)
    assert plain.fp8 is None and "fp8" not in str(plain)
    wanted = pooled(other)
    siglip_transformers.accelerate(model, fp8=True)
    check_near(pooled(model), wanted)
    assert siglip_transformers.accelerate(model).fp8 is None  # a second call takes it out again
    assert torch.equal(pooled(model), wanted)


def test_a_layer_whose_forward_was_set_leaves_fp8_too():
    model, other = tower(), tower()
    siglip_transformers.accelerate(other)
    siglip_transformers.accelerate(model, fp8=True)
    layer = model.encoder.layers[0]
    forward = layer.forward
    layer.forward = lambda *arguments, **options: forward(*arguments, **options)
    report = siglip_transformers.accelerate(model)
    assert "encoder.layers.0" in {entry.path for entry in report.left}
    assert torch.equal(pooled(model), pooled(other))


def test_wrapped_and_hooked_layers_are_called_and_named():
    class Adapted(nn.Linear):
        pass

    model = siglip(head_dim=16, layers=2).vision_model.bfloat16()
    before = pooled(model)
    layers, calls = model.encoder.layers, []
    layers[0].self_attn.q_proj.__class__ = Adapted
    layers[0].mlp.fc1.register_forward_hook(lambda *_: calls.append("fc1"))
    layers[1].layer_norm2.register_forward_hook(lambda *_: calls.append("norm"))
    layers[1].self_attn.out_proj.__class__ = Adapted
    report = siglip_transformers.accelerate(model, fp8=True)
    assert operations(report, "encoder.layers.0") == ("layer_norm", "attention", "linear")
    assert operations(report, "encoder.layers.1") == ("fp8.pre_norm_qkv", "attention", "layer_norm", "fp8.mlp")
    assert report.fp8.projections == 3 + 2 + 2  # of the second layer, and the head's
    for remark in ("self_attn.q_proj is a", "mlp.fc1 has hooks", "layer_norm2 (LayerNorm) has hooks"):
        assert f"but: {remark}" in str(report)
    check_near(pooled(model), before)
    assert calls == ["fc1", "norm"]


def test_hooks_that_come_afterwards_are_called():
    model, calls = tower(), []
    siglip_transformers.accelerate(model, fp8=True)
    before = pooled(model)
    handle = model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    check_near(pooled(model), before)
    assert calls == [1]
    handle.remove()
    assert torch.equal(pooled(model), before)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_gradients_and_training_mode_raise():
    for make, integration in ((tower, siglip_transformers), (timm_tower, siglip_timm)):
        model = make()
        integration.accelerate(model, fp8=True)
        with pytest.raises(UnsupportedInputError, match="x needs gradients; supported: inference"):
            out = model(PIXELS)
            getattr(out, "pooler_output", out).sum().backward()
        model.train()
        with pytest.raises(
            UnsupportedInputError, match=r"fp8 was True, .* in training mode; supported: model.eval\(\)"
        ):
            pooled(model)


def test_float32_needs_autocast():
    model = tower(torch.float32)
    before = pooled(model, PIXELS.float())
    report = siglip_transformers.accelerate(model, fp8=True)
    assert report.note == "with parameters of torch.float32 fp8 needs torch.autocast"
    with pytest.raises(UnsupportedInputError, match="has dtype torch.float32; supported: float16 and bfloat16"):
        pooled(model, PIXELS.float())
    with torch.autocast("cpu", torch.bfloat16):
        check_near(pooled(model, PIXELS.float()), before)


def test_gpus_without_fp8_are_named(monkeypatch):
    model = tower()
    kinds = [type(module) for module in model.modules()]
    machines.report(monkeypatch, machines.A100)
    reason = "NVIDIA A100.* has compute capability 8.0; products of fp8 need 8.9.*; accelerate the model without fp8"
    with pytest.raises(MissingBackendError, match=f"^accelerate: {reason}"):
        siglip_transformers.accelerate(model, fp8=True)
    assert [type(module) for module in model.modules()] == kinds
    siglip_transformers.accelerate(model)


# What changes nothing else --------------------------------------------------------------------------------------------


def test_copies_and_pickles_stay_in_fp8():
    model = tower()
    siglip_transformers.accelerate(model, fp8=True)
    wanted = pooled(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(pooled(other), wanted)
        siglip_transformers.restore(other)
        check_near(pooled(other), wanted)


@pytest.mark.parametrize("make", [tower, timm_tower])
def test_compiled_without_a_break(make):
    model = make()
    (siglip_timm if make is timm_tower else siglip_transformers).accelerate(model, fp8=True)
    wanted = pooled(model)
    torch._dynamo.reset()
    assert torch.equal(pooled(torch.compile(model, fullgraph=True, backend="aot_eager")), wanted)


@pytest.mark.parametrize("make", [tower, timm_tower])
def test_weights_are_quantised_once_and_again_when_they_change(make, monkeypatch):
    model, calls = make(), []
    quantise = weights.quantise_projection
    monkeypatch.setattr(weights, "quantise_projection", lambda *each: calls.append(1) or quantise(*each))
    report = (siglip_timm if make is timm_tower else siglip_transformers).accelerate(model, fp8=True)
    before = pooled(model)
    first = len(calls)
    assert 5 <= first <= 6 and torch.equal(pooled(model), before) and len(calls) == first
    assert weights.quantised_bytes(model.parameters()) == report.fp8.bytes + 8 * first  # their bounds
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    assert not torch.equal(pooled(model), before) and len(calls) == 2 * first


# Verification ---------------------------------------------------------------------------------------------------------


def test_verified_by_cosines(monkeypatch):
    report = siglip_transformers.accelerate(tower(), verify=True, fp8=True)
    assert report.left == () and "compared with the library" in report.note and report.fp8.projections == 8
    in_float32 = tower(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        report = siglip_transformers.accelerate(in_float32, verify=True, fp8=True)
    assert report.left == () and report.fp8.projections == 8
    model, mlp = tower(), fp8_operations.mlp
    before = pooled(model)
    monkeypatch.setattr(fp8_operations, "mlp", lambda *each: -mlp(*each))
    report = siglip_transformers.accelerate(model, verify=True, fp8=True)
    assert {entry.path for entry in report.left} == {"encoder.layers.0.mlp", "head.mlp"}
    assert all("its result has a cosine of -" in entry.reason for entry in report.left)
    assert report.fp8.projections == 8  # the layer and the head compute them by another operation
    check_near(pooled(model), before)
    with pytest.raises(MissingBackendError, match="is float32 on cpu; move the model first, or convert it"):
        siglip_transformers.accelerate(tower(torch.float32), verify=True, fp8=True)
