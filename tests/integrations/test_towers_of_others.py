"""Towers that descend from SigLIP's under other classes: what is replaced in each, and that nothing else changes."""

import copy
import pickle

import pytest
import torch
import transformers
from acceleration import assert_close, check_acceleration, randomise, run
from tiny_transformers import to
from transformers.models.cosmos3_edge.modeling_cosmos3_edge import Cosmos3EdgeVisionConfig, Cosmos3EdgeVisionModel
from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6VisionConfig, MiniCPMV4_6VisionModel
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVisionConfig, PaddleOCRVisionModel
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import (
    Phi4MultimodalVisionConfig,
    Phi4MultimodalVisionModel,
)
from transformers.models.video_llama_3.modeling_video_llama_3 import VideoLlama3VisionConfig, VideoLlama3VisionModel

from siglip_kernels.integrations.transformers import accelerate, restore

WIDTH, SIDE, PATCH = 48, 16, 4  # three heads of 16, or two of 24; four by four patches
SHAPE = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=3)
IMAGES = dict(image_size=SIDE, patch_size=PATCH)
FUSED = ("pre_norm_attention", "pre_norm_mlp")


def pixels(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def vision(kind, config, **arguments):
    """A vision tower and a call of it."""
    arguments = arguments or dict(pixel_values=pixels(2, 3, SIDE, SIDE))

    def call(model):
        return dict(tokens=model(**to(model.dtype, arguments)).last_hidden_state)

    return randomise(kind(config)).eval(), call


def aimv2():
    config = transformers.Aimv2VisionConfig(**SHAPE, **IMAGES, intermediate_size=40, qkv_bias=True)
    return vision(transformers.Aimv2VisionModel, config)


def cosmos3_edge():
    config = Cosmos3EdgeVisionConfig(**SHAPE, intermediate_size=70, patch_size=PATCH, num_patches=16)
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    return vision(Cosmos3EdgeVisionModel, config, pixel_values=pixels(24, 3 * PATCH**2), grid_thw=grid)


def gemma4():
    config = transformers.Gemma4VisionConfig(
        **SHAPE, num_key_value_heads=3, head_dim=16, intermediate_size=40, patch_size=PATCH, pooling_kernel_size=2
    )
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), dim=-1).reshape(1, 16, 2)
    patches = pixels(1, 16, 3 * PATCH**2)
    return vision(transformers.Gemma4VisionModel, config, pixel_values=patches, pixel_position_ids=places)


def janus():
    config = transformers.JanusVisionConfig(**SHAPE, **IMAGES, mlp_ratio=1.5, hidden_act="gelu_pytorch_tanh")
    return vision(transformers.JanusVisionModel, config)


def metaclip_2():
    text = dict(**SHAPE, intermediate_size=70, vocab_size=40, max_position_embeddings=8, eos_token_id=1, bos_token_id=0)
    config = transformers.MetaClip2Config(
        vision_config=dict(**SHAPE, **IMAGES, intermediate_size=70, hidden_act="gelu_pytorch_tanh"),
        text_config={**text, "hidden_act": "gelu_pytorch_tanh"},
        projection_dim=16,
    )
    ids = torch.randint(2, 40, (2, 8), generator=torch.Generator().manual_seed(5))
    ids[:, 6] = 1
    arguments = dict(input_ids=ids, pixel_values=pixels(2, 3, SIDE, SIDE))

    def call(model):
        output = model(**to(model.dtype, arguments))
        return dict(image=output.image_embeds, text=output.text_embeds)

    return randomise(transformers.MetaClip2Model(config)).eval(), call


def minicpmv4_6():
    config = MiniCPMV4_6VisionConfig(**SHAPE, **IMAGES, intermediate_size=70, insert_layer_id=0)
    sizes = torch.tensor([[4, 4], [2, 4]], dtype=torch.int32)
    row = pixels(1, 3, PATCH, 24 * PATCH)
    return vision(MiniCPMV4_6VisionModel, config, pixel_values=row, target_sizes=sizes)


def ovis2():
    config = transformers.models.ovis2.Ovis2VisionConfig(
        **SHAPE, **IMAGES, intermediate_size=40, qkv_bias=True, vocab_size=48, num_visual_indicator_tokens=5
    )
    return vision(transformers.models.ovis2.modeling_ovis2.Ovis2VisionModel, config)


def paddleocr_vl():
    config = PaddleOCRVisionConfig(**SHAPE, **IMAGES, intermediate_size=70)
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    return vision(PaddleOCRVisionModel, config, pixel_values=pixels(1, 24, 3, PATCH, PATCH), grid_thw=grid)


def phi4_multimodal():
    config = Phi4MultimodalVisionConfig(**SHAPE, **IMAGES, crop_size=SIDE, intermediate_size=70)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, 2:] = False  # the lower half is padding
    return vision(Phi4MultimodalVisionModel, config, pixel_values=pixels(2, 3, SIDE, SIDE), patch_attention_mask=mask)


def step3p7():
    config = transformers.models.step3p7.Step3p7VisionConfig(**SHAPE, **IMAGES, mlp_ratio=1.5)
    return vision(transformers.models.step3p7.modeling_step3p7.Step3p7VisionModel, config)


def tipsv2():
    config = transformers.Tipsv2Config(
        vision_config=dict(**SHAPE, **IMAGES, mlp_ratio=1.5, hidden_act="gelu_pytorch_tanh"),
        text_config=dict(**SHAPE, intermediate_size=70, vocab_size=40, max_position_embeddings=8),
    )
    ids = torch.randint(2, 40, (2, 8), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(8) < torch.tensor([8, 5])[:, None]).long()
    arguments = dict(input_ids=ids, attention_mask=mask, pixel_values=pixels(2, 3, SIDE, SIDE))

    def call(model):
        output = model(**to(model.dtype, arguments))
        return dict(image=output.image_embeds, text=output.text_embeds)

    return randomise(transformers.Tipsv2Model(config)).eval(), call


def video_llama_3():
    config = VideoLlama3VisionConfig(**SHAPE, intermediate_size=70, patch_size=PATCH)
    grid, merge = torch.tensor([[1, 4, 4], [2, 2, 4]]), torch.tensor([1, 1])
    patches = pixels(32, 3 * PATCH**2)
    return vision(VideoLlama3VisionModel, config, pixel_values=patches, grid_thw=grid, merge_sizes=merge)


CALLED_MLP = ("pre_norm_attention", "layer_norm")
PARTS = dict(LayerNorm=("layer_norm",))
PACKED, ROTARY = "needs cu_seqlens (packed sequences)", "position_embeddings (rotary positions)"
GATED = "also has gate_proj"

# The operations of each class that is replaced, and why the others are left.
MODELS = {
    aimv2: (
        dict(
            Aimv2Encoder=("attention",), Aimv2EncoderLayer=("attention", "linear"), Aimv2Attention=("attention",)
        ),  # RMSNorm
        dict(Aimv2MLP=GATED),
    ),
    cosmos3_edge: (
        dict(**PARTS, Cosmos3EdgeMLP=("mlp",)),
        dict(Cosmos3EdgeVisionEncoderLayer=PACKED, Cosmos3EdgeVisionAttention=PACKED),
    ),
    gemma4: (
        {},
        dict(
            Gemma4VisionEncoderLayer="also has pre_feedforward_layernorm",
            Gemma4VisionAttention="also has q_norm, k_norm, v_norm",
            Gemma4VisionMLP=GATED,
        ),
    ),
    janus: (
        dict(
            **PARTS,
            JanusVisionEncoder=("attention",),
            JanusVisionEncoderLayer=FUSED,
            JanusVisionAttention=("attention",),
            JanusVisionMLP=("mlp",),
        ),
        {},
    ),
    metaclip_2: (
        dict(
            **PARTS,
            MetaClip2Encoder=("attention",),
            MetaClip2EncoderLayer=FUSED,
            MetaClip2Attention=("attention",),
            MetaClip2MLP=("mlp",),
        ),
        {},
    ),
    minicpmv4_6: (
        dict(**PARTS, MiniCPMV4_6VisionEncoderLayer=("layer_norm", "pre_norm_mlp"), MiniCPMV4_6VisionMLP=("mlp",)),
        dict(MiniCPMV4_6VisionAttention=PACKED),
    ),
    ovis2: (
        dict(
            **PARTS,
            Ovis2VisionEncoder=("attention",),
            Ovis2VisionEncoderLayer=("attention", "linear"),
            Ovis2VisionAttention=("attention",),
        ),
        dict(Ovis2MLP=GATED),
    ),
    paddleocr_vl: (
        dict(**PARTS, PaddleOCRVisionMLP=("mlp",)),
        dict(PaddleOCRVisionEncoderLayer=f"{PACKED}, {ROTARY}", PaddleOCRVisionAttention=f"{PACKED}, {ROTARY}"),
    ),
    phi4_multimodal: (
        dict(
            **PARTS,
            Phi4MultimodalVisionEncoder=("attention",),
            Phi4MultimodalVisionEncoderLayer=FUSED,
            Phi4MultimodalVisionAttention=("attention",),
            Phi4MultimodalVisionMLP=("mlp",),
        ),
        {},
    ),
    step3p7: (
        PARTS,
        dict(
            Step3p7VisionEncoderLayer="also has lambda_1, lambda_2",
            Step3p7VisionAttention=f"needs {ROTARY}",
            Step3p7VisionMLP="QuickGELUActivation() is called normally",
        ),
    ),
    tipsv2: (
        dict(
            **PARTS,
            Tipsv2TextEncoder=("attention",),
            Tipsv2TextEncoderLayer=CALLED_MLP,
            Tipsv2TextAttention=("attention",),
            Tipsv2VisionAttention=("attention",),
            Tipsv2VisionMLP=("mlp",),
        ),
        dict(Tipsv2MLP="ReLU() is called normally", Tipsv2VisionLayer="also has layer_scale1, layer_scale2"),
    ),
    video_llama_3: (
        dict(**PARTS, VideoLlama3VisionMLP=("mlp",)),
        dict(VideoLlama3VisionEncoderLayer=f"{PACKED}, {ROTARY}", VideoLlama3VisionAttention=f"{PACKED}, {ROTARY}"),
    ),
}


@pytest.mark.parametrize("make", MODELS)
def test_tower(make):
    replaced, left = MODELS[make]
    model, call = make()
    report = check_acceleration(model, call, accelerate, restore, budget=True)
    assert {entry.module: entry.operations for entry in report.replaced} == replaced
    assert {entry.module for entry in report.left} == left.keys()
    for entry in report.left:
        assert left[entry.module] in entry.reason


@pytest.mark.parametrize(
    "options, asked, checkpointing",
    [
        (dict(attention_bias=False), dict(output_hidden_states=[0, -1]), None),
        (dict(hidden_act="quick_gelu"), dict(output_hidden_states=True, output_attentions=True), None),
        (dict(num_attention_heads=2), {}, dict(use_reentrant=True)),
    ],
    ids=["no bias", "other outputs", "checkpoints"],
)
def test_options_of_a_tower(options, asked, checkpointing):
    config = transformers.JanusVisionConfig(
        **{**SHAPE, **IMAGES, "mlp_ratio": 1.5, "hidden_act": "gelu_pytorch_tanh", **options}
    )
    config._attn_implementation = "eager"  # which returns attention weights
    model, _ = vision(transformers.JanusVisionModel, config)
    if checkpointing:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)

    def call(model):
        output = model(pixels(2, 3, SIDE, SIDE), **asked)
        states = {f"state {number}": state for number, state in enumerate(output.hidden_states or ())}
        weights = {f"weights {number}": weights for number, weights in enumerate(output.attentions or ())}
        found = dict(tokens=output.last_hidden_state, pooled=output.pooler_output, **states, **weights)
        return {name: value for name, value in found.items() if value is not None}

    assert check_acceleration(model, call, accelerate, restore).replaced


def test_compiled_copied_and_pickled():
    """What replaces a recognised layer finds its parts by name at every call."""
    model, _ = janus()
    layer, x = model.encoder.layers[0], pixels(2, 5, WIDTH)
    assert accelerate(layer).left == ()
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None, None, None]
    expected = layer(x, mask)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, mask), expected)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert [type(module) for module in other.modules()] == [type(module) for module in layer.modules()]
        assert torch.equal(other(x, mask), expected)


def test_verification_passes_over_what_needs_more_arguments():
    """A layer of packed sequences cannot run on random tokens alone; its MLP and LayerNorms can."""
    model, _ = minicpmv4_6()
    report = accelerate(model, verify=True)
    assert [entry.module for entry in report.left] == ["MiniCPMV4_6VisionAttention"] * 2
    assert "9 of 11 modules" in report.note


def test_hooks_see_what_they_saw():
    """Also the arguments by position, which layers of other classes pass differently."""
    config = transformers.ViTConfig(**{**SHAPE, "num_hidden_layers": 1}, **IMAGES, intermediate_size=70)
    model, call = vision(transformers.ViTModel, config)
    seen = []
    attention = model.get_submodule("layers.0.attention")
    attention.register_forward_pre_hook(lambda module, arguments: seen.append([type(value) for value in arguments]))
    before = run(model, call)
    report = accelerate(model)
    remarks = next(entry.remarks for entry in report.replaced if entry.path == "layers.0")
    assert any("attention has hooks" in remark for remark in remarks)
    assert_close(run(model, call), before)
    assert seen == [[torch.Tensor, type(None)]] * 2


def text(kind, **arguments):
    """A language model that computes its MLPs and norms much as SigLIP does."""
    shape = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=3, vocab_size=40, pad_token_id=0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**shape, **arguments))
    return randomise(model).eval()


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("Llama", dict(intermediate_size=70, num_key_value_heads=3)),
        ("OPT", dict(ffn_dim=70, word_embed_proj_dim=WIDTH, activation_function="gelu_pytorch_tanh")),
        ("Phi", dict(intermediate_size=70)),
        ("Starcoder2", dict(intermediate_size=70, num_key_value_heads=3)),
    ],
)
def test_language_models_are_not_changed(kind, arguments):
    report = accelerate(text(kind, **arguments))
    assert report.replaced == report.left == () and "no encoder of SigLIP's form is in it" in report.note


def clip(implementation):
    """Its text is causal: by an argument in sdpa, by a mask in eager attention."""
    parts = dict(**SHAPE, intermediate_size=70, hidden_act="gelu_pytorch_tanh")
    config = transformers.CLIPConfig(
        vision_config={**parts, **IMAGES},
        text_config=dict(**parts, vocab_size=40, max_position_embeddings=8, eos_token_id=1, bos_token_id=0),
        projection_dim=16,
    )
    model = randomise(transformers.CLIPModel(config)).eval()
    model.set_attn_implementation(implementation)
    ids = torch.randint(2, 40, (2, 8), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(8) < torch.tensor([8, 5])[:, None]).long()

    def call(model):
        output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels(2, 3, SIDE, SIDE).to(model.dtype))
        return dict(image=output.image_embeds, text=output.text_embeds)

    return model, call


@pytest.mark.thorough
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_clip(implementation):
    check_acceleration(*clip(implementation), accelerate, restore, budget=True)


@pytest.mark.thorough
def test_dropout_in_training():
    config = transformers.ViTConfig(**SHAPE, **IMAGES, intermediate_size=70, hidden_dropout_prob=0.4)
    model, call = vision(transformers.ViTModel, config)
    model.train()

    def seeded(model):
        torch.manual_seed(8)
        return call(model)

    report = check_acceleration(model, seeded, accelerate, restore)
    assert any(entry.module == "ViTLayer" for entry in report.replaced)
