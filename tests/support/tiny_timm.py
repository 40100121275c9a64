"""Small models of timm's class, with the arguments of its SigLIP towers."""

import timm
from acceleration import randomise
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer


def tower(name="vit_base_patch16_siglip_224", head_dim=8, depth=1, patch=8, **arguments):
    """The named model as timm creates it, except for its size."""
    shape = dict(img_size=4 * patch, patch_size=patch, embed_dim=2 * head_dim, num_heads=2, depth=depth)
    return randomise(timm.create_model(name, **{"num_classes": 0, **shape, **arguments})).eval()


@register_model
def vit_tiny_siglip(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **arguments):
    """For open_clip, which creates its towers by name: so400m's head dim and MLP ratio."""
    model = VisionTransformer(
        **{
            **dict(img_size=28, patch_size=14, embed_dim=144, num_heads=2, depth=1, mlp_ratio=3.7362),
            **dict(class_token=False, global_pool="map"),
            **arguments,
        }
    )
    model.pretrained_cfg = model.default_cfg = {}
    return model
