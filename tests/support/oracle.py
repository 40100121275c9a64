"""transformers' models with random weights, and models of siglip_model with the same weights."""

import torch
import torchvision_operators  # noqa: F401  processes that a test starts import no conftest.py
import transformers

import siglip_model

transformers.logging.set_verbosity_error()

TINY_TEXT = dict(
    vocab_size=99,
    hidden_size=64,
    intermediate_size=144,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=16,
    bos_token_id=None,
    eos_token_id=1,
)
TINY_VISION = dict(
    hidden_size=64, intermediate_size=144, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=16
)
BASE_LIKE = (
    dict(vocab_size=320, hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12),
    dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12, image_size=64),
)
SO400M_LIKE = (
    dict(vocab_size=320, hidden_size=1152, intermediate_size=4304, num_hidden_layers=2, num_attention_heads=16),
    dict(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=2,
        num_attention_heads=16,
        image_size=72,  # five patches of 14 and two remaining pixels, as 384 leaves six
        patch_size=14,
    ),
)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Moves every parameter from its initial value, so that none can be ignored; small tokens make eps matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
            if ".embeddings." in f".{name}":
                parameter.mul_(0.05)
    return model.eval()


def transformers_model(text: dict, vision: dict, implementation: str = "eager") -> transformers.SiglipModel:
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    config._attn_implementation = implementation
    model = randomised(transformers.SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-3.0)
    return model


def same_weights(project: torch.nn.Module, peer: torch.nn.Module) -> torch.nn.Module:
    project.load_state_dict(peer.state_dict())
    return project.eval()


def project_model(peer: transformers.SiglipModel, backend: str) -> siglip_model.SiglipModel:
    config = siglip_model.SiglipConfig.from_dict(peer.config.to_dict())
    return same_weights(siglip_model.SiglipModel(config, backend=backend), peer)


def leaves(output: object, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of an output by its path."""
    if isinstance(output, torch.Tensor):
        return {path: output}
    if output is None:
        return {}
    items = output.items() if hasattr(output, "items") else enumerate(output)  # type: ignore[arg-type, var-annotated]
    return {name: leaf for key, value in items for name, leaf in leaves(value, f"{path}.{key}").items()}


def worst_difference(project: object, peer: object) -> float:
    """The largest absolute difference over every field; the fields themselves must be the same."""
    mine, other = leaves(project), leaves(peer)
    assert mine.keys() == other.keys()
    return max((mine[name] - other[name]).abs().max().item() for name in mine)
