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
from typing import NamedTuple, Protocol

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
        return dist.batch_isend_irecv(operations) if operations else []

    def largest(self, value: Tensor) -> Tensor:
        """The largest value among the ranks."""
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return value


class Texts(NamedTuple):
    """Texts, (m, any), and what is known of each of them, (m,) or (m, any)."""

    embeds: Tensor
    groups: Tensor | None  # `Pairs.text_groups`
    weight: Tensor | None  # `Pairs.text_weight`
    ratios: Tensor | None = None  # of norms, where embeddings are nested: `matryoshka.blocks.Side.ratios`

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def like(self, make: Callable[[Tensor], Tensor]) -> Texts:
        """The same with every tensor replaced."""
        return Texts(make(self.embeds), *(None if tensor is None else make(tensor) for tensor in self[1:]))


@dataclass(frozen=True)
class Wanted:
    """Which gradients a pass over the global batch computes."""

    image: bool
    text: bool
    scalars: bool


class Work(Protocol):
    """A pass over all pairs of this rank's images with all ranks' texts, which a `Route` brings to it."""

    peers: Peers
    texts: Texts  # this rank's

    def sums(self, rows: int) -> list[Tensor]:
        """Memory for partial sums of the gradients of this many texts, (rows, any) each; none if not required."""

    def add(self, source: int, texts: Texts, out: Sequence[Tensor]) -> None:
        """Adds the texts of rank `source`. out: `sums` of their number, which are overwritten."""


# Returns the sums of this rank's texts over all ranks. The tensors weigh a rank's contribution to each of its `sums`,
# and broadcast to them.
Route = Callable[[Work, Sequence[Tensor]], list[Tensor]]


class Pass:
    """The work of one loss."""

    def __init__(
        self,
        engine: Engine,
        peers: Peers,
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        pairs: Pairs,
        divisor: float,
        wanted: Wanted,
    ) -> None:
        self.engine, self.peers, self.wanted = engine, peers, wanted
        self.x, self.logit_scale, self.logit_bias = x, logit_scale, logit_bias
        self.pairs, self.unit = pairs.in_units(peers.largest)
        self.texts = Texts(y, self.pairs.text_groups, self.pairs.text_weight)
        self.gradient_scale = logit_scale if self.unit is None else logit_scale * self.unit
        self.totals = engine.totals(x.device, pairs)
        self.factor = 1 / (divisor * engine.logit_grad_scale)
        largest = max(peers.texts)
        self.logit_grad = workspace(engine, len(x), largest, x.device) if wanted.image or wanted.text else None
        self.image = self._sum(len(x)) if wanted.image else None
        self.image_started = False

    def sums(self, rows: int) -> list[Tensor]:
        return [self._sum(rows)] if self.wanted.text else []

    def _sum(self, rows: int) -> Tensor:
        return self.x.new_empty((rows, self.x.shape[1]), dtype=self.engine.sum_dtype)

    def add(self, source: int, texts: Texts, out: Sequence[Tensor]) -> None:
        """See `Work.add`. The sums are Gᵀ x."""
        engine = self.engine
        diagonal = self.peers.diagonal(source, self.pairs.diagonal)
        pairs = replace(self.pairs, diagonal=diagonal, text_groups=texts.groups, text_weight=texts.weight)
        text = GradientSum(out[0]) if out else None
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


def ring(work: Work, weights: Sequence[Tensor]) -> list[Tensor]:
    """A `Route`: passes texts around the ranks, and where texts require gradients, their partial sums one step behind.

    While a block is computed, the next block of texts and the previous block's sums are being transferred. Memory: two
    blocks of texts and three of sums, independent of the number of ranks.
    """
    peers, texts = work.peers, work.texts
    largest = max(peers.texts)
    blocks = [
        texts.like(lambda tensor: tensor.new_empty((largest, *tensor.shape[1:])))
        for _ in range(min(2, peers.world - 1))
    ]
    both, incoming = [work.sums(largest) for _ in range(2)], work.sums(largest)

    text_requests: list[dist.Work] = []
    sum_requests: list[dist.Work] = []
    for step in range(peers.world):
        source, following = (peers.rank - step) % peers.world, (peers.rank - step - 1) % peers.world
        next_texts = None
        if step + 1 < peers.world:
            size = peers.texts[following]
            next_texts = blocks[step % 2].like(itemgetter(slice(size)))
            text_requests = peers.exchange(texts.tensors(), next_texts.tensors())
        size = len(texts.embeds)
        shares = [share[:size] for share in both[step % 2]]
        work.add(source, texts, shares)
        _wait(sum_requests)
        for share, arrived, weight in zip(shares, incoming, weights, strict=True):
            if step == 0:
                share.mul_(weight)
            else:
                torch.addcmul(arrived[:size], share, weight, out=share)
        arriving = [arrived[: peers.texts[following]] for arrived in incoming]
        sum_requests = peers.exchange(shares, arriving, tag=len(Texts._fields))
        if next_texts is not None:
            _wait(text_requests)
            texts = next_texts
    _wait(sum_requests)
    return [arrived[: len(work.texts.embeds)] for arrived in incoming]


def gather(work: Work, weights: Sequence[Tensor]) -> list[Tensor]:
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

    everyone, totals = work.texts.like(gathered), work.sums(largest)
    shares = [total.new_zeros((peers.world, *total.shape)) for total in totals]
    for step in range(peers.world):
        source = (peers.rank - step) % peers.world
        size = peers.texts[source]
        texts = everyone.like(itemgetter((source, slice(size))))
        work.add(source, texts, [share[source, :size] for share in shares])
    for total, share, weight in zip(totals, shares, weights, strict=True):
        _reduce_scatter(total, share.mul_(weight), peers.group)
    return [total[: len(work.texts.embeds)] for total in totals]


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


@dataclass(frozen=True)
class GlobalBatch:
    """All that the loss of a global batch takes beside what may require gradients."""

    engine: str
    chunk_size: int
    peers: Peers
    route: Route
    pairs: Pairs
    divisor: float
    wanted: Wanted
    average: bool  # whether a loss is the mean over the ranks

    def averaged(self, loss: Tensor) -> Tensor:
        """This rank's loss, in its memory, or the mean of all ranks'."""
        if self.average:
            dist.all_reduce(loss, group=self.peers.group)
            loss /= self.peers.world
        return loss

    def of_all_ranks(self, upstream: Tensor) -> Tensor:
        """(world, any): the gradients with respect to all ranks' losses."""
        everyone = upstream.new_empty((self.peers.world, upstream.numel()))
        all_gather(everyone, upstream, self.peers.group)
        return everyone


class GlobalLoss(torch.autograd.Function):
    """This rank's loss. Required gradients are computed in the forward pass, as by the single-process operator."""

    @staticmethod
    def forward(ctx, image_embeds, text_embeds, logit_scale, logit_bias, batch):
        with on_device(image_embeds), torch.autocast(image_embeds.device.type, enabled=False):
            x, y = aligned(image_embeds), aligned(text_embeds)
            engine = make_engine(batch.engine, x, batch.chunk_size)
            work = Pass(engine, batch.peers, x, y, logit_scale, logit_bias, batch.pairs, batch.divisor, batch.wanted)
            scale, dx, dy = work.gradient_scale, x.new_empty(0), x.new_empty(0)
            for total in batch.route(work, [scale * work.factor] if batch.wanted.text else []):
                dy = total.to(engine.saved_dtype, copy=True)
            if work.image is not None:
                dx = engine.scale(work.image, scale, work.factor, torch.empty_like(x, dtype=engine.saved_dtype))
            wants_scalars = batch.wanted.scalars
            loss, scalars = finish_totals(work.totals, 1 / batch.divisor, work.unit, logit_scale.dtype, wants_scalars)
        ctx.save_for_backward(dx, dy, scalars, image_embeds, text_embeds, logit_scale, logit_bias)
        ctx.batch = batch
        return batch.averaged(loss)

    @staticmethod
    def backward(ctx, upstream, *_):
        dx, dy, scalars, image_embeds, text_embeds, logit_scale, logit_bias = ctx.saved_tensors
        weighted = None
        if ctx.batch.wanted.text:
            everyone = ctx.batch.of_all_ranks(upstream)
            if not bool((everyone == everyone[0]).all()):
                # dy was summed with equal weights. All ranks see the same values and take the same branch.
                inputs = image_embeds, text_embeds, logit_scale, logit_bias
                weighted = _weighted_text_gradient(ctx.batch, upstream, *inputs)
                dy = dy.new_empty(0)
        dx, dy, scalars = backward_op(
            upstream, dx, dy, scalars, image_embeds, text_embeds, logit_scale, logit_bias, ctx.batch.engine
        )
        needs = ctx.needs_input_grad
        return (
            dx if needs[0] else None,
            (dy if weighted is None else weighted) if needs[1] else None,
            scalars[0] if needs[2] else None,
            scalars[1] if needs[3] else None,
            None,
        )


@torch.no_grad()
def _weighted_text_gradient(
    batch: GlobalBatch,
    upstream: Tensor,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
) -> Tensor:
    """dL/dy where the ranks' upstream gradients differ: a second pass that computes nothing else."""
    x, y = aligned(image_embeds), aligned(text_embeds)
    engine = make_engine(batch.engine, x, batch.chunk_size)
    with on_device(x), torch.autocast(x.device.type, enabled=False):
        wanted = Wanted(image=False, text=True, scalars=False)
        work = Pass(engine, batch.peers, x, y, logit_scale, logit_bias, batch.pairs, batch.divisor, wanted)
        (total,) = batch.route(work, [work.gradient_scale * upstream * work.factor])
        return total.to(text_embeds.dtype)
