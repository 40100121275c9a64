"""attn_implementation="siglip_triton" in transformers' models: computed, or an error that names the reason."""

from unittest import mock

import pytest
import torch
import transformers
from acceleration import check_acceleration, randomise
from tiny_transformers import contrastive, inputs, naflex_inputs, siglip, siglip2, to, towers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from siglip_kernels import UnsupportedInputError
from siglip_kernels.integrations.transformers import register

NAME = "siglip_triton"
SMALL = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(autouse=True)
def registered():
    register()
    register()  # twice is once
    assert NAME in transformers.AttentionInterface() and NAME in ALL_MASK_ATTENTION_FUNCTIONS


def check(model, call):
    before = model.config._attn_implementation
    check_acceleration(
        model,
        call,
        lambda model: model.set_attn_implementation(NAME),
        lambda model: model.set_attn_implementation(before),
    )


PADDED = torch.tensor([[1] * 8, [1] * 3 + [0] * 5, [0] * 4 + [1] * 4])


@pytest.mark.parametrize("mask", [None, PADDED, torch.ones_like(PADDED)], ids=["none", "padding", "all"])
def test_siglip(mask):
    arguments = inputs() if mask is None else {**inputs(), "attention_mask": mask}
    check(siglip(head_dim=72), contrastive(**arguments))


def test_siglip2_with_padded_patches():
    check(siglip2(), contrastive(**naflex_inputs()))
    arguments = naflex_inputs()
    arguments["pixel_attention_mask"] = arguments["pixel_attention_mask"].flip(1)
    check(siglip2(), contrastive(**arguments))


def test_given_when_the_model_is_made():
    config = transformers.SiglipConfig(**towers())
    model = transformers.SiglipModel._from_config(config, attn_implementation=NAME)
    assert model.vision_model.config._attn_implementation == NAME
    model(**inputs())


def test_another_encoder_with_padding():
    model = randomise(transformers.BertModel(transformers.BertConfig(**SMALL, **NO_DROPOUT))).eval()
    ids = inputs()["input_ids"]
    check(model, lambda model: dict(tokens=model(ids, attention_mask=PADDED).last_hidden_state))


def test_cross_attention_and_images_without_a_mask():
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = randomise(transformers.ViTModel(config)).eval()
    pixels = inputs()["pixel_values"]
    check(model, lambda model: dict(tokens=model(pixels.to(model.dtype)).last_hidden_state))


def test_only_the_tower_of_a_vision_language_model():
    vision = {**towers()["vision_config"], "model_type": "siglip_vision_model"}
    text = dict(**SMALL, model_type="gemma", num_key_value_heads=1, head_dim=8)
    config = transformers.PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=39,
        image_token_id=39,
        projection_dim=16,
        hidden_size=16,
    )
    model = transformers.PaliGemmaForConditionalGeneration._from_config(
        config, attn_implementation={"vision_config": NAME, "text_config": "sdpa"}
    )
    assert model.config.vision_config._attn_implementation == NAME
    ids = torch.cat([torch.full((1, 16), 39), torch.arange(5, 9)[None]], dim=1)
    model(input_ids=ids, pixel_values=inputs(batch=1)["pixel_values"])
    model.set_attn_implementation(NAME)
    with pytest.raises(UnsupportedInputError, match=f'pass attn_implementation={{"vision_config": "{NAME}"}}'):
        model(input_ids=ids, pixel_values=inputs(batch=1)["pixel_values"])


def refused(model, *arguments, match, **named):
    model.set_attn_implementation(NAME)
    with pytest.raises(UnsupportedInputError, match=match):
        model(*arguments, **named)


def test_causal_attention_is_refused():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1)
    refused(
        transformers.LlamaModel(config).eval(), torch.ones(1, 4).long(), match="mask_function is causal_mask_function"
    )
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**SMALL)).eval()
    refused(text, torch.ones(1, 4).long(), match="causal")


def test_sliding_windows_are_refused():
    config = transformers.ModernBertConfig(**SMALL, local_attention=4, global_attn_every_n_layers=2, cls_token_id=1)
    refused(transformers.ModernBertModel(config).eval(), torch.ones(1, 9).long(), match="sliding_window")


def test_dropout_is_refused():
    model = siglip(attention_dropout=0.1).train()
    refused(model, **inputs(), match="dropout is 0.1 in SiglipAttention")
    model.eval()
    model(**inputs())


def test_head_dims_without_a_kernel_are_refused():
    refused(siglip(head_dim=20), **inputs(), match="head dim 20")


def test_other_masks_are_refused():
    model = siglip().text_model
    refused(model, inputs()["input_ids"], attention_mask=torch.ones(3, 8, 8), match="attention_mask has 3 dimensions")
    causal = torch.ones(8, 8).tril().bool().expand(3, 1, 8, 8)
    biases = torch.randn(3, 1, 1, 8)
    for mask in (causal, biases):
        refused(model, inputs()["input_ids"], attention_mask=mask, match="is not a padding mask")


@pytest.mark.parametrize("shape", [(2, 1, 1, 8), (4, 8), (3, 1, 8, 1), (3, 1, 1, 7)])
def test_masks_that_do_not_fit_are_refused(shape):
    from siglip_kernels.integrations.transformers import attention_forward

    q = torch.zeros(3, 2, 8, 8)
    module = siglip().vision_model.encoder.layers[0].self_attn
    with pytest.raises(UnsupportedInputError, match="is not a padding mask"):
        attention_forward(module, q, q, q, torch.ones(shape, dtype=torch.bool))


def test_biases_of_positions_are_refused():
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    refused(transformers.T5EncoderModel(config).eval(), inputs()["input_ids"], match="position_bias is given by T5")


UNSUPPORTED = ["softcap", "s_aux", "sinks", "indices", "position_bias", "output_attentions"]


@pytest.mark.parametrize("value", [1, torch.ones(2)], ids=["number", "tensor"])
@pytest.mark.parametrize("argument", UNSUPPORTED)
def test_what_else_changes_attention_is_refused(argument, value):
    from siglip_kernels.integrations.transformers import attention_forward

    module = siglip().vision_model.encoder.layers[0].self_attn
    q = torch.zeros(1, 2, 4, 8)
    attention_forward(module, q, q, q, None, **{argument: None})
    with pytest.raises(UnsupportedInputError, match=f"{argument} is given by SiglipAttention"):
        attention_forward(module, q, q, q, None, **{argument: value})


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_sequences(batch):
    from siglip_kernels.integrations.transformers import attention_forward

    module = siglip().vision_model.encoder.layers[0].self_attn
    q, k, v = (torch.randn(batch, heads, 6, 8) for heads in (4, 2, 2))
    boundaries = torch.tensor([0, 2, 6, 6 * batch], dtype=torch.int32)
    lengths = dict(cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=6, max_length_k=torch.tensor(6))
    out, weights = attention_forward(module, q, k, v, None, scaling=0.3, **lengths)
    packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v)]
    of = torch.bucketize(torch.arange(6 * batch), boundaries[1:].long(), right=True)
    mask = of[:, None] == of
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.transpose(0, 1) for tensor in packed), mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out.flatten(0, 1), expected.transpose(0, 1))
    assert out.shape == (batch, 6, 4, 8) and weights is None
    with pytest.raises(UnsupportedInputError, match="attention_mask is given with cu_seq_lens_q by SiglipAttention"):
        attention_forward(module, q, k, v, torch.ones(batch, 1, 1, 6, dtype=torch.bool), **lengths)
    with pytest.raises(UnsupportedInputError, match="cu_seqlens_k is NoneType; supported: a tensor"):
        attention_forward(module, q, k, v, None, cu_seq_lens_q=boundaries)


@pytest.mark.parametrize(("name", "packed", "dense"), [(NAME, 0, 4), ("siglip_triton_flash", 1, 0)])
def test_a_vision_tower_that_packs_its_images(name, packed, dense, monkeypatch):
    """Under a name with "flash" in it, transformers calls attention once for all images of Qwen2-VL."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

    from siglip_kernels.integrations import transformers as integration

    config = qwen.Qwen2VLVisionConfig(
        depth=1, embed_dim=32, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=2, spatial_merge_size=2
    )
    tower = qwen.Qwen2VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa").eval()
    randomise(tower)
    grid = torch.tensor([[1, 4, 6], [1, 2, 2], [2, 4, 4]])
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 2 * 2)
    expected = tower(pixels, grid_thw=grid)
    functions = [mock.Mock(wraps=getattr(integration, one)) for one in ("flash_attn_varlen_func", "attend")]
    monkeypatch.setattr(integration, "flash_attn_varlen_func", functions[0])
    monkeypatch.setattr(integration, "attend", functions[1])
    tower.config._attn_implementation = name
    found = tower(pixels, grid_thw=grid)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    assert [function.call_count for function in functions] == [packed, dense]


def test_grouped_queries():
    from siglip_kernels.integrations.transformers import attention_forward

    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    module = siglip().vision_model.encoder.layers[0].self_attn
    out, weights = attention_forward(module, q, k, v, None, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert weights is None


def test_compiled_without_a_break():
    model = siglip().vision_model
    model.set_attn_implementation(NAME)
    pixels = to(torch.float32, inputs())["pixel_values"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels).pooler_output, model(pixels).pooler_output)
    text = siglip().text_model
    text.set_attn_implementation(NAME)
    arguments = dict(input_ids=inputs()["input_ids"], attention_mask=PADDED)
    compiled = torch.compile(text, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments).pooler_output, text(**arguments).pooler_output)
