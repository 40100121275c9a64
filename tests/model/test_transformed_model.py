"""The model under transforms of torch.func and torch.autograd, with each backend, beside transformers' eager model."""

import pytest
import tiny_transformers
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transforms import FIRST, SECOND, SERVED, Function, of_each_kind

import siglip_model
from siglip_kernels import UnsupportedInputError
from siglip_kernels.device import interpreting

PARAMETER = "vision_model.encoder.layers.0.layer_norm1.weight"
MASK = torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
INPUTS = {**tiny_transformers.inputs(batch=2), "attention_mask": MASK}


@pytest.fixture(scope="module")
def original() -> nn.Module:
    model = tiny_transformers.siglip()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("siglip")
    original.save_pretrained(path)
    return str(path)


def logits(model: nn.Module) -> tuple[Function, Tensor]:
    """A few logits as a function of one parameter of the vision tower, and that parameter."""
    others = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parameter = others.pop(PARAMETER)

    def function(x: Tensor) -> Tensor:
        return functional_call(model, {**others, PARAMETER: x}, kwargs=INPUTS).logits_per_image.flatten()[:3]

    return function, parameter


def check(transform: str, model: nn.Module, original: nn.Module) -> None:
    transforms = FIRST | SECOND | SERVED
    expected = "func.jvp" if transform == "func.linearize" else transform  # transformers' mask cannot be traced
    found = transforms[transform](*logits(model))
    torch.testing.assert_close(found, transforms[expected](*logits(original)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("transform", of_each_kind(FIRST | SERVED))
def test_the_backends_without_kernels(backend, transform, folder, original):
    check(transform, siglip_model.SiglipModel.from_pretrained(folder, backend=backend), original)


@pytest.mark.parametrize("transform", of_each_kind(SECOND))
def test_second_derivatives_of_the_eager_backend(transform, folder, original):
    check(transform, siglip_model.SiglipModel.from_pretrained(folder, backend="eager"), original)


@pytest.mark.skipif(not interpreting() and not torch.cuda.is_available(), reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("transform", of_each_kind(FIRST | SECOND | SERVED))
def test_the_triton_backend_refuses_by_name(transform, folder, original):
    model = siglip_model.SiglipModel.from_pretrained(folder, backend="triton")
    if transform in SERVED:
        check(transform, model, original)
        return
    how = "create_graph asks for" if transform in SECOND else r"\w+ (is differentiated by torch.func|has a tangent)"
    with pytest.raises(UnsupportedInputError, match=rf"^\w+: {how}.*'eager'"):
        (FIRST | SECOND)[transform](*logits(model))


@pytest.mark.skipif(not interpreting() and not torch.cuda.is_available(), reason="needs a GPU or the interpreter")
def test_padding_per_sample(folder, capfd):
    """PyTorch's own rule for the operator that counts valid tokens warns of a performance drop, past Python."""
    model = siglip_model.SiglipModel.from_pretrained(folder, backend="triton").text_model
    ids = INPUTS["input_ids"]

    def pooled(ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids[None], attention_mask=mask[None]).pooler_output[0]

    found = torch.func.vmap(pooled, in_dims=(0, 1))(ids, MASK.T)
    torch.testing.assert_close(found, model(ids, attention_mask=MASK).pooler_output)
    assert "performance drop" not in capfd.readouterr().err
