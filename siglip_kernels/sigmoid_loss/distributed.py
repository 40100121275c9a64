"""The sigmoid loss of the global batch over torch.distributed: ranks exchange texts and keep their images.

Rank r holds N_r images and M_r texts; without groups, N_r = M_r. Its loss is the sum over its own images and all ranks'
texts,

    L_r = -(1/n) Σ_{i on r} Σ_{j anywhere} wᵢⱼ log σ(zᵢⱼ sᵢⱼ),   n = the mean of N over the ranks,

so the mean of L_r over the ranks is the loss of the global batch, whatever the sizes of the local batches; where they
are equal, n is the local batch size and L_r equals open_clip's. Another reduction's n is likewise that of the global
batch divided by the number of ranks. Groups and weights of texts travel with their texts.

A rank's gradients are those of Σ_r u_r L_r, where u_r is the upstream gradient of L_r: those of its images, scale and
bias come from its own loss, those of its texts from the losses of all ranks. The mean that DistributedDataParallel
takes over the ranks is the gradient of the global batch.

All ranks have to take part in every forward and backward pass: if one skips a pass or dies, the others wait until the
backend notices or torch.distributed times out.
"""

from __future__ import annotations  # torch may be built without torch.distributed

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_kernels.device import on_device
from siglip_kernels.sigmoid_loss.api import aligned, backward_op
from siglip_kernels.sigmoid_loss.blocks import Engine, GradientSum, accumulate, finish_totals, workspace
from siglip_kernels.sigmoid_loss.engines import make_engine
from siglip_kernels.sigmoid_loss.pairs import NO_POSITIVES, Pairs, matches


@dataclass(frozen=True)
class Peers:
    """A process group, and the numbers of images and of texts on each of its ranks."""

    group: dist.ProcessGroup
    rank: int
    images: tuple[int, ...]
    texts: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.images)

    @property
    def mean_images(self) -> float:
        return sum(self.images) / self.world

    def diagonal(self, source: int, offset: int) -> int:
        """`Pairs.diagonal` of this rank's images and the texts of rank `source`, where those of all are `offset`."""
        diagonal = sum(self.images[: self.rank]) + offset - sum(self.texts[:source])
        return diagonal if -self.images[self.rank] < diagonal < self.texts[source] else NO_POSITIVES

    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor], tag: int = 0) -> list[dist.Work]:
        """Starts sending to the right neighbour and receiving from the left one. Tags count up from `tag`."""
        right = dist.get_global_rank(self.group, (self.rank + 1) % self.world)
        left = dist.get_global_rank(self.group, (self.rank - 1) % self.world)
        operations = []
        for number, (sent, received) in enumerate(zip(send, receive, strict=True), start=tag):
            operations.append(dist.P2POp(dist.isend, sent, right, self.group, number))
            operations.append(dist.P2POp(dist.irecv, received, left, self.group, number))
        return dist.batch_isend_irecv(operations)

    def largest(self, value: Tensor) -> Tensor:
        """The largest value among the ranks."""
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return value


class Texts(NamedTuple):
    """Texts and what the pairs know of each of them: `Pairs.text_groups` and `Pairs.text_weight`."""

    embeds: Tensor
    groups: Tensor | None
    weight: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def like(self, make: Callable[[Tensor], Tensor]) -> Texts:
        """The same with every tensor replaced."""
        groups, weight = (None if tensor is None else make(tensor) for tensor in self[1:])
        return Texts(make(self.embeds), groups, weight)


@dataclass(frozen=True)
class Wanted:
    """Which gradients a pass over the global batch computes."""

    image: bool
    text: bool
    scalars: bool


class Pass:
    """One pass over all pairs of this rank's images with all ranks' texts."""

    def __init__(
        self,
        engine: Engine,
        peers: Peers,
        x: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        pairs: Pairs,
        divisor: float,
        wanted: Wanted,
    ) -> None:
        self.engine, self.peers, self.wanted = engine, peers, wanted
        self.x, self.logit_scale, self.logit_bias = x, logit_scale, logit_bias
        self.pairs, self.unit = pairs.in_units(peers.largest)
        self.gradient_scale = logit_scale if self.unit is None else logit_scale * self.unit
        self.totals = engine.totals(x.device, pairs)
        self.factor = 1 / (divisor * engine.logit_grad_scale)
        largest = max(peers.texts)
        self.logit_grad = workspace(engine, len(x), largest, x.device) if wanted.image or wanted.text else None
        self.image = self.sums(len(x)) if wanted.image else None
        self.image_started = False

    def texts(self, y: Tensor) -> Texts:
        """This rank's texts."""
        return Texts(y, self.pairs.text_groups, self.pairs.text_weight)

    def sums(self, rows: int) -> Tensor:
        """Memory for partial sums of the gradients of this many images or texts."""
        return self.x.new_empty((rows, self.x.shape[1]), dtype=self.engine.sum_dtype)

    def add(self, source: int, texts: Texts, out: Tensor | None) -> None:
        """Adds the texts of rank `source`. out: (their number, D), written with Gᵀ x; None: skipped."""
        engine = self.engine
        diagonal = self.peers.diagonal(source, self.pairs.diagonal)
        pairs = replace(self.pairs, diagonal=diagonal, text_groups=texts.groups, text_weight=texts.weight)
        text = None if out is None else GradientSum(out)
        for start in range(0, len(self.x), engine.rows):
            rows = slice(start, min(start + engine.rows, len(self.x)))
            accumulate(
                engine=engine,
                x=self.x[rows],
                y=texts.embeds,
                logit_scale=self.logit_scale,
                logit_bias=self.logit_bias,
                pairs=pairs.part(rows, slice(None)),
                totals=self.totals,
                scalar_gradients=self.wanted.scalars,
                logit_grad=self.logit_grad,
                image=None if self.image is None else GradientSum(self.image[rows], self.image_started),
                text=text,
                gradient_scale=self.gradient_scale,
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
    largest = max(peers.texts)
    texts = work.texts(y)
    blocks = [
        texts.like(lambda tensor: tensor.new_empty((largest, *tensor.shape[1:])))
        for _ in range(min(2, peers.world - 1))
    ]
    shares = [work.sums(largest) for _ in range(2)] if wanted.text else []
    incoming = work.sums(largest) if wanted.text else None

    text_requests: list[dist.Work] = []
    sum_requests: list[dist.Work] = []
    for step in range(peers.world):
        source, following = (peers.rank - step) % peers.world, (peers.rank - step - 1) % peers.world
        next_texts = None
        if step + 1 < peers.world:
            size = peers.texts[following]
            next_texts = blocks[step % 2].like(itemgetter(slice(size)))
            text_requests = peers.exchange(texts.tensors(), next_texts.tensors())
        share = shares[step % 2][: len(texts.embeds)] if wanted.text else None
        work.add(source, texts, share)
        if share is not None and incoming is not None:
            if step == 0:
                share.mul_(weight)
            else:
                _wait(sum_requests)
                torch.addcmul(incoming[: len(share)], share, weight, out=share)
            sum_requests = peers.exchange([share], [incoming[: peers.texts[following]]], tag=len(Texts._fields))
        if next_texts is not None:
            _wait(text_requests)
            texts = next_texts
    _wait(sum_requests)
    return None if incoming is None else incoming[: len(y)]


def gather(work: Pass, y: Tensor, weight: Tensor) -> Tensor | None:
    """`ring` with one all-gather before and one reduce-scatter after: O(global N·D) memory, fewer messages."""
    peers, largest = work.peers, max(work.peers.texts)

    def gathered(own: Tensor) -> Tensor:
        padded = own
        if len(own) < largest:
            rows = torch.arange(len(own), device=own.device)
            padded = own.new_zeros((largest, *own.shape[1:])).index_copy_(0, rows, own)
        everyone = own.new_empty((peers.world, *padded.shape))
        all_gather(everyone, padded, peers.group)
        return everyone

    everyone = work.texts(y).like(gathered)
    shares = None
    if work.wanted.text:
        shares = torch.zeros(everyone.embeds.shape, dtype=work.engine.sum_dtype, device=y.device)
    for step in range(peers.world):
        source = (peers.rank - step) % peers.world
        size = peers.texts[source]
        texts = everyone.like(itemgetter((source, slice(size))))
        work.add(source, texts, None if shares is None else shares[source, :size])
    if shares is None:
        return None
    own = work.sums(largest)
    _reduce_scatter(own, shares.mul_(weight), peers.group)
    return own[: len(y)]


def matches_of_all(groups: Tensor, others: Tensor, sizes: Sequence[int], peers: Peers) -> Tensor:
    """`pairs.matches` with the others of all ranks, sizes[r] of rank r, in memory independent of their number."""
    count = matches(groups, others)
    blocks = [others.new_empty(max(sizes)) for _ in range(2)]
    for step in range(1, peers.world):
        received = blocks[step % 2][: sizes[(peers.rank - step) % peers.world]]
        _wait(peers.exchange([others], [received]))
        others = received
        count += matches(groups, others)
    return count


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
        ctx,
        image_embeds,
        text_embeds,
        logit_scale,
        logit_bias,
        engine_name,
        chunk_size,
        peers,
        route,
        pairs,
        divisor,
        wanted,
        average,
    ):
        with on_device(image_embeds), torch.autocast(image_embeds.device.type, enabled=False):
            x, y = aligned(image_embeds), aligned(text_embeds)
            engine = make_engine(engine_name, x, chunk_size)
            work = Pass(engine, peers, x, logit_scale, logit_bias, pairs, divisor, wanted)
            scale = work.gradient_scale
            dy = route(work, y, scale * work.factor)
            dx = x.new_empty(0)
            if work.image is not None:
                dx = engine.scale(work.image, scale, work.factor, torch.empty_like(x, dtype=engine.saved_dtype))
            dy = x.new_empty(0) if dy is None else dy.to(engine.saved_dtype, copy=True)
            loss, scalars = finish_totals(work.totals, 1 / divisor, work.unit, logit_scale.dtype, wanted.scalars)
        if average:
            dist.all_reduce(loss, group=peers.group)
            loss /= peers.world
        ctx.save_for_backward(dx, dy, scalars, image_embeds, text_embeds, logit_scale, logit_bias)
        ctx.engine, ctx.chunk_size, ctx.peers, ctx.route = engine_name, chunk_size, peers, route
        ctx.pairs, ctx.divisor, ctx.wanted = pairs, divisor, wanted
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
            *(None,) * 8,
        )


@torch.no_grad()
def _weighted_text_gradient(ctx, upstream, image_embeds, text_embeds, logit_scale, logit_bias):
    """dL/dy where the ranks' upstream gradients differ: a second pass that computes nothing else."""
    x, y = aligned(image_embeds), aligned(text_embeds)
    engine = make_engine(ctx.engine, x, ctx.chunk_size)
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        wanted = Wanted(image=False, text=True, scalars=False)
        work = Pass(engine, ctx.peers, x, logit_scale, logit_bias, ctx.pairs, ctx.divisor, wanted)
        return ctx.route(work, y, work.gradient_scale * upstream * work.factor).to(text_embeds.dtype)
