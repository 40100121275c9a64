"""Parts of the models are called, and seen by hooks, as transformers' are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from oracle import TINY_TEXT, TINY_VISION, worst_difference
from torch import Tensor, nn

import siglip_model

IDS = torch.randint(0, TINY_TEXT["vocab_size"], (2, 7))
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
PIXELS = torch.randn(2, 3, TINY_VISION["image_size"], TINY_VISION["image_size"])


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """(this project's model, transformers') with the same weights."""
    torch.manual_seed(0)
    theirs = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=TINY_TEXT, vision_config=TINY_VISION)
    ).eval()
    config = siglip_model.SiglipConfig(text_config=TINY_TEXT, vision_config=TINY_VISION)
    ours = siglip_model.SiglipModel(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


CALLS = {
    "vision embeddings": lambda model: model.vision_model.embeddings(PIXELS),
    "interpolated": lambda model: model.vision_model.embeddings(PIXELS[..., :32], interpolate_pos_encoding=True),
    "text embeddings": lambda model: model.text_model.embeddings(IDS),
    "by name": lambda model: model.text_model.embeddings(input_ids=IDS, position_ids=torch.arange(7)[None].flip(1)),
    "of embeddings": lambda model: model.text_model.embeddings(
        inputs_embeds=torch.ones(2, 7, TINY_TEXT["hidden_size"])
    ),
    "encoder": lambda model: model.vision_model.encoder(inputs_embeds=hidden(9)).last_hidden_state,
    "encoder's output by position": lambda model: model.vision_model.encoder(hidden(9))[0],
    "layer": lambda model: model.vision_model.encoder.layers[1](hidden(9), None),
    "layer by name": lambda model: model.vision_model.encoder.layers[1](hidden_states=hidden(9), attention_mask=None),
    "layer with a mask": lambda model: model.text_model.encoder.layers[0](
        hidden(7), MASK.bool()[:, None, None].expand(2, 1, 7, 7)
    ),
    "attention": lambda model: model.vision_model.encoder.layers[0].self_attn(hidden_states=hidden(9))[0],
    "MLP by name": lambda model: model.vision_model.encoder.layers[0].mlp(hidden_states=hidden(9)),
    "pooling head by name": lambda model: model.vision_model.head(hidden_state=hidden(9)),
    "uint8 pixels": lambda model: model.vision_model((PIXELS.abs() * 60).to(torch.uint8)).pooler_output,
    "token_type_ids": lambda model: model(IDS, PIXELS, token_type_ids=torch.zeros_like(IDS)).logits_per_image,
    "features with token_type_ids": lambda model: (
        model.get_text_features(input_ids=IDS, token_type_ids=torch.zeros_like(IDS)).pooler_output
    ),
}


def hidden(tokens: int) -> Tensor:
    return torch.linspace(-1, 1, 2 * tokens * 64).reshape(2, tokens, 64)


@pytest.mark.parametrize("name", CALLS)
def test_called_as_in_transformers(pair: tuple[Any, Any], name: str) -> None:
    found, expected = (CALLS[name](model) for model in pair)
    assert found.shape == expected.shape and worst_difference(found, expected) < 2e-5


def test_our_own_masks_reach_a_layer(pair: tuple[Any, Any]) -> None:
    layer = pair[0].text_model.encoder.layers[0]
    dense = layer(hidden(7), MASK.bool()[:, None, None])
    assert torch.equal(layer(hidden(7), MASK), dense) and not torch.equal(layer(hidden(7)), dense)


@pytest.mark.parametrize("attentions", [False, True])
def test_hooks_see_what_they_see_in_transformers(pair: tuple[Any, Any], attentions: bool) -> None:
    def seen(model: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        hooks = [
            module.register_forward_hook(lambda module, args, output, name=name: found.update({name: output}))
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in ("encoder", "embeddings") or name.rpartition(".")[2].isdigit()
        ]
        model(IDS, PIXELS, attention_mask=MASK, output_attentions=attentions)
        for hook in hooks:
            hook.remove()
        return found

    ours, theirs = (seen(model) for model in pair)
    assert ours.keys() == theirs.keys() and len(ours) == 10
    for name, output in ours.items():
        if name.endswith("encoder"):
            assert worst_difference(output.last_hidden_state, theirs[name].last_hidden_state) < 2e-5
        else:
            assert isinstance(output, Tensor) and worst_difference(output, theirs[name]) < 2e-5, name


def doubled(forward: Callable[..., Any]) -> Callable[..., Any]:
    def patched(hidden_states: Tensor, *mask: Tensor | None, **kwargs: Any) -> Any:
        assert mask in ((), (None,))
        found = forward(hidden_states, *mask, **kwargs)
        return 2 * found if isinstance(found, Tensor) else (2 * found[0], *found[1:])

    return patched


@pytest.mark.parametrize("part", ["", "self_attn", "mlp"])
def test_forwards_of_transformers_signatures_can_be_patched_in(
    pair: tuple[Any, Any], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pair[0](IDS, PIXELS).logits_per_image
    for model in pair:
        for tower in (model.text_model, model.vision_model):
            module = tower.encoder.layers[0].get_submodule(part)
            monkeypatch.setattr(module, "forward", doubled(module.forward))
    found, expected = (model(IDS, PIXELS).logits_per_image for model in pair)
    assert worst_difference(found, expected) < 2e-5 < worst_difference(found, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_attention_weights_beside_checkpoints(pair: tuple[Any, Any], reentrant: bool) -> None:
    """Recomputed layers do not count twice."""
    model = pair[0]
    model.train().activation_checkpointing_enable({"use_reentrant": reentrant})
    found = model.vision_model(PIXELS, output_attentions=True)
    found.pooler_output.sum().backward()
    model.eval().activation_checkpointing_disable()
    expected = model.vision_model(PIXELS, output_attentions=True).attentions
    assert len(found.attentions) == len(expected) == TINY_VISION["num_hidden_layers"]
    assert worst_difference(found.attentions, expected) < 1e-6


def test_text_embeddings_of_nothing(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="input_ids is None, as is inputs_embeds"):
        pair[0].text_model.embeddings()
