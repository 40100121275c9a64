"""accelerate and restore on timm's SigLIP towers."""

import copy
import pickle

import pytest
import timm
import torch
from acceleration import assert_close, assert_within_budget, check_acceleration, in_fp64, run
from timm.layers import AttentionPoolLatent
from tiny_timm import tower
from torch import nn

from siglip_kernels import MissingBackendError
from siglip_kernels.integrations.timm import accelerate, restore


def pixels(side, batch=3):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(2))


def features(side):
    images = pixels(side)

    def call(model):
        return dict(features=model(images.to(next(model.parameters()).dtype)))

    return call


def check(model, side=32, budget=False):
    return check_acceleration(model, features(side), accelerate, restore, budget)


def operations(report, path):
    return next(entry.operations for entry in report.replaced if entry.path == path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so400m_with_its_attention_pool(dtype):
    model = tower("vit_so400m_patch14_siglip_384", 72, depth=2, patch=14, act_layer="gelu_tanh").to(dtype)
    report = check(model, side=56, budget=True)
    assert report.left == ()
    assert operations(report, "blocks.1") == ("pre_norm_attention", "pre_norm_mlp")
    assert operations(report, "attn_pool") == ("attention_pool", "pre_norm_mlp")
    assert operations(report, "patch_embed") == ("patch_embed",)
    assert operations(report, "norm") == ("layer_norm",)


def test_the_exact_gelu_stays_exact():
    report = check(tower(head_dim=64, num_classes=5), budget=True)
    assert operations(report, "blocks.0") == ("pre_norm_attention", "layer_norm", "linear")
    assert "GELU(approximate='none')" in str(report)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(init_values=0.1),  # LayerScale
        dict(qk_norm=True),
        dict(class_token=True, global_pool="token", reg_tokens=2),
        dict(dynamic_img_size=True),
        dict(qkv_bias=False),
        dict(act_layer="silu"),
        dict(norm_layer=nn.LayerNorm),
    ],
    ids=str,
)
def test_other_forms_of_its_blocks(arguments):
    check(tower(**arguments))


@pytest.mark.parametrize(
    "arguments", [dict(out_features=8), dict(latent_len=2), dict(latent_dim=8), dict(q_proj=False)], ids=str
)
def test_other_forms_of_its_pool(arguments):
    model = tower()
    model.attn_pool = AttentionPoolLatent(16, num_heads=2, norm_layer=nn.LayerNorm, **arguments)
    report = check(model)
    assert [entry.reason for entry in report.left if entry.path == "attn_pool"] == [
        "its layers are wrapped, hooked or not of SigLIP's form"
    ]


def test_tower_without_pool():
    check(tower("vit_base_patch16_siglip_gap_224", num_classes=3))


@pytest.mark.parametrize("rate", ["drop_path_rate", "attn_drop_rate", "proj_drop_rate"])
def test_what_is_dropped_in_training_is_dropped_as_before(rate):
    model, call = tower(depth=2, act_layer="gelu_tanh", **{rate: 0.5}).train(), features(32)
    torch.manual_seed(0)
    before = run(model, call)
    accelerate(model)
    torch.manual_seed(0)
    assert_close(run(model, call), before)


def test_autocast():
    model, call = tower(head_dim=64, act_layer="gelu_tanh"), features(32)
    truth = in_fp64(model, call)
    with torch.autocast("cpu", torch.bfloat16):
        before = run(model, call)
        patches = model.patch_embed(pixels(32)).dtype
        accelerate(model)
        assert model.patch_embed(pixels(32)).dtype == patches
        assert_within_budget(run(model, call), before, truth, torch.bfloat16)


def test_masks_are_left_to_timm():
    model, images = tower(), pixels(32)
    mask = torch.ones(16, 16).tril().bool()
    for arguments in (dict(attn_mask=mask), dict(is_causal=True)):
        before = model(images, **arguments)
        accelerate(model)
        torch.testing.assert_close(model(images, **arguments), before)
        restore(model)


def test_copies_and_intermediate_features():
    model, images = tower(act_layer="gelu_tanh"), pixels(32)
    states = model.forward_intermediates(images, intermediates_only=True)
    accelerate(model)
    for state, other in zip(states, model.forward_intermediates(images, intermediates_only=True), strict=True):
        torch.testing.assert_close(other, state)
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)


def test_compiled_without_a_break():
    for arguments in (dict(act_layer="gelu_tanh"), dict()):
        model, images = tower(**arguments), pixels(32)
        expected = model(images)
        accelerate(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), expected)


def test_gradient_checkpointing():
    model, call = tower(act_layer="gelu_tanh").train(), features(32)
    accelerate(model)
    plain = run(model, call)
    model.set_grad_checkpointing()
    assert_close(run(model, call), plain, tolerance=1e-6)


def test_hooks_inside_a_block_see_what_they_saw():
    model, images = tower(act_layer="gelu_tanh"), pixels(32)
    for name in ("norm1", "attn", "attn.qkv", "attn.proj", "ls1", "drop_path2", "mlp", "mlp.fc2", "mlp.drop1"):
        seen = []
        handle = model.blocks[0].get_submodule(name).register_forward_hook(lambda m, a, out, s=seen: s.append(out))
        before = model(images)
        accelerate(model)
        after = model(images)
        restore(model)
        handle.remove()
        assert len(seen) == 2, name
        torch.testing.assert_close(seen[1], seen[0])
        torch.testing.assert_close(after, before)


def test_models_without_a_tower_and_other_versions(monkeypatch):
    report = accelerate(timm.create_model("resnet10t", num_classes=2))
    assert report.replaced == () and "no VisionTransformer" in report.note
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.0.0.dev0")
    with pytest.raises(MissingBackendError, match=r"timm 2\.0\.0\.dev0 is not supported; supported: 1\.0 to below 2"):
        accelerate(tower())
