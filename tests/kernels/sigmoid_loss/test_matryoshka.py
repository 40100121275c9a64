"""The loss of normalised prefixes of the embeddings, against the definition in fp64."""

from typing import Any

import pytest
import torch
from error_budget import check_error
from torch import Tensor

from siglip_kernels import (
    UnsupportedInputError,
    chunked_sigmoid_loss,
    matryoshka_sigmoid_loss,
    plain_sigmoid_loss,
    reference,
    sigmoid_loss,
)

WIDTHS = (5, 8, 24)
SCALES, BIASES = (4.0, 8.0, 10.0), (-3.0, -6.0, -8.0)
LOSSES = [sigmoid_loss, chunked_sigmoid_loss, plain_sigmoid_loss]


def embeddings(images: int, texts: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (3 * torch.randn(n, 24, generator=generator).to(device) for n in (images, texts))
    return x, y


def results(loss, x: Tensor, y: Tensor, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    at_least = torch.promote_types(dtype, torch.float32)
    inputs = [v.detach().to(dtype).requires_grad_() for v in (x, y)]
    inputs += [torch.tensor(v, dtype=at_least, device=x.device, requires_grad=True) for v in (SCALES, BIASES)]
    losses = matryoshka_sigmoid_loss(*inputs, WIDTHS, loss=loss, **options)
    upstream = torch.tensor([1.0, 0.5, 2.0]).to(losses)
    return [losses.detach(), *torch.autograd.grad(losses, inputs, upstream)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_the_error_budget(loss, dtype, device):
    x, y = (v.to(dtype) for v in embeddings(30, 30, device))
    exact = results(reference.sigmoid_loss, x, y, torch.float64)
    eager = results(reference.sigmoid_loss, x, y, dtype)
    for found, one, true in zip(results(loss, x, y, dtype), eager, exact, strict=True):
        check_error(found, one, true, dtype=dtype, roundings=2)  # the normalised prefixes are rounded to it


@pytest.mark.parametrize("loss", LOSSES)
def test_spelled_out_with_groups(loss, device):
    x, y = embeddings(20, 33, device)
    groups = {"image_groups": torch.arange(20, device=device), "text_groups": torch.arange(33, device=device) % 20}
    found = matryoshka_sigmoid_loss(x, y, 5.0, torch.tensor(-3.0, device=device), WIDTHS, loss=loss, **groups)
    assert found.shape == (3,)
    for width, value in zip(WIDTHS, found, strict=True):
        prefixes = (v[:, :width].double() / v[:, :width].double().norm(dim=1, keepdim=True) for v in (x, y))
        expected = reference.sigmoid_loss(*prefixes, 5.0, -3.0, **groups)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_compiled(device):
    x, y = embeddings(9, 9, device)

    def total(x: Tensor, y: Tensor) -> Tensor:
        return matryoshka_sigmoid_loss(x, y, SCALES, BIASES, WIDTHS, loss=chunked_sigmoid_loss).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, y), total(x, y))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"widths": (8, 8)}, r"widths is \[8, 8\]; supported: ascending numbers from 1 to 24"),
        ({"widths": (8, 25)}, r"widths is \[8, 25\]"),
        ({"widths": (0, 8)}, r"widths is \[0, 8\]"),
        ({"widths": ()}, r"widths is \[\]"),
        ({"widths": (4.0, 8)}, r"widths is \[4.0, 8\]"),
        ({"logit_scales": (1.0, 2.0, 3.0)}, "logit_scales is tuple; supported: one number, or 2"),
        ({"logit_biases": torch.ones(3)}, r"logit_biases has shape \(3,\)"),
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"text_embeds": torch.ones(4, 24)}, "text_embeds has shape"),
    ],
)
def test_bad_input_is_named(changed, message):
    x, y = embeddings(3, 3, "cpu")
    arguments = dict(image_embeds=x, text_embeds=y, logit_scales=1.0, logit_biases=0.0, widths=(8, 24))
    with pytest.raises(UnsupportedInputError, match=f"matryoshka_sigmoid_loss: {message}"):
        matryoshka_sigmoid_loss(**{**arguments, **changed})
