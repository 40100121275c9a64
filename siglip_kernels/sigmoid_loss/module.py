"""`SigLipLoss`, the counterpart of open_clip's class of the same name, and `SigLIPPlusLoss`."""

from __future__ import annotations  # torch may be built without torch.distributed

import copy
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_kernels.arguments import KERNEL_DTYPES, autocast_dtype, cast, wants_gradients
from siglip_kernels.device import kernels_run_on
from siglip_kernels.errors import unsupported
from siglip_kernels.fusable import is_unhooked
from siglip_kernels.sigmoid_loss.api import (
    as_scalar,
    check_chunk_size,
    check_embeds,
    check_kernel_input,
    chunked_sigmoid_loss,
    padded,
    plain_sigmoid_loss,
    positives_on_diagonal,
    same_length,
    sigmoid_loss,
)
from siglip_kernels.sigmoid_loss.distributed import (
    GatherTexts,
    GlobalBatch,
    GlobalLoss,
    Peers,
    Wanted,
    all_gather,
    gather,
    matches_of_all,
    ring,
)
from siglip_kernels.sigmoid_loss.engines import make_engine
from siglip_kernels.sigmoid_loss.pairs import (
    PairOptions,
    Pairs,
    check_groups,
    check_reduction,
    make_pairs,
    matches,
    plus_weights,
)
from siglip_kernels.transforms import refuse_transforms, under_transform

_ROUTES = {"ring": ring, "bidir": ring, "shift": ring, "reduce": ring, "gather": gather}
_DTYPES = (*KERNEL_DTYPES, torch.float64)
_METHODS = ("get_logits", "get_ground_truth", "_loss")

# The options of a call of `SigLipLoss`; the others belong to the module.
CALL_OPTIONS = ("image_groups", "text_groups", "offset", "positive_weight", "image_weight", "text_weight")


class Arguments(NamedTuple):
    """Checked arguments of a loss, or of the losses of prefixes, for which see `matryoshka.arguments.Prefixes`."""

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    widths: tuple[int, ...] = ()
    width_weights: Tensor | None = None


# Checks what is particular to a loss: takes images and texts of a checked dtype, and the name of an engine.
Check = Callable[[Tensor, Tensor, str], Arguments]


class SigLipLoss(nn.Module):
    """The pairwise sigmoid loss of the global batch, a drop-in for open_clip's `SigLipLoss` (arXiv 2303.15343).

    rank, world_size: as in open_clip; with world_size 1 the loss is that of the local batch. If `group` is given they
    default to the group's.
    dist_impl: how texts are exchanged. "ring" (default): around the ranks, one block at a time, overlapped with the
    computation, in memory O(local N·D); "gather": by one all-gather, in O(global N·D). open_clip's "bidir", "shift" and
    "reduce" differ only in the exchange, and select the ring here.
    chunk_size: the most images per block of logits; 0 chooses automatically. cache_labels: True or False, without
    effect, accepted for compatibility. bidir, use_horovod: constructor arguments of open_clip 2; horovod is not
    supported.
    backend: "triton", "chunked" (PyTorch operations), or "auto": triton on GPUs that run the kernels,
    chunked elsewhere, and `plain_sigmoid_loss` within transforms of torch.func and forward-mode differentiation, which
    the others and a global batch refuse.
    average_loss: return the mean of the ranks' losses, the same on every rank; gradients do not change.
    positive_weight, negative_weight, ignore, reduction: as in `sigmoid_loss`, where "none" is not supported with
    several ranks; what the sum is divided by is counted in the global batch.

    A subclass, or an instance, may override `get_logits`, `get_ground_truth` (several positives, soft labels) and
    `_loss` as in open_clip. Then these are called and PyTorch computes the loss: over the texts of all ranks after one
    gather, for local batches of equal size; `backend` and `chunk_size` cannot be chosen, and raise if they are.

    A copy shares `group`. A pickle has no process group: unpickled, the default group is that of the process that
    loads it, and pickling raises UnsupportedInputError for any other group.

    `siglip_kernels.sigmoid_loss.distributed` defines each rank's loss and gradients. Local batches may differ in size.
    Raises UnsupportedInputError for unsupported arguments, on every rank if one rank refuses its input.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        bidir: bool | None = None,
        use_horovod: bool = False,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        average_loss: bool = False,
        positive_weight: float = 1.0,
        negative_weight: float = 1.0,
        ignore: int | None = None,
        reduction: str = "images",
    ) -> None:
        super().__init__()
        if not isinstance(cache_labels, bool):
            supported = "True or False, or chunk_size by name"
            raise unsupported(self._get_name(), "cache_labels", f"is {cache_labels!r}", supported)
        if use_horovod:
            raise unsupported(self._get_name(), "use_horovod", "is True", "torch.distributed")
        if dist_impl is None:
            dist_impl = "ring" if bidir is None else "bidir" if bidir else "shift"
        elif bidir is not None:
            raise unsupported(self._get_name(), "bidir", f"is {bidir} beside dist_impl={dist_impl!r}", "one of the two")
        if dist_impl not in _ROUTES:
            raise unsupported(self._get_name(), "dist_impl", f"is {dist_impl!r}", ", ".join(_ROUTES))
        if backend not in ("auto", "triton", "chunked"):
            raise unsupported(self._get_name(), "backend", f"is {backend!r}", "auto, triton, chunked")
        check_chunk_size(self._get_name(), chunk_size)
        check_reduction(self._get_name(), reduction)
        if group is not None and world_size == 1:
            rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        if not 0 <= rank < world_size:
            raise unsupported(
                self._get_name(), "rank", f"is {rank} with world_size {world_size}", "0 to world_size - 1"
            )
        if reduction == "none" and world_size > 1:
            raise unsupported(self._get_name(), "reduction", "is 'none' with several ranks", "another one")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.chunk_size = chunk_size
        self.group = group
        self.backend = backend
        self.average_loss = average_loss
        self.positive_weight = positive_weight
        self.negative_weight = negative_weight
        self.ignore = ignore
        self.reduction = reduction

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        image_groups: Tensor | None = None,
        text_groups: Tensor | None = None,
        offset: int | None = None,
        positive_weight: float | Tensor | None = None,
        image_weight: Tensor | None = None,
        text_weight: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss}.

        image_features: (local N, D), text_features: (local M, D), normalised; N = M without groups; fp64 is supported
        by "chunked" only. logit_scale: exponentiated. It and logit_bias are numbers or tensors () or (1,); logit_bias
        None is 0. image_groups, text_groups, image_weight, text_weight: as in `sigmoid_loss`, (local N,) and (local M,)
        in the global batch; pairs of different ranks may also be in one group.
        offset: as in `sigmoid_loss`, for images and texts that are counted over all ranks; the same on every rank.
        positive_weight: instead of the module's: a number, or (local N,), one for each image.
        """
        options = self._options(
            image_groups=image_groups,
            text_groups=text_groups,
            offset=offset,
            positive_weight=positive_weight,
            image_weight=image_weight,
            text_weight=text_weight,
        )
        if self._overridden():
            local, across = self._local_by_methods, self._global_by_methods
        else:
            local, across = self._local, self._global
            logit_bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            loss = local(image_features, text_features, logit_scale, logit_bias, options)
        else:
            if torch.compiler.is_compiling():  # collectives cause a graph break
                across = torch.compiler.disable(across)
            loss = across(image_features, text_features, logit_scale, logit_bias, options)
        return {"contrastive_loss": loss} if output_dict else loss

    def _options(self, positive_weight: float | Tensor | None = None, **given: Any) -> PairOptions:
        """Those of a call, and this module's."""
        options: PairOptions = dict(
            positive_weight=self.positive_weight if positive_weight is None else positive_weight,
            negative_weight=self.negative_weight,
            ignore=self.ignore,
        )
        options.update(given)  # type: ignore[typeddict-item]
        return options

    # What open_clip lets subclasses override. Nothing calls these unless one of them is overridden.

    def get_logits(self, image_features: Tensor, text_features: Tensor, logit_scale, logit_bias=None) -> Tensor:
        """(N, M): logit_scale · images · textsᵀ + logit_bias."""
        logits = logit_scale * image_features @ text_features.mT
        return logits if logit_bias is None else logits + logit_bias

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """(N, N): 1 for pairs that belong together, which are those of the diagonal, and -1 for all others."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def _loss(
        self, image_features: Tensor, text_features: Tensor, logit_scale, logit_bias=None, negative_only: bool = False
    ) -> Tensor:
        """The loss of N images and N texts; negative_only: none of them belong together, as on two ranks."""
        logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        count = len(image_features)
        labels = self.get_ground_truth(image_features.device, image_features.dtype, count, negative_only=negative_only)
        return -F.logsigmoid(labels * logits).sum() / count

    def _overridden(self) -> list[str]:
        """The methods that this instance or its class has of its own."""
        own, kind = self.__dict__, type(self)
        return [name for name in _METHODS if name in own or getattr(kind, name) is not getattr(SigLipLoss, name)]

    def _refuse_choices(self, options: PairOptions) -> None:
        """Those of a loss that overridden methods compute. options: of a call, and this module's."""
        but = f"but {' and '.join(self._overridden())} is overridden and computes the loss"
        for name, default in (("backend", "auto"), ("chunk_size", 0)):
            value = getattr(self, name)
            if value != default:
                raise unsupported(self._get_name(), name, f"is {value!r}, {but}", repr(default))
        ordinary = {"positive_weight": 1.0, "negative_weight": 1.0}
        chosen = {**options, "reduction": None if self.reduction == "images" else self.reduction}
        for name, value in chosen.items():
            if value is not None and not (
                name in ordinary and not isinstance(value, Tensor) and value == ordinary[name]
            ):
                raise unsupported(self._get_name(), name, f"is given, {but}", "none")

    def _local_by_methods(
        self, image_features: Tensor, text_features: Tensor, logit_scale, logit_bias, options: PairOptions
    ) -> Tensor:
        self._refuse_choices(options)
        return self._loss(image_features, text_features, logit_scale, logit_bias)

    def _global_by_methods(
        self, image_features: Tensor, text_features: Tensor, logit_scale, logit_bias, options: PairOptions
    ) -> Tensor:
        check_scalars = self._check(logit_scale, 0.0 if logit_bias is None else logit_bias)

        def check(x: Tensor, y: Tensor, engine: str) -> Arguments:
            self._refuse_choices(options)
            return check_scalars(x, y, engine)

        group = self._group()
        (sizes, _), _ = self._agreed(group, image_features, text_features, options, "chunked", check)
        if len(set(sizes)) > 1:
            got = f"differ between ranks in number: {list(sizes)}"
            raise unsupported(
                self._get_name(), "features", got, f"the same where {self._overridden()[0]} is overridden"
            )
        losses = [
            self._loss(image_features, texts, logit_scale, logit_bias, negative_only=rank != self.rank)
            for rank, texts in enumerate(GatherTexts.apply(text_features, group))
        ]
        loss = torch.stack(losses).sum()
        if self.average_loss:
            mean = loss.detach().clone()
            dist.all_reduce(mean, group=group)
            loss = loss + (mean / self.world_size - loss.detach())
        return loss

    def _engine(self, image_features: Tensor) -> str:
        if self.backend != "auto":
            return self.backend
        return "triton" if image_features.is_cuda and kernels_run_on(image_features.device) else "chunked"

    def _local(
        self, image_features: Tensor, text_features: Tensor, logit_scale, logit_bias, options: PairOptions
    ) -> Tensor:
        options = self._local_options(image_features, text_features, options)
        embeds, reduction = (image_features, text_features), self.reduction
        if self.backend == "auto" and under_transform():
            return plain_sigmoid_loss(*embeds, logit_scale, logit_bias, reduction=reduction, **options)
        loss = sigmoid_loss if self._engine(image_features) == "triton" else chunked_sigmoid_loss
        chosen: dict[str, Any] = dict(chunk_size=self.chunk_size, reduction=reduction, **options)
        return loss(*embeds, logit_scale, logit_bias, **chosen)

    def _local_options(self, image_features: Tensor, text_features: Tensor, options: PairOptions) -> PairOptions:
        """With this module's further weight of positive pairs."""
        check_embeds(self._get_name(), image_features, text_features, same_length=same_length(options))
        weight = self._weight_of_positives(image_features, text_features, options)
        if weight is None:
            return options
        make_pairs(self._get_name(), image_features, text_features, **options)  # checks what is multiplied next
        return {**options, "positive_weight": weight * options["positive_weight"]}

    def _weight_of_positives(
        self, image_features: Tensor, text_features: Tensor, options: PairOptions, peers: Peers | None = None
    ) -> Tensor | None:
        """(N,): a further weight of each image's positive pairs, or None. peers: of a global batch."""
        return None

    def _global(
        self, image_features: Tensor, text_features: Tensor, logit_scale, logit_bias, options: PairOptions
    ) -> Tensor:
        check = self._check(logit_scale, logit_bias)
        arguments, batch, positives = self._global_batch(image_features, text_features, options, check)
        loss: Tensor = GlobalLoss.apply(*arguments[:4], batch)
        return loss if positives is None else loss / positives

    # For `matryoshka_sigmoid_loss`, which computes the losses of several widths together.

    def fuses(self) -> bool:
        """Whether this loss is the built-in one, and not within a transform of torch.func, which calls others."""
        kind = type(self)
        own = kind.forward is not SigLipLoss.forward or kind.__call__ is not nn.Module.__call__
        return is_unhooked(self) and not (own or self._overridden() or under_transform())

    def local_choices(self, image_features: Tensor, text_features: Tensor, **given: Any) -> tuple[str, PairOptions]:
        """Of the local batch: the name of the engine, and the options. given: `CALL_OPTIONS`."""
        options = self._local_options(image_features, text_features, self._options(**given))
        return self._engine(image_features), options

    def global_batch(
        self, image_features: Tensor, text_features: Tensor, check: Check, **given: Any
    ) -> tuple[Arguments, GlobalBatch, Tensor | None]:
        """See `_global_batch`. given: `CALL_OPTIONS`."""
        return self._global_batch(image_features, text_features, self._options(**given), check)

    def _global_batch(
        self, image_features: Tensor, text_features: Tensor, options: PairOptions, check: Check
    ) -> tuple[Arguments, GlobalBatch, Tensor | None]:
        """What all ranks have agreed on, and what a loss is divided by at last, or None.

        Raises on every rank if one refuses its own.
        """
        group = self._group()
        if self.reduction == "none":
            raise unsupported(
                self._get_name(), "reduction", "is 'none' with several ranks", "images, pairs, positives, sum"
            )
        engine = self._engine(image_features) if isinstance(image_features, Tensor) else "chunked"
        (images, texts), (arguments, pairs) = self._agreed(group, image_features, text_features, options, engine, check)
        peers = Peers(group, self.rank, images, texts)
        weight = self._weight_of_positives(image_features, text_features, options, peers)
        if weight is not None:
            weight = weight.to(arguments.logit_scale.dtype)
            pairs = pairs.weighted(weight, torch.ones_like(weight), texts[self.rank])
        positives = None
        if self.reduction == "positives" and pairs.image_groups is not None and pairs.text_groups is not None:
            positives = matches_of_all(pairs.image_groups, pairs.text_groups, texts, peers).sum()
            dist.all_reduce(positives, group=group)
            if not bool(positives):
                raise unsupported(
                    self._get_name(), "reduction", "is 'positives', but there is no positive pair", "one or more"
                )
        # Of the global batch, divided by the number of ranks: see `distributed`.
        divisor = peers.mean_images
        if self.reduction == "pairs":
            divisor *= sum(texts)
        elif self.reduction == "positives" and positives is None:
            divisor = positives_on_diagonal(self._get_name(), sum(images), sum(texts), pairs.diagonal) / peers.world
        elif self.reduction == "sum" or positives is not None:
            divisor = 1 / peers.world
        batch = GlobalBatch(
            engine=engine,
            chunk_size=self.chunk_size,
            peers=peers,
            route=_ROUTES[self.dist_impl],
            pairs=pairs,
            divisor=divisor,
            wanted=_wanted(arguments),
            average=self.average_loss,
        )
        return arguments, batch, positives

    def _check(self, logit_scale: Tensor | float, logit_bias: Tensor | float) -> Check:
        def check(x: Tensor, y: Tensor, engine: str) -> Arguments:
            if engine == "triton":
                check_kernel_input(self._get_name(), x)
                make_engine(engine, x)  # raises where the kernels cannot run
                x, y = padded(x), padded(y)
            scale = as_scalar(self._get_name(), "logit_scale", logit_scale, x)
            return Arguments(x, y, scale, as_scalar(self._get_name(), "logit_bias", logit_bias, x))

        return check

    def _agreed(
        self,
        group: dist.ProcessGroup,
        image_features: Tensor,
        text_features: Tensor,
        options: PairOptions,
        engine: str,
        check: Check,
    ) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[Arguments, Pairs]]:
        """The numbers of images and of texts on each rank, and the checked arguments.

        Raises on every rank if one refuses its own.
        """
        problem: Exception | None = None
        checked: tuple[Arguments, Pairs] | None = None
        try:
            check_embeds(self._get_name(), image_features, text_features, same_length=same_length(options))
            autocast = autocast_dtype(image_features)
            x, y = cast(image_features, autocast), cast(text_features, autocast)
            if x.dtype != y.dtype or x.dtype not in _DTYPES:
                got = f"has dtype {y.dtype}, image_features {x.dtype}"
                raise unsupported(
                    self._get_name(), "text_features", got, "float32, float16, bfloat16 or float64 for both"
                )
            arguments = check(x, y, engine)
            x, y, scale, bias = arguments[:4]
            refuse_transforms(self._get_name(), image_features=x, text_features=y, logit_scale=scale, logit_bias=bias)
            pairs = make_pairs(self._get_name(), x, y, **options)
            checked = arguments, replace(pairs, diagonal=options.get("offset") or 0)
        except Exception as error:  # raised after the other ranks know of it, which would wait for this one
            problem = error
        sizes = _agree(self._get_name(), group, self.rank, image_features, checked, problem)
        assert checked is not None  # else _agree has raised
        return sizes, checked

    def _group(self) -> dist.ProcessGroup:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{self._get_name()}: world_size is {self.world_size}, but torch.distributed has no process group; "
                "call torch.distributed.init_process_group first"
            )
        group = self.group if self.group is not None else dist.group.WORLD
        assert group is not None
        actual = dist.get_rank(group), dist.get_world_size(group)
        if actual != (self.rank, self.world_size):
            got = f"are {self.rank} and {self.world_size}"
            supported = f"the process group's own, {actual[0]} and {actual[1]}"
            raise unsupported(self._get_name(), "rank and world_size", got, supported)
        return group

    def __copy__(self) -> Self:
        twin = type(self).__new__(type(self))
        twin.__dict__ = self.__dict__.copy()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = type(self).__new__(type(self))
        if self.group is not None:  # a handle of this process, as a stream or a file is
            memo[id(self.group)] = self.group
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """For pickles alone: another process has other groups."""
        if self.group is None:
            return self.__dict__
        if self.group is not dist.group.WORLD:
            got = "is a process group other than the default one and cannot be pickled"
            raise unsupported(self._get_name(), "group", got, "the default group; a model after use_global_loss(False)")
        return {**self.__dict__, "group": None}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}, dist_impl={self.dist_impl!r}, backend={self.backend!r}"


class SigLIPPlusLoss(SigLipLoss):
    """SigLIP+: several positives per image, each weighing 1/k of an image's k, as siglip-kernel defines it.

    Pairs of equal groups are positive. A positive weighs 1/k, where k is the number of texts in its group, or with
    `symmetric` the mean of 1/k and 1/k', where k' is the number of images in its group; a negative weighs 1. Groups are
    counted in the global batch. Without groups all weights are 1. The sum is divided by the number of pairs.

    symmetric: see above. The other arguments are those of `SigLipLoss`.
    """

    def __init__(self, *arguments: Any, symmetric: bool = True, reduction: str = "pairs", **named: Any) -> None:
        super().__init__(*arguments, reduction=reduction, **named)
        self.symmetric = symmetric

    def _weight_of_positives(
        self, image_features: Tensor, text_features: Tensor, options: PairOptions, peers: Peers | None = None
    ) -> Tensor | None:
        images, texts = options.get("image_groups"), options.get("text_groups")
        check_groups(self._get_name(), image_features, text_features, images, texts)
        if images is None or texts is None:
            return None
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        return plus_weights(*self._members(images, texts, peers), self.symmetric, dtype)

    def _members(self, images: Tensor, texts: Tensor, peers: Peers | None) -> tuple[Tensor, Tensor]:
        """(N,) each: how many texts and how many images are in each image's group."""
        if peers is None:
            return matches(images, texts), matches(images, images)
        return matches_of_all(images, texts, peers.texts, peers), matches_of_all(images, images, peers.images, peers)


def _wanted(arguments: Arguments) -> Wanted:
    image, text, scale, bias = arguments[:4]
    return Wanted(wants_gradients(image), wants_gradients(text), wants_gradients(scale, bias))


def _exchange_device(group: dist.ProcessGroup, image_features: object) -> torch.device:
    """Where ranks exchange a few numbers: the CPU if the group can, which waits for no GPU, else the features' GPU.

    NCCL connects the GPUs of the tensors that it is given: another GPU, such as the current one, would need a second
    connection, and two ranks may have the same one current.
    """
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    if isinstance(image_features, Tensor) and image_features.is_cuda:
        return image_features.device
    return torch.device("cuda", torch.cuda.current_device())


def _agree(
    operation: str,
    group: dist.ProcessGroup,
    rank: int,
    image_features: object,
    checked: tuple[Arguments, Pairs] | None,
    problem: Exception | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of images and of texts on each rank.

    Raises on every rank if one refused its input or if their inputs disagree.
    """
    facts = [0] * 10
    if checked is not None:
        arguments, pairs = checked
        x, y, wanted = arguments.image_embeds, arguments.text_embeds, _wanted(arguments)
        gradients = wanted.image or wanted.text or wanted.scalars
        flags = (wanted.text, gradients, pairs.image_groups is not None, pairs.text_weight is not None)
        facts = [len(x), len(y), x.shape[1], _DTYPES.index(x.dtype), *map(int, flags), pairs.diagonal]
        facts.append(zlib.crc32(repr(arguments.widths).encode()))
    mine = torch.tensor(facts, dtype=torch.int64, device=_exchange_device(group, image_features))
    gathered = mine.new_empty((dist.get_world_size(group), len(facts)))
    all_gather(gathered, mine, group)
    table: list[list[int]] = gathered.tolist()
    if problem is not None:
        raise problem
    refused = [other for other, row in enumerate(table) if row[0] == 0]
    if refused:
        got = f"was refused by rank {refused[0]}, whose own error says why"
        raise unsupported(operation, "input", got, "valid input on every rank")
    names = (
        "width",
        "dtype",
        "whether texts need gradients",
        "whether anything needs gradients",
        "whether there are groups",
        "whether there are weights",
        "offset",
        "widths of prefixes",
    )
    for column, name in enumerate(names, start=2):
        values = [row[column] for row in table]
        if len(set(values)) > 1:
            shown = [str(_DTYPES[value]) if name == "dtype" else value for value in values]
            got = f"differ between ranks in {name}" + ("" if name == names[-1] else f": {shown}")
            raise unsupported(operation, "features", got, "the same on every rank")
    return tuple(row[0] for row in table), tuple(row[1] for row in table)
