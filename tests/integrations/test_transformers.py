"""accelerate and restore on transformers' models: results, gradients, and everything that must not change."""

import contextlib
import copy
import inspect
import pickle
import unittest.mock

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from acceleration import assert_bitwise, assert_close, assert_within_budget, check_acceleration, in_fp64, randomise, run
from tiny_transformers import contrastive, inputs, naflex_inputs, pooled, siglip, siglip2, to, towers
from torch import nn

import siglip_kernels
import siglip_model
from siglip_kernels import MissingBackendError, UnsupportedInputError
from siglip_kernels.integrations.patching import Accelerated
from siglip_kernels.integrations.transformers import accelerate, restore


def check(model, call, budget=False):
    return check_acceleration(model, call, accelerate, restore, budget)


@contextlib.contextmanager
def count_calls(name):
    """How often an operation of siglip_kernels is called."""
    calls = [0]
    operation = getattr(siglip_kernels, name)

    def count(*arguments, **named):
        calls[0] += 1
        return operation(*arguments, **named)

    with unittest.mock.patch.object(siglip_kernels, name, count):
        yield calls


def operations(report, path):
    return next(entry.operations for entry in report.replaced if entry.path == path)


LAYER = ("pre_norm_attention", "pre_norm_mlp")


@pytest.mark.parametrize(("head_dim", "dtype"), [(72, torch.float32), (64, torch.float32), (72, torch.bfloat16)])
def test_siglip(head_dim, dtype):
    report = check(siglip(head_dim, layers=2).to(dtype), contrastive(**inputs()), budget=True)
    assert report.left == ()
    for tower in ("text_model", "vision_model"):
        assert all(operations(report, f"{tower}.encoder.layers.{i}") == LAYER for i in range(2))
    assert operations(report, "vision_model.embeddings") == ("patch_embed",)
    assert operations(report, "vision_model.head") == ("attention_pool", "pre_norm_mlp")
    assert operations(report, "") == ("sigmoid_loss",)
    assert operations(report, "text_model.final_layer_norm") == ("layer_norm",)
    shown = str(report)
    assert "vision_model.encoder.layers.0-1 (SiglipEncoderLayer): pre_norm_attention, pre_norm_mlp" in shown


def test_siglip2_with_padded_patches():
    report = check(siglip2(head_dim=72), contrastive(**naflex_inputs()), budget=True)
    assert report.left == ()
    assert operations(report, "vision_model.embeddings") == ("linear",)


def test_padded_patches_are_served_by_lengths(monkeypatch):
    """Without a mask: the layer and the pooling of siglip_kernels receive the number of valid patches."""
    import siglip_kernels

    seen = []
    layer, pool = siglip_kernels.pre_norm_attention, siglip_kernels.attention_pool
    monkeypatch.setattr(
        siglip_kernels, "pre_norm_attention", lambda *a, **k: seen.append(k["lengths"]) or layer(*a, **k)
    )
    monkeypatch.setattr(siglip_kernels, "attention_pool", lambda *a, **k: seen.append(k["lengths"]) or pool(*a, **k))
    model = siglip2().vision_model
    accelerate(model)
    arguments = naflex_inputs()
    del arguments["input_ids"]
    model(**arguments)
    assert len(seen) == 2 and all(lengths.tolist() == [16, 6, 15] for lengths in seen)


def test_padded_patches_in_any_place():
    arguments = naflex_inputs()
    arguments["pixel_attention_mask"] = arguments["pixel_attention_mask"].flip(1)
    check(siglip2(), contrastive(**arguments))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_of_padded_text(implementation):
    model = siglip().text_model
    model.set_attn_implementation(implementation)
    ids = inputs()["input_ids"]
    end = torch.arange(8) < torch.tensor([8, 3, 5])[:, None]
    for mask in (end.long(), end.flip(1).long(), torch.ones_like(ids)):

        def call(model, mask=mask):
            return dict(tokens=model(input_ids=ids, attention_mask=mask).last_hidden_state)

        check(model, call)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_samples_that_are_nothing_but_padding(implementation):
    """Eager attention and the head average their padding, sdpa gives zeros: as before, and so do the other samples."""
    model, arguments = siglip2(), naflex_inputs()
    model.set_attn_implementation(implementation)
    arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    for name in ("attention_mask", "pixel_attention_mask"):
        arguments[name][1] = 0
    check(model, contrastive(**arguments))


CAUSAL = torch.ones(8, 8).tril().bool()


@pytest.mark.parametrize(
    "mask", [CAUSAL.expand(3, 1, 8, 8), CAUSAL[3, None, None, None], CAUSAL[:3, 1, None, None, None]]
)
def test_masks_of_other_forms(mask):
    """Causal; padding that all samples share; a choice of samples instead of keys."""
    model, ids = siglip().text_model, inputs()["input_ids"]
    check(model, lambda model: dict(tokens=model(input_ids=ids, attention_mask=mask).last_hidden_state))


@pytest.mark.parametrize("side", [32, 48, 37])
def test_interpolated_positions(side):
    def call(model):
        pixels = to(model.dtype, inputs(side=side))["pixel_values"]
        return dict(pooled=model(pixels, interpolate_pos_encoding=True).pooler_output)

    check(siglip().vision_model, call)


def test_a_wrong_number_of_pixels_is_the_error_that_it_was():
    model = siglip().vision_model
    pixels = inputs(side=48)["pixel_values"]
    with pytest.raises(RuntimeError) as before:
        model(pixels)
    accelerate(model)
    with pytest.raises(RuntimeError) as after:
        model(pixels)
    assert str(before.value) == str(after.value)


def test_classification_towers_without_head_and_what_is_returned():
    config = transformers.SiglipConfig(**towers())
    classifier = randomise(transformers.SiglipForImageClassification(config)).eval()
    pixels = inputs()["pixel_values"]
    check(classifier, lambda model: dict(logits=model(pixels.to(model.dtype)).logits))
    config.vision_config.vision_use_head = False
    headless = randomise(transformers.SiglipVisionModel(config.vision_config)).eval()
    check(headless, lambda model: dict(tokens=model(pixels.to(model.dtype)).last_hidden_state))


def test_outputs_keep_their_form():
    model, arguments = siglip(), inputs()
    before = {}
    for state in ("before", "after"):
        if state == "after":
            accelerate(model)
        output = model(**arguments, return_loss=True, output_hidden_states=True)
        as_tuple = model(**arguments, return_loss=True, return_dict=False)
        by_place = model(arguments["input_ids"], arguments["pixel_values"], None, None, True)
        plain = model(**arguments)
        found = (
            list(output),
            list(plain),
            list(by_place),
            len(as_tuple),
            [len(tower.hidden_states) for tower in (output.text_model_output, output.vision_model_output)],
            inspect.signature(model.forward),
            repr(model),
        )
        before.setdefault("found", found)
        assert found == before["found"]
        before.setdefault("states", output.vision_model_output.hidden_states)
        for one, other in zip(before["states"], output.vision_model_output.hidden_states, strict=True):
            torch.testing.assert_close(one, other)


def test_loss_needs_as_many_images_as_texts():
    model, arguments = siglip(), inputs()
    arguments["input_ids"] = arguments["input_ids"][:2]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must match"):
            model(**arguments, return_loss=True)
        assert model(**arguments).loss is None
        accelerate(model)


def test_arguments_that_do_not_fit_are_the_errors_that_they_were():
    model, arguments = siglip(), inputs()
    ids, pixels = arguments["input_ids"], arguments["pixel_values"]
    for _ in range(2):
        with pytest.raises(TypeError, match="positional arguments but 8 were given"):
            model(ids, pixels, None, None, True, None, None)
        with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
            model(ids, **arguments)
        accelerate(model)


def test_attention_of_ones_own_is_called():
    """An implementation that was registered under another name may compute anything."""

    def sharpened(module, query, key, value, mask, scaling, **arguments):
        out = nn.functional.scaled_dot_product_attention(query, key, value, scale=3 * scaling)
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("sharpened", sharpened)
    model, call = siglip().vision_model, pooled(inputs()["pixel_values"])
    model.set_attn_implementation("sharpened")
    report = check(model, call)
    assert [entry.reason for entry in report.left] == [
        "its attention is 'sharpened', which may not be softmax attention"
    ]
    model.set_attn_implementation("sdpa")
    accelerate(model)
    model.set_attn_implementation("sharpened")
    after = run(model, call)
    restore(model)
    assert_close(after, run(model, call))


def test_weights_of_attention_come_from_transformers():
    model, arguments = siglip(), inputs()
    model.set_attn_implementation("eager")
    before = model.vision_model(arguments["pixel_values"], output_attentions=True)
    accelerate(model)
    after = model.vision_model(arguments["pixel_values"], output_attentions=True)
    assert len(after.attentions) == 1
    for one, other in zip(before.attentions, after.attentions, strict=True):
        torch.testing.assert_close(one, other)


def test_twice_is_once_and_restore_alone_is_harmless():
    model, call = siglip(), contrastive(**inputs())
    restore(model)
    first = accelerate(model)
    results = run(model, call)
    assert accelerate(model) == first
    assert_bitwise(run(model, call), results)
    restore(model)
    restore(model)
    assert not any(isinstance(module, Accelerated) for module in model.modules())


def test_copies_and_pickles_stay_accelerated():
    model = siglip()
    accelerate(model)
    expected = model(**inputs(), return_loss=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(type(a) is type(b) for a, b in zip(other.modules(), model.modules(), strict=True))
        assert torch.equal(other(**inputs(), return_loss=True).loss, expected.loss)
        restore(other)
        assert type(other) is transformers.SiglipModel
    assert type(model) is not transformers.SiglipModel


def test_saved_as_before(tmp_path):
    model = siglip()
    model.save_pretrained(tmp_path / "before")
    accelerate(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = transformers.SiglipModel.from_pretrained(tmp_path / "after")
    assert type(loaded) is transformers.SiglipModel
    accelerate(loaded)
    assert torch.equal(loaded.eval()(**inputs()).logits_per_text, model(**inputs()).logits_per_text)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """The kernels recompute the layer for the backward, and the gradients are those without checkpointing."""
    model, call = siglip().vision_model.train(), pooled(inputs()["pixel_values"])
    if reentrant:  # which needs an input with a gradient
        model.embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    accelerate(model)
    plain = run(model, call)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with count_calls("pre_norm_mlp") as calls:
        checkpointed = run(model, call)
    assert calls == [2 + 1]  # the layer twice, the head once
    assert_bitwise(checkpointed, plain)


def test_hooks_see_what_they_saw():
    """On every module inside a layer: called once per forward, with transformers' values, and able to change them."""
    model, pixels = siglip().vision_model, inputs()["pixel_values"]
    layer = model.encoder.layers[0]
    names = ("layer_norm1", "self_attn", "self_attn.q_proj", "self_attn.out_proj", "layer_norm2", "mlp", "mlp.fc1")
    for name in (*names, "mlp.activation_fn"):
        restore(model)
        seen, module = [], layer.get_submodule(name)

        def double(module, arguments, output, seen=seen):
            output = output[0] if isinstance(output, tuple) else output
            seen.append(output.detach().clone())
            return (output * 2, None) if module is layer.self_attn else output * 2

        handle = module.register_forward_hook(double)
        before = model(pixels).last_hidden_state
        accelerate(model)
        after = model(pixels).last_hidden_state
        handle.remove()
        assert len(seen) == 2, name
        torch.testing.assert_close(seen[1], seen[0])
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_see_what_they_saw(kind):
    model, pixels, seen = siglip().vision_model, inputs()["pixel_values"], []
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(pixels).pooler_output.sum().backward()
        count = len(seen)
        accelerate(model)
        model(pixels).pooler_output.sum().backward()
    finally:
        handle.remove()
    assert count > 10 and sorted(seen[count:]) == sorted(seen[:count])


def test_restored_below_what_keeps_a_modules_forward():
    """accelerate's hooks call the forward that they found and set it again."""
    model, call = siglip().vision_model, pooled(inputs()["pixel_values"])
    before = run(model, call)
    accelerate(model)
    layer = model.encoder.layers[0]
    for module in (layer, layer.mlp, layer.layer_norm1, model.head):
        add_hook_to_module(module, ModelHook())
    assert_close(run(model, call), before)
    restore(model)
    assert_bitwise(run(model, call), before)
    remove_hook_from_submodules(model)
    assert_bitwise(run(model, call), before)


def test_dropout_in_training_is_transformers():
    model, call = siglip(attention_dropout=0.5).vision_model, pooled(inputs()["pixel_values"])
    report = accelerate(model)
    assert any("attention_dropout is 0.5" in remark for entry in report.replaced for remark in entry.remarks)
    restore(model)
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(5)
        before = run(model, call)
        accelerate(model)
        torch.manual_seed(5)
        assert_close(run(model, call), before)
        restore(model)


def test_what_cannot_be_served_is_named_and_left():
    class OwnAttention(type(siglip().text_model.encoder.layers[0].self_attn)):
        def forward(self, hidden_states, **arguments):
            return super().forward(hidden_states, **arguments)[0] * 2, None

    class OwnLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 3

    model = siglip(layers=2)
    text, vision = model.text_model.encoder.layers, model.vision_model.encoder.layers
    text[0].self_attn.__class__ = OwnAttention
    text[0].mlp.fc2.__class__ = OwnLinear
    vision[0].mlp.activation_fn = nn.SiLU()
    vision[0].self_attn.v_proj = nn.Linear(16, 16, bias=False)
    vision[1].layer_norm1.forward = lambda x: x * 2
    report = check(model, contrastive(**inputs()))
    reasons = {entry.path: entry.reason for entry in report.left}
    assert "OwnAttention is a subclass of" in reasons["text_model.encoder.layers.0.self_attn"]
    assert "OwnLinear" in reasons["text_model.encoder.layers.0.mlp"]
    assert "SiLU" in reasons["vision_model.encoder.layers.0.mlp"]
    assert "a forward was set on the instance" in reasons["vision_model.encoder.layers.1.layer_norm1"]
    assert operations(report, "vision_model.encoder.layers.1") == ("attention", "linear", "pre_norm_mlp")
    remarks = next(e.remarks for e in report.replaced if e.path == "vision_model.encoder.layers.0")
    assert any("v_proj lacks a weight or bias" in remark for remark in remarks) and any("SiLU" in r for r in remarks)


def test_a_model_of_ones_own_class_is_named():
    class Own(transformers.SiglipModel):
        pass

    report = check(randomise(Own(transformers.SiglipConfig(**towers()))).eval(), contrastive(**inputs()))
    assert [entry.path for entry in report.left] == [""]
    assert "Own is a subclass of" in report.left[0].reason and "SiglipModel with its own code" in report.left[0].reason


def test_head_dims_without_a_kernel_are_left():
    model = siglip(head_dim=20)
    report = check(model, contrastive(**inputs()))
    reasons = {entry.path: entry.reason for entry in report.left}
    assert "head dim is 20" in reasons["vision_model.encoder.layers.0.self_attn"]


def test_fp64_is_computed_as_before():
    model, call = siglip().double(), contrastive(**inputs())
    before = run(model, call)
    report = accelerate(model)
    assert "torch.float64" in report.note
    assert_bitwise(run(model, call), before)


def test_autocast():
    model, call = siglip(head_dim=64), contrastive(**inputs())
    truth = in_fp64(model, call)
    with torch.autocast("cpu", torch.bfloat16):
        before = run(model, call)
        accelerate(model)
        after = run(model, call)
    assert_within_budget(after, before, truth, torch.bfloat16)


def test_a_model_without_siglip_is_reported():
    report = accelerate(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
    assert report.replaced == () and "no encoder of SigLIP's form" in report.note
    with pytest.raises(UnsupportedInputError, match="accelerate: model is a str"):
        accelerate("google/siglip-base-patch16-224")
    with pytest.raises(UnsupportedInputError, match="restore: model is a str"):
        restore("google/siglip-base-patch16-224")


def test_siglip_models_own_model_is_left():
    """Its layers, which the recognition of other towers takes for layers with a LayerNorm, have the kernels already."""
    config = siglip_model.SiglipConfig.from_dict(siglip().config.to_dict())
    model = siglip_model.SiglipModel(config)
    for whole in (model, nn.Sequential(model)):
        report = accelerate(whole)
        assert report.replaced == report.left == () and "model.set_backend('triton')" in report.note
    assert not any(isinstance(module, Accelerated) for module in model.modules())


def test_other_versions_are_named_and_nothing_changes(monkeypatch):
    model = siglip()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "6.0.1")
    with pytest.raises(MissingBackendError, match=r"transformers 6\.0\.1 is not supported; supported: 4\.50 to"):
        accelerate(model)
    assert type(model) is transformers.SiglipModel


def test_restore_refuses_what_was_subclassed_since():
    model = siglip()
    accelerate(model)
    layer = model.vision_model.encoder.layers[0]
    made = type(layer)
    layer.__class__ = type("FSDPSiglipEncoderLayer", (made,), {})  # as fully_shard does
    with pytest.raises(UnsupportedInputError, match=r"FSDPSiglipEncoderLayer at vision_model\.encoder\.layers\.0"):
        restore(model)
    layer.__class__ = made
    restore(model)
    assert type(layer).__name__ == "SiglipEncoderLayer" and type(layer).__mro__[1].__name__ != "EncoderLayer"
