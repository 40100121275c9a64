"""The names of the package siglip-kernel 0.1.2 (github.com/avocardio/siglip-kernel): its users change an import.

    from siglip_kernels.integrations.siglip_kernel import DistributedSigLIPLoss, fused_siglip_loss

Each function takes the logarithm of the temperature, `log_temperature`, and each class of a plain loss the temperature
itself, `logit_scale`, as there. Which one a number is cannot be told from its value.

Differences: losses are at least fp32; any device and dtype; local batches may differ in size; a negative group has no
positive. A backend that names one of that package's kernels selects none here: all compute the same function, in Triton
on GPUs that run the kernels and in PyTorch elsewhere. fp8 and soft labels are not supported. num_groups and overlap
have no effect: groups are counted without a synchronisation, and the ring always overlaps.

Imports nothing of that package. Raises UnsupportedInputError as `siglip_kernels.sigmoid_loss` does.
"""

from __future__ import annotations  # torch may be built without torch.distributed

import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_kernels import reference
from siglip_kernels.device import kernels_run_on
from siglip_kernels.errors import unsupported
from siglip_kernels.sigmoid_loss import SigLipLoss, chunked_sigmoid_loss, sigmoid_loss
from siglip_kernels.sigmoid_loss import SigLIPPlusLoss as _PlusLoss
from siglip_kernels.sigmoid_loss.pairs import check_groups, matches, plus_weights

_BACKENDS = (
    "auto",
    "hopper",
    "fused",
    "fused_v2",
    "chunked",
    "chunked_bf16",
    "chunked_bf16_pipelined",
    "chunked_epilogue",
    "reference",
)


def siglip_loss_reference(
    img_features: Tensor, txt_features: Tensor, temperature: Tensor | float, bias: Tensor | float
) -> Tensor:
    """`reference.sigmoid_loss`. Takes the temperature, not its logarithm."""
    return reference.sigmoid_loss(img_features, txt_features, temperature, bias)


def fused_siglip_loss(
    img_features: Tensor,
    txt_features: Tensor,
    log_temperature: Tensor,
    bias: Tensor | float,
    use_fp8: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The paper's loss of (B, D) images and texts, divided by B. log_temperature: log t. backend: see the module."""
    if backend not in _BACKENDS:
        raise unsupported("fused_siglip_loss", "backend", f"is {backend!r}", ", ".join(_BACKENDS))
    if backend == "reference":
        return siglip_loss_reference(img_features, txt_features, log_temperature.exp(), bias)
    return fused_chunked_bf16_siglip_loss(img_features, txt_features, log_temperature, bias, use_fp8=use_fp8)


def fused_chunked_bf16_siglip_loss(
    img_features: Tensor,
    txt_features: Tensor,
    log_temperature: Tensor,
    bias: Tensor | float,
    chunk_size: int = 0,
    use_fp8: bool = False,
    diag_offset: int | None = 0,
) -> Tensor:
    """`fused_siglip_loss` whose positives are image i and text i + diag_offset; None: no pair is positive."""
    _refuse("fused_siglip_loss", use_fp8=use_fp8)
    offset = len(txt_features) if diag_offset is None else diag_offset
    loss = _loss(img_features, chunk_size)
    return loss(img_features, txt_features, log_temperature.exp(), bias, offset=offset)


def fused_siglip_plus_loss(
    img_features: Tensor,
    txt_features: Tensor,
    log_temperature: Tensor,
    bias: Tensor | float,
    img_gid: Tensor | None = None,
    txt_gid: Tensor | None = None,
    symmetric: bool = True,
    soft_label: bool = False,
    chunk_size: int = 0,
    num_groups: int | None = None,
) -> Tensor:
    """SigLIP+ of (N, D) images and (M, D) texts, divided by N·M: see `siglip_kernels.SigLIPPlusLoss`.

    img_gid (N,), txt_gid (M,): groups, integers; each by default the numbers from 0 on.
    """
    _refuse("fused_siglip_plus_loss", soft_label=soft_label)
    images = torch.arange(len(img_features), device=img_features.device) if img_gid is None else img_gid.long()
    texts = torch.arange(len(txt_features), device=txt_features.device) if txt_gid is None else txt_gid.long()
    check_groups("fused_siglip_plus_loss", img_features, txt_features, images, texts)
    dtype = torch.promote_types(img_features.dtype, torch.float32)
    weight = plus_weights(matches(images, texts), matches(images, images), symmetric, dtype)
    return _loss(img_features, chunk_size)(
        img_features,
        txt_features,
        log_temperature.exp(),
        bias,
        image_groups=images,
        text_groups=texts,
        positive_weight=weight,
        reduction="pairs",
    )


class DistributedSigLIPLoss(SigLipLoss):
    """`siglip_kernels.SigLipLoss` by siglip-kernel's arguments; `logit_scale` is t, as in open_clip.

    strategy: "ring", "gather" or "local", the loss of the rank's own pairs.
    """

    def __init__(
        self,
        chunk_size: int = 0,
        strategy: str = "ring",
        rank: int = 0,
        world_size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        overlap: bool = True,
    ) -> None:
        if strategy not in ("ring", "gather", "local"):
            raise unsupported("DistributedSigLIPLoss", "strategy", f"is {strategy!r}", "ring, gather, local")
        alone = strategy == "local" or world_size <= 1
        super().__init__(
            rank=0 if alone else rank,
            world_size=1 if alone else world_size,
            dist_impl="ring" if strategy == "local" else strategy,
            chunk_size=chunk_size,
            group=None if alone else process_group,
        )


class DistributedSigLIPPlusLoss(nn.Module):
    """SigLIP+ of the global batch with its own parameters `logit_scale`, which is log t, and `logit_bias`.

    temperature: 1 / t at the start; log t stays between log 0.01 and log 100. use_bias: whether the bias, at first
    bias_init, is learnt or 0. The others: see `siglip_kernels.SigLIPPlusLoss` and `DistributedSigLIPLoss`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        symmetric: bool = True,
        use_bias: bool = True,
        bias_init: float = 0.0,
        soft_label: bool = False,
        chunk_size: int = 0,
        num_groups: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        overlap: bool = True,
    ) -> None:
        super().__init__()
        _refuse(type(self).__name__, soft_label=soft_label)
        self.logit_scale = nn.Parameter(torch.tensor(1.0 / temperature).log())
        if use_bias:
            self.logit_bias = nn.Parameter(torch.tensor(float(bias_init)))
        else:
            self.register_buffer("logit_bias", torch.tensor(0.0))
        group = process_group if world_size > 1 else None
        self.loss = _CountingLoss(
            symmetric=symmetric, rank=rank, world_size=world_size, group=group, chunk_size=chunk_size
        )

    def forward(
        self, embeddings: tuple[Tensor, Tensor], img_gid: Tensor | None = None, txt_gid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """embeddings: images (N, D) and texts (M, D), normalised here. img_gid (N,), txt_gid (M,): groups, by default
        the numbers from 0 on; of several ranks both or neither, without which image i and text i are positive.

        Returns {"total_loss", "logit_scale": t, "n_positives": of the global batch}.
        """
        image, text = (F.normalize(embeds, dim=-1) for embeds in embeddings)
        img_gid, txt_gid = (
            torch.arange(len(embeds), device=embeds.device) if gid is None and self.loss.world_size == 1 else gid
            for embeds, gid in ((image, img_gid), (text, txt_gid))
        )
        img_gid, txt_gid = (None if gid is None else gid.long() for gid in (img_gid, txt_gid))
        scale = self.logit_scale.clamp(math.log(0.01), math.log(100.0)).exp()
        loss = self.loss(image, text, scale, self.logit_bias, image_groups=img_gid, text_groups=txt_gid)
        return {"total_loss": loss, "logit_scale": scale.detach(), "n_positives": self.loss.positives}


class SigLIPPlusLoss(DistributedSigLIPPlusLoss):
    """`DistributedSigLIPPlusLoss` of one process. soft_weighting: must be True."""

    def __init__(
        self,
        temperature: float = 0.07,
        symmetric: bool = True,
        use_bias: bool = True,
        bias_init: float = 0.0,
        soft_weighting: bool = True,
        soft_label: bool = False,
        chunk_size: int = 0,
    ) -> None:
        if not soft_weighting:
            raise unsupported("SigLIPPlusLoss", "soft_weighting", "is False", "True")
        super().__init__(temperature, symmetric, use_bias, bias_init, soft_label, chunk_size)


def fused_distributed_siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    chunk_size: int = 0,
) -> Tensor:
    """`DistributedSigLIPLoss` of one process."""
    return DistributedSigLIPLoss(chunk_size)(image_features, text_features, logit_scale, logit_bias)


class _CountingLoss(_PlusLoss):
    """Keeps the number of positive pairs of the last call, of all ranks."""

    positives: Tensor

    def _weight_of_positives(self, image_features, text_features, options, peers=None):
        if options["image_groups"] is None:
            count = len(image_features) if peers is None else sum(peers.images)
            self.positives = torch.tensor(count, device=image_features.device)
        return super()._weight_of_positives(image_features, text_features, options, peers)

    def _members(self, images, texts, peers):
        of_texts, of_images = super()._members(images, texts, peers)
        self.positives = of_texts.masked_fill(images < 0, 0).sum()
        if peers is not None:
            dist.all_reduce(self.positives, group=peers.group)
        return of_texts, of_images


def _loss(img_features: Tensor, chunk_size: int):
    on_gpu = img_features.is_cuda and kernels_run_on(img_features.device)
    return functools.partial(sigmoid_loss if on_gpu else chunked_sigmoid_loss, chunk_size=chunk_size)


def _refuse(operation: str, **switches: bool) -> None:
    for name, value in switches.items():
        if value:
            raise unsupported(operation, name, f"is {value}", "False")
