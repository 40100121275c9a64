"""SigLIP in vision-language models: the tower is replaced, the language model is not changed."""

import pytest
import torch
import transformers
from acceleration import assert_close, randomise, run
from tiny_transformers import to

from siglip_kernels.integrations.patching import Accelerated
from siglip_kernels.integrations.transformers import accelerate, restore

IMAGE = 30  # the token that stands for a patch
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
LANGUAGE = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "image_size": 16, "vision_use_head": False}


def paligemma():
    config = transformers.PaliGemmaConfig(
        vision_config=SIGLIP,
        text_config={**LANGUAGE, "model_type": "gemma"},
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        projection_dim=16,
        hidden_size=16,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), ids(4)


def llava():
    config = transformers.LlavaConfig(
        vision_config=SIGLIP,
        text_config={**LANGUAGE, "model_type": "llama"},
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config), ids(4)


def gemma3():
    config = transformers.Gemma3Config(
        vision_config=SIGLIP,
        text_config={**LANGUAGE, "model_type": "gemma3_text"},
        mm_tokens_per_image=1,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )
    return transformers.Gemma3ForConditionalGeneration(config), ids(1)


def idefics3():
    config = transformers.Idefics3Config(
        vision_config={**VISION, "image_size": 16},
        text_config={**LANGUAGE, "model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    arguments = ids(1)
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    mask[1, :, 8:] = False  # the lower half is padding
    return transformers.Idefics3ForConditionalGeneration(config), {
        "input_ids": arguments["input_ids"],
        "pixel_values": arguments["pixel_values"][:, None],
        "pixel_attention_mask": mask,
    }


def ids(patches):
    """Texts that begin with an image, and images."""
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(3, IMAGE, (2, 3), generator=generator)
    input_ids = torch.cat([torch.full((2, patches), IMAGE), text], dim=1)
    return dict(input_ids=input_ids, pixel_values=torch.randn(2, 3, 16, 16, generator=generator))


def language_model(model):
    return [module for name, module in model.named_modules() if "language_model" in name or "text_model" in name]


@pytest.mark.parametrize("make", [paligemma, llava, gemma3, idefics3])
def test_the_tower_is_replaced_and_the_rest_is_not(make):
    model, arguments = make()
    model = randomise(model).eval()

    def call(model):
        return dict(logits=model(**to(model.dtype, arguments)).logits)

    before = run(model, call)
    kinds = [type(module) for module in model.modules()]
    report = accelerate(model)
    language = language_model(model)
    assert language and not any(isinstance(module, Accelerated) for module in language)
    assert all(isinstance(model.get_submodule(entry.path), Accelerated) for entry in report.replaced)
    layers = [entry for entry in report.replaced if entry.module.endswith("EncoderLayer")]
    assert len(layers) == 2
    assert all(entry.operations == ("pre_norm_attention", "pre_norm_mlp") for entry in layers)
    assert all("vision" in entry.path for entry in report.replaced)
    if make is idefics3:
        assert [entry.module for entry in report.left] == ["Idefics3VisionEmbeddings"]
    else:
        assert report.left == () and any(entry.operations == ("patch_embed",) for entry in report.replaced)
    assert_close(run(model, call), before)
    restore(model)
    assert [type(module) for module in model.modules()] == kinds
    after = run(model, call)
    assert torch.equal(after.outputs["logits"], before.outputs["logits"])


def test_generation_with_an_accelerated_tower():
    model, arguments = llava()
    model = randomise(model).eval()
    expected = model.generate(**arguments, max_new_tokens=3, do_sample=False)
    accelerate(model)
    assert torch.equal(model.generate(**arguments, max_new_tokens=3, do_sample=False), expected)
