"""The sigmoid loss of the global batch over torch.distributed: ranks exchange texts and keep their images.

Rank r holds M_r images and M_r texts. Its loss is the sum over its own images and all ranks' texts,

    L_r = -(1/m) Σ_{i on r} Σ_{j anywhere} log σ(zᵢⱼ sᵢⱼ),   m = the mean of M over the ranks,

so the mean of L_r over the ranks is the loss of the global batch, whatever the sizes of the local batches; where they
are equal, m is the local batch size and L_r equals open_clip's. A rank's gradients are those of Σ_r u_r L_r, where u_r
is the upstream gradient of L_r: those of its images, scale and bias come from its own loss, those of its texts from the
losses of all ranks. The mean that DistributedDataParallel takes over the ranks is the gradient of the global batch.

All ranks have to take part in every forward and backward pass: if one skips a pass or dies, the others wait until the
backend notices or torch.distributed times out.
"""

from __future__ import annotations  # torch may be built without torch.distributed

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_kernels.device import on_device
from siglip_kernels.sigmoid_loss.api import aligned, backward_op
from siglip_kernels.sigmoid_loss.blocks import Engine, GradientSum, accumulate, finish_totals, workspace
from siglip_kernels.sigmoid_loss.engines import make_engine
from siglip_kernels.sigmoid_loss.pairs import NO_POSITIVES, Pairs


@dataclass(frozen=True)
class Peers:
    """A process group, and the number of pairs on each of its ranks."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def mean_size(self) -> float:
        return sum(self.sizes) / len(self.sizes)

    def exchange(self, send: Tensor, receive: Tensor, tag: int) -> list[dist.Work]:
        """Starts sending to the right neighbour and receiving from the left one."""
        right = dist.get_global_rank(self.group, (self.rank + 1) % self.world)
        left = dist.get_global_rank(self.group, (self.rank - 1) % self.world)
        return dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, send, right, self.group, tag),
                dist.P2POp(dist.irecv, receive, left, self.group, tag),
            ]
        )


@dataclass(frozen=True)
class Wanted:
    """Which gradients a pass over the global batch computes."""

    image: bool
    text: bool
    scalars: bool


class Pass:
    """One pass over all pairs of this rank's images with all ranks' texts."""

    def __init__(
        self, engine: Engine, peers: Peers, x: Tensor, logit_scale: Tensor, logit_bias: Tensor, wanted: Wanted
    ) -> None:
        self.engine, self.peers, self.wanted = engine, peers, wanted
        self.x, self.logit_scale, self.logit_bias = x, logit_scale, logit_bias
        self.totals = engine.totals(x.device, Pairs())
        self.factor = 1 / (peers.mean_size * engine.logit_grad_scale)
        largest = max(peers.sizes)
        self.logit_grad = workspace(engine, len(x), largest, x.device) if wanted.image or wanted.text else None
        self.image = self.sums(len(x)) if wanted.image else None
        self.image_started = False

    def sums(self, rows: int) -> Tensor:
        """Memory for partial sums of the gradients of this many images or texts."""
        return self.x.new_empty((rows, self.x.shape[1]), dtype=self.engine.sum_dtype)

    def add(self, source: int, texts: Tensor, out: Tensor | None) -> None:
        """Adds the texts of rank `source`. out: (len(texts), D), written with Gᵀ x; None: skipped."""
        engine = self.engine
        text = None if out is None else GradientSum(out)
        for start in range(0, len(self.x), engine.rows):
            rows = slice(start, min(start + engine.rows, len(self.x)))
            accumulate(
                engine=engine,
                x=self.x[rows],
                y=texts,
                logit_scale=self.logit_scale,
                logit_bias=self.logit_bias,
                pairs=Pairs(start if source == self.peers.rank else NO_POSITIVES),
                totals=self.totals,
                scalar_gradients=self.wanted.scalars,
                logit_grad=self.logit_grad,
                image=None if self.image is None else GradientSum(self.image[rows], self.image_started),
                text=text,
                gradient_scale=self.logit_scale,
                factor=self.factor,
            )
        self.image_started = True


def ring(work: Pass, y: Tensor, weight: Tensor) -> Tensor | None:
    """Passes texts around the ranks, and where texts require gradients, their partial sums one step behind.

    While a block is computed, the next block of texts and the previous block's sums are being transferred. Memory: two
    blocks of texts and three of sums, independent of the number of ranks. weight: 0-dimensional, a factor of this
    rank's contribution to the texts' gradients. Returns dL/dy of this rank's texts, complete, or None.
    """
    peers, wanted = work.peers, work.wanted
    largest = max(peers.sizes)
    blocks = [
        torch.empty((largest, y.shape[1]), dtype=y.dtype, device=y.device) for _ in range(min(2, peers.world - 1))
    ]
    shares = [work.sums(largest) for _ in range(2)] if wanted.text else []
    incoming = work.sums(largest) if wanted.text else None

    texts = y
    text_requests: list[dist.Work] = []
    sum_requests: list[dist.Work] = []
    for step in range(peers.world):
        source, following = (peers.rank - step) % peers.world, (peers.rank - step - 1) % peers.world
        next_texts = None
        if step + 1 < peers.world:
            next_texts = blocks[step % 2][: peers.sizes[following]]
            text_requests = peers.exchange(texts, next_texts, tag=0)
        share = shares[step % 2][: len(texts)] if wanted.text else None
        work.add(source, texts, share)
        if share is not None and incoming is not None:
            if step == 0:
                share.mul_(weight)
            else:
                _wait(sum_requests)
                torch.addcmul(incoming[: len(texts)], share, weight, out=share)
            sum_requests = peers.exchange(share, incoming[: peers.sizes[following]], tag=1)
        if next_texts is not None:
            _wait(text_requests)
            texts = next_texts
    _wait(sum_requests)
    return None if incoming is None else incoming[: len(y)]


def gather(work: Pass, y: Tensor, weight: Tensor) -> Tensor | None:
    """`ring` with one all-gather before and one reduce-scatter after: O(global N·D) memory, fewer messages."""
    peers = work.peers
    shape = (max(peers.sizes), y.shape[1])
    padded = y if len(y) == shape[0] else y.new_zeros(shape).index_copy_(0, torch.arange(len(y), device=y.device), y)
    everyone = y.new_empty((peers.world, *shape))
    all_gather(everyone, padded, peers.group)
    shares = None
    if work.wanted.text:
        shares = torch.zeros((peers.world, *shape), dtype=work.engine.sum_dtype, device=y.device)
    for step in range(peers.world):
        source = (peers.rank - step) % peers.world
        size = peers.sizes[source]
        work.add(source, everyone[source, :size], None if shares is None else shares[source, :size])
    if shares is None:
        return None
    own = work.sums(shape[0])
    _reduce_scatter(own, shares.mul_(weight), peers.group)
    return own[: len(y)]


def all_gather(out: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    """Writes every rank's `own`, flattened, into `out` in the order of the ranks."""
    # torch 2.13 renamed both collectives and deprecates the older names.
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    function(out.view(-1), own.contiguous().view(-1), group=group)


def _reduce_scatter(own: Tensor, everyone: Tensor, group: dist.ProcessGroup) -> None:
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    function(own.view(-1), everyone.view(-1), group=group)


def _wait(requests: Sequence[dist.Work]) -> None:
    for request in requests:
        request.wait()


class GatherTexts(torch.autograd.Function):
    """The texts of all ranks, (world, N, D), of as many each; all of their losses add to the gradient of the texts."""

    @staticmethod
    def forward(ctx, texts, group):
        ctx.group = group
        everyone = texts.new_empty((dist.get_world_size(group), *texts.shape))
        all_gather(everyone, texts, group)
        return everyone

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        own = gradient.new_empty(gradient.shape[1:])
        _reduce_scatter(own, gradient.contiguous(), ctx.group)
        return own, None


class GlobalLoss(torch.autograd.Function):
    """This rank's loss. Required gradients are computed in the forward pass, as by the single-process operator."""

    @staticmethod
    def forward(
        ctx, image_embeds, text_embeds, logit_scale, logit_bias, engine_name, chunk_size, peers, route, wanted, average
    ):
        with on_device(image_embeds), torch.autocast(image_embeds.device.type, enabled=False):
            x, y = aligned(image_embeds), aligned(text_embeds)
            engine = make_engine(engine_name, x, chunk_size)
            work = Pass(engine, peers, x, logit_scale, logit_bias, wanted)
            dy = route(work, y, logit_scale * work.factor)
            dx = x.new_empty(0)
            if work.image is not None:
                dx = engine.scale(work.image, logit_scale, work.factor, torch.empty_like(x, dtype=engine.saved_dtype))
            dy = x.new_empty(0) if dy is None else dy.to(engine.saved_dtype, copy=True)
            loss, scalars = finish_totals(work.totals, 1 / peers.mean_size, None, logit_scale.dtype, wanted.scalars)
        if average:
            dist.all_reduce(loss, group=peers.group)
            loss /= peers.world
        ctx.save_for_backward(dx, dy, scalars, image_embeds, text_embeds, logit_scale, logit_bias)
        ctx.engine, ctx.chunk_size, ctx.peers, ctx.route = engine_name, chunk_size, peers, route
        ctx.wanted = wanted
        return loss

    @staticmethod
    def backward(ctx, upstream, *_):
        dx, dy, scalars, image_embeds, text_embeds, logit_scale, logit_bias = ctx.saved_tensors
        weighted = None
        if ctx.wanted.text:
            everyone = upstream.new_empty(ctx.peers.world)
            all_gather(everyone, upstream, ctx.peers.group)
            if not bool((everyone == everyone[0]).all()):
                # dy was summed with equal weights. All ranks see the same values and take the same branch.
                weighted = _weighted_text_gradient(ctx, upstream, image_embeds, text_embeds, logit_scale, logit_bias)
                dy = dy.new_empty(0)
        dx, dy, scalars = backward_op(
            upstream, dx, dy, scalars, image_embeds, text_embeds, logit_scale, logit_bias, ctx.engine
        )
        needs = ctx.needs_input_grad
        return (
            dx if needs[0] else None,
            (dy if weighted is None else weighted) if needs[1] else None,
            scalars[0] if needs[2] else None,
            scalars[1] if needs[3] else None,
            *(None,) * 6,
        )


@torch.no_grad()
def _weighted_text_gradient(ctx, upstream, image_embeds, text_embeds, logit_scale, logit_bias):
    """dL/dy where the ranks' upstream gradients differ: a second pass that computes nothing else."""
    x, y = aligned(image_embeds), aligned(text_embeds)
    engine = make_engine(ctx.engine, x, ctx.chunk_size)
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        work = Pass(engine, ctx.peers, x, logit_scale, logit_bias, Wanted(image=False, text=True, scalars=False))
        return ctx.route(work, y, logit_scale * upstream * work.factor).to(text_embeds.dtype)
