"""Peers of the sigmoid loss, and two softmax losses, which are as memory-efficient but compute another function."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import siglip_kernels
from bench.cases.operations import Contender, Setting, plus_loss
from bench.cases.shapes import LossShape
from bench.peers.compiled import compiled
from bench.peers.registry import Missing, Unsupported, peer
from siglip_kernels import reference

Loss = Callable[..., Tensor]


LOSSES = ("sigmoid_loss", "siglip_plus_loss", "image_losses", "matryoshka_sigmoid_loss")


@peer(("sigmoid_loss", "image_losses"), "chunked", note="this project, in plain PyTorch")
def chunked(setting: Setting) -> Loss:
    return siglip_kernels.chunked_sigmoid_loss


@peer("siglip_plus_loss", "chunked", note="this project, in plain PyTorch")
def chunked_plus(setting: Setting) -> Loss:
    return plus_loss("chunked")


@peer("matryoshka_sigmoid_loss", "chunked", note="this project, in plain PyTorch")
def chunked_matryoshka(setting: Setting) -> Loss:
    return functools.partial(siglip_kernels.matryoshka_sigmoid_loss, loss=siglip_kernels.chunked_sigmoid_loss)


@peer(LOSSES, "eager", quadratic=6, note="the definition")
def eager(setting: Setting) -> Contender:
    return setting.operation.definition(setting, setting.dtype)


@peer("sigmoid_loss", "compile", cuda=True, quadratic=2, note="torch.compile of the definition")
def compiled_eager(setting: Setting) -> Loss:
    return compiled(reference.sigmoid_loss, "compile")


@peer("sigmoid_loss", "max-autotune", cuda=True, slow=True, quadratic=2, note="torch.compile of the definition")
def max_autotune(setting: Setting) -> Loss:
    return compiled(reference.sigmoid_loss, "max-autotune")


def _require_pairs(setting: Setting, negatives: bool = False) -> None:
    """Raises Unsupported for groups and weights and, unless `negatives`, for texts of no image."""
    shape = setting.shape
    assert isinstance(shape, LossShape)
    if setting.operation.name != "sigmoid_loss":
        raise Unsupported(f"has no {setting.operation.name}")
    if shape.captions or shape.weighted:
        raise Unsupported("has no groups and no weights of pairs")
    if shape.negatives and not negatives:
        raise Unsupported("needs as many texts as images")


def _siglip_kernel(backend: str, **arguments: int) -> Callable[[Setting], Loss]:
    """siglip-kernel takes log t. With a chunk size its bf16 path is called, as its README recommends."""

    def load(setting: Setting) -> Loss:
        _require_pairs(setting, negatives="chunk_size" in arguments)
        if arguments:
            from siglip_kernel import fused_chunked_bf16_siglip_loss

            loss = functools.partial(fused_chunked_bf16_siglip_loss, **arguments)
        else:
            from siglip_kernel import fused_siglip_loss

            loss = functools.partial(fused_siglip_loss, backend=backend)

        def call(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
            return loss(image_embeds, text_embeds, logit_scale.log(), logit_bias)

        return call

    return load


for _backend, _more in (
    ("auto", {}),
    ("chunked_bf16", {"slow": True}),  # the choice of "auto" in half precision
    ("chunked_bf16_pipelined", {"slow": True}),
    ("chunked_bf16_fp8", {"tolerance": 0.3, "note": "products in fp8"}),
    ("chunked_epilogue", {"slow": True}),
    ("hopper", {"slow": True}),
    ("fused", {"slow": True}),
    ("fused_v2", {"slow": True}),
):
    _name = "siglip_kernel" if _backend == "auto" else f"siglip_kernel:{_backend}"
    peer("sigmoid_loss", _name, package="siglip-kernel", cuda=True, **_more)(_siglip_kernel(_backend))
peer("sigmoid_loss", "siglip_kernel:chunk_size=1024", package="siglip-kernel", cuda=True, note="its least memory")(
    _siglip_kernel("chunked_bf16", chunk_size=1024)
)


@peer("siglip_plus_loss", "siglip_kernel", package="siglip-kernel", cuda=True)
def siglip_kernel_plus(setting: Setting) -> Loss:
    from siglip_kernel import fused_siglip_plus_loss

    def call(
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        image_groups: Tensor,
        text_groups: Tensor,
    ) -> Tensor:
        return fused_siglip_plus_loss(
            image_embeds, text_embeds, logit_scale.log(), logit_bias, image_groups, text_groups
        )

    return call


def _open_clip(**arguments: int) -> Callable[[Setting], Loss]:
    """open_clip's class, loaded from its file because the package imports torchvision."""

    def load(setting: Setting) -> Loss:
        _require_pairs(setting, negatives="chunk_size" in arguments)
        found = importlib.util.find_spec("open_clip")
        if found is None or found.origin is None:
            raise Missing("pip install open-clip-torch")
        spec = importlib.util.spec_from_file_location("open_clip_loss", Path(found.origin).parent / "loss.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            loss = module.SigLipLoss(**arguments)
        except TypeError as error:
            raise Unsupported(f"this version's SigLipLoss has no {', '.join(arguments)}") from error

        def call(
            image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int = 0
        ) -> Tensor:
            return loss(image_embeds, text_embeds, logit_scale, logit_bias)

        return call

    return load


peer(LOSSES, "open_clip", package="open-clip-torch", quadratic=6)(_open_clip())
peer(LOSSES, "open_clip:chunk_size=1024", package="open-clip-torch", quadratic=3)(_open_clip(chunk_size=1024))


def softmax_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """CLIP's loss (Radford et al. 2021), which both softmax peers compute. The bias is ignored."""
    logits = image_embeds @ text_embeds.T * logit_scale
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@peer("sigmoid_loss", "inf_cl", package="inf-cl", cuda=True, truth=softmax_loss, note="another loss: softmax")
def inf_cl(setting: Setting) -> Loss:
    _require_pairs(setting)
    from inf_cl import cal_flash_loss

    def call(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        # It slices the width into powers of two: 768 = 3 * 256 and so400m's 1152 = 9 * 128.
        width = next(size for size in (256, 128, 64, 32, 16) if image_embeds.shape[1] % size == 0)
        images = cal_flash_loss(image_embeds, text_embeds, scale=logit_scale, head_dim=width)
        texts = cal_flash_loss(text_embeds, image_embeds, scale=logit_scale, head_dim=width)
        return (images.mean() + texts.mean()) / 2

    return call


def softmax_loss_of_constant_scale(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """CLIP's loss with gradients for the embeddings alone."""
    return softmax_loss(image_embeds, text_embeds, logit_scale.detach(), logit_bias)


@peer(
    "sigmoid_loss",
    "memeff",
    package="memeff",
    cuda=True,
    truth=softmax_loss_of_constant_scale,
    note="another loss: softmax, constant scale",
)
def memeff(setting: Setting) -> Loss:
    _require_pairs(setting)
    from memeff import MemoryEfficientCLIPLoss

    temperature = 1 / float(setting.inputs().tensors["logit_scale"])
    loss = MemoryEfficientCLIPLoss(temperature=temperature, normalized_inputs=True, stable=False)
    return lambda image_embeds, text_embeds, logit_scale, logit_bias: loss(image_embeds, text_embeds)
