"""Accelerated models under transforms of torch.func and torch.autograd: the library computes what kernels cannot."""

import re

import pytest
import tiny_timm
import tiny_transformers
import torch
from test_open_clip import BASE, siglip
from torch import Tensor, nn
from torch.func import functional_call
from transforms import FIRST, SECOND, SERVED, Function, of_each_kind

from siglip_kernels import UnsupportedInputError
from siglip_kernels.integrations import open_clip as siglip_open_clip
from siglip_kernels.integrations import timm as siglip_timm
from siglip_kernels.integrations import transformers as siglip_transformers

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
TOKENS = tiny_transformers.inputs(batch=2)["input_ids"]
MASK = torch.tensor([[1] * 8, [1] * 3 + [0] * 5])


def vision_of_transformers() -> nn.Module:
    model = tiny_transformers.siglip().vision_model
    model.set_attn_implementation("eager")  # sdpa lacks some derivatives itself
    return model


def text_of_transformers() -> nn.Module:
    model = tiny_transformers.siglip().text_model
    model.set_attn_implementation("eager")
    return model


def text_of_open_clip() -> nn.Module:
    return siglip(BASE).text.train()  # in evaluation PyTorch's fused attention, without derivatives, computes it


def tower_of_timm() -> nn.Module:
    model = tiny_timm.tower("vit_so400m_patch14_siglip_384", act_layer="gelu_tanh")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # as for transformers
    return model


# The module, its integration, the inputs by name, a parameter, and what is taken of the output.
MODELS = {
    "transformers vision": (
        vision_of_transformers,
        siglip_transformers,
        dict(pixel_values=PIXELS),
        "encoder.layers.0.layer_norm1.weight",
        lambda output: output.pooler_output,
    ),
    "transformers text": (
        text_of_transformers,
        siglip_transformers,
        dict(input_ids=TOKENS, attention_mask=MASK),
        "encoder.layers.0.mlp.fc1.bias",
        lambda output: output.pooler_output,
    ),
    "timm": (tower_of_timm, siglip_timm, dict(x=PIXELS), "blocks.0.attn.proj.bias", lambda output: output),
    "open_clip": (
        text_of_open_clip,
        siglip_open_clip,
        dict(text=TOKENS[:, :6]),
        "transformer.resblocks.0.ln_1.weight",
        lambda output: output,
    ),
}


@pytest.fixture(params=MODELS, scope="module")
def functions(request: pytest.FixtureRequest) -> tuple[Function, Function, Tensor]:
    """The model as a function of one parameter, before and after acceleration, and that parameter."""
    make, integration, inputs, name, taken = MODELS[request.param]

    def of_parameter(model: nn.Module) -> Function:
        others = {other: parameter.detach() for other, parameter in model.named_parameters()}
        return lambda x: taken(functional_call(model, {**others, name: x}, kwargs=inputs)).flatten()[:3]

    model, accelerated = make(), make()
    assert integration.accelerate(accelerated).replaced
    return of_parameter(model), of_parameter(accelerated), model.get_parameter(name).detach()


@pytest.mark.parametrize("transform", of_each_kind(FIRST))
def test_the_library_computes_transforms(transform, functions):
    library, accelerated, x = functions
    try:
        expected = FIRST[transform](library, x)
    except (NotImplementedError, RuntimeError) as error:  # forward mode in open_clip; reading the mask in transformers
        with pytest.raises(type(error), match=re.escape(str(error))):
            FIRST[transform](accelerated, x)
        return
    torch.testing.assert_close(FIRST[transform](accelerated, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("transform", of_each_kind(SERVED))
def test_calls_per_sample_and_first_derivatives(transform, functions):
    library, accelerated, x = functions
    torch.testing.assert_close(SERVED[transform](accelerated, x), SERVED[transform](library, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", of_each_kind(SECOND))
def test_second_derivatives_are_refused_by_name(transform, functions):
    _, accelerated, x = functions
    with pytest.raises(UnsupportedInputError, match=r"^\w+: create_graph .*a model that is not accelerated$"):
        SECOND[transform](accelerated, x)


def test_gradients_per_sample_of_the_loss():
    """Of a whole model, with respect to all of its parameters."""
    model, inputs = tiny_transformers.siglip(), tiny_transformers.inputs(batch=4)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
        arguments = dict(pixel_values=pixels, input_ids=ids, return_loss=True)
        return functional_call(model, parameters, kwargs=arguments).loss

    def gradients() -> dict[str, Tensor]:
        per_pair = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        return per_pair(
            parameters, inputs["pixel_values"].unflatten(0, (2, 2)), inputs["input_ids"].unflatten(0, (2, 2))
        )

    before = gradients()
    siglip_transformers.accelerate(model)
    torch.testing.assert_close(gradients(), before, rtol=0, atol=0)


def test_the_registered_attention_is_refused_by_name():
    siglip_transformers.register()
    model = tiny_transformers.siglip().vision_model
    model.set_attn_implementation("siglip_triton")
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(
            UnsupportedInputError, match="^attention: q (is differentiated by torch.func|has a tangent)"
        ):
            transform(lambda scale: model(scale * PIXELS).pooler_output.sum())(torch.tensor(1.0))
