"""SigLIP models of transformers, as small as tests of their mechanics allow, with selectable head dims."""

import torch
from acceleration import randomise
from transformers import (
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

TEXT = dict(vocab_size=40, max_position_embeddings=8, bos_token_id=1, eos_token_id=1)


def towers(head_dim=8, layers=1, **both):
    """Arguments for a SiglipConfig: text_config and vision_config, of one width."""
    shape = dict(hidden_size=2 * head_dim, num_attention_heads=2, intermediate_size=3 * head_dim + 1)
    shape = dict(**shape, num_hidden_layers=layers, **both)
    return dict(text_config={**TEXT, **shape}, vision_config=dict(image_size=32, patch_size=8, **shape))


def siglip(head_dim=8, layers=1, **both):
    return randomise(SiglipModel(SiglipConfig(**towers(head_dim, layers, **both)))).eval()


def siglip2(head_dim=8, layers=1, **both):
    arguments = towers(head_dim, layers, **both)
    vision = {**arguments["vision_config"], "num_patches": 16}
    del vision["image_size"]
    return randomise(Siglip2Model(Siglip2Config(text_config=arguments["text_config"], vision_config=vision))).eval()


def inputs(batch=3, side=32, tokens=8):
    generator = torch.Generator().manual_seed(2)
    return dict(
        input_ids=torch.randint(2, 40, (batch, tokens), generator=generator),
        pixel_values=torch.randn(batch, 3, side, side, generator=generator),
    )


def naflex_inputs(shapes=((4, 4), (2, 3), (3, 5)), patches=16, tokens=8):
    """Padded images of these heights and widths in patches, with a padding mask."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([height * width for height, width in shapes])
    return dict(
        input_ids=torch.randint(2, 40, (len(shapes), tokens), generator=generator),
        pixel_values=torch.randn(len(shapes), patches, 3 * 8 * 8, generator=generator),
        pixel_attention_mask=(torch.arange(patches) < lengths[:, None]).long(),
        spatial_shapes=torch.tensor(shapes),
    )


def to(dtype, inputs):
    """Floating-point inputs in the dtype."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def contrastive(**arguments):
    """A call of a SigLIP model that returns everything it computes."""

    def call(model):
        output = model(**to(model.dtype, arguments), return_loss=True)
        return dict(
            loss=output.loss,
            logits=output.logits_per_image,
            image_embeds=output.image_embeds,
            text_embeds=output.text_embeds,
            patches=output.vision_model_output.last_hidden_state,
            tokens=output.text_model_output.last_hidden_state,
        )

    return call


def pooled(pixels):
    """A call of a vision tower."""

    def call(model):
        return dict(pooled=model(pixels.to(model.dtype)).pooler_output)

    return call
