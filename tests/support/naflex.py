"""SigLIP 2 models at native resolution, of transformers and of siglip_model with the same weights, and their inputs."""

import torch
import transformers
from oracle import TINY_TEXT, TINY_VISION, randomised, same_weights

import siglip_model

VISION = {name: value for name, value in TINY_VISION.items() if name != "image_size"} | {"num_patches": 16}
VALUES = 3 * VISION["patch_size"] ** 2
MIXED = ((4, 4), (2, 3), (1, 1), (3, 7), (9, 2))


def peer_config(implementation: str = "eager", **vision: object) -> transformers.Siglip2Config:
    config = transformers.Siglip2Config(text_config=TINY_TEXT, vision_config={**VISION, **vision})
    config._attn_implementation = implementation
    return config


def peer_model(implementation: str = "eager", **vision: object) -> transformers.Siglip2Model:
    model = randomised(transformers.Siglip2Model(peer_config(implementation, **vision)))
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight.mul_(20)  # `randomised` makes it small
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-3.0)
    return model


def project_model(peer: transformers.Siglip2Model, backend: str) -> siglip_model.Siglip2Model:
    config = siglip_model.Siglip2Config.from_dict(peer.config.to_dict())
    return same_weights(siglip_model.Siglip2Model(config, backend=backend), peer)


def images(shapes: tuple[tuple[int, int], ...] = MIXED, patches: int = 24) -> dict[str, torch.Tensor]:
    """Images of these heights and widths in patches, padded with noise, which no result may depend on."""
    counts = torch.tensor([height * width for height, width in shapes])
    return {
        "pixel_values": torch.randn(len(shapes), patches, VALUES),
        "pixel_attention_mask": (torch.arange(patches) < counts[:, None]).int(),
        "spatial_shapes": torch.tensor(shapes),
    }


def texts(count: int = len(MIXED)) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, TINY_TEXT["vocab_size"], (count, TINY_TEXT["max_position_embeddings"]))}
