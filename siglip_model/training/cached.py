"""Training on batches whose activations do not fit: the towers run in micro-batches, the loss sees the whole batch.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (arXiv 2101.06983): the
gradients of a tower depend on the other samples only through the gradients of its embeddings. So the embeddings are
computed without a graph, the loss gives their gradients, and the towers run again, one micro-batch at a time, each
differentiated at once. It takes one more forward pass of the towers, but for one whose weights are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from siglip_kernels.errors import unsupported
from siglip_model import onednn
from siglip_model.outputs import pooled, unit_length
from siglip_model.training.objective import trains

if TYPE_CHECKING:
    from siglip_model.model import SiglipModel

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def cached_step(
    model: SiglipModel | nn.parallel.DistributedDataParallel,
    input_ids: Tensor,
    pixel_values: Tensor,
    micro_batch: int,
    *,
    attention_mask: Tensor | None = None,
    pixel_attention_mask: Tensor | None = None,
    spatial_shapes: Tensor | None = None,
    loss: Loss | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Add the gradients of the whole batch's loss to the parameters, with the activations of a micro-batch in memory.

    Takes the place of `model(..., return_loss=True).loss.backward()`. Returns the loss, without a graph.

    input_ids (T, L), attention_mask, pixel_values (I, C, H, W) and, of a model at native resolution,
    pixel_attention_mask and spatial_shapes: as the model takes them. micro_batch: the most images or texts that a tower
    sees at a time. loss: a function of image_embeds (I, D), text_embeds (T, D), t and b that returns a scalar; by
    default that of `return_loss`, for which I = T; with groups, functools.partial(siglip_kernels.sigmoid_loss, ...).
    scaler: scales the loss before it is differentiated.
    A tower of which nothing is trained runs once. Dropout draws the same in both passes. Autocast applies as it does to
    the model. Under DDP the gradients are averaged over the ranks here, as its own backward pass would; call
    `model.module.use_global_loss()` before for the loss of the global batch. Raises UnsupportedInputError for a model
    under FSDP, for a micro_batch below 1, and for inputs of one tower that differ in number.
    """
    if isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1:
        raise unsupported("cached_step", "micro_batch", f"is {micro_batch!r}", "integers from 1 on")
    parallel = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
    siglip: SiglipModel = model if parallel is None else model.module  # type: ignore[assignment]
    if not hasattr(siglip, "get_text_features") or hasattr(siglip, "unshard"):
        raise unsupported("cached_step", "model", f"is {type(model).__name__}", "a SiglipModel, alone or under DDP")

    images = _pieces(
        siglip.vision_model,
        siglip.get_image_features,
        micro_batch,
        pixel_values=pixel_values,
        pixel_attention_mask=pixel_attention_mask,
        spatial_shapes=spatial_shapes,
    )
    texts = _pieces(
        siglip.text_model, siglip.get_text_features, micro_batch, input_ids=input_ids, attention_mask=attention_mask
    )
    if loss is None:
        if len(pixel_values) != len(input_ids):
            got = f"asks for the loss of {len(pixel_values)} images and {len(input_ids)} texts"
            raise unsupported("cached_step", "loss", got, "as many images as texts, or a loss with groups")
        loss = siglip.ops.sigmoid_loss if siglip.global_loss is None else siglip.global_loss

    def whole(found: Sequence[Sequence[Tensor]]) -> Tensor:
        image_embeds, text_embeds = (
            torch.cat([embeds for (embeds,) in side]) for side in (found[: len(images)], found[len(images) :])
        )
        return loss(image_embeds, text_embeds, siglip.logit_scale.exp().squeeze(), siglip.logit_bias.squeeze())

    with onednn.left_out():  # the second pass, with a graph, has to find the numbers of the first
        value = cached_backward([*images, *texts], whole, scaler)
    if parallel is not None:
        _average_gradients(parallel)
    return value


def cached_backward(
    pieces: Sequence[Piece],
    loss: Callable[[Sequence[Sequence[Tensor]]], Tensor],
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Add the gradients of a function of all pieces' results, with the graph of one piece at a time.

    loss: from the results of each piece to a scalar. Returns it, without a graph.
    """
    value = loss([piece.first() for piece in pieces])
    with torch.autocast(value.device.type, enabled=False):
        (value if scaler is None else scaler.scale(value)).backward()
    for piece in pieces:
        piece.again()
    return value.detach()


class Piece:
    """A function of a micro-batch that runs twice with the same random numbers, at first without a graph.

    trained: whether there is anything to differentiate; if not, it runs once.
    """

    def __init__(self, compute: Callable[..., Sequence[Tensor]], *inputs: Any, trained: bool = True) -> None:
        self.compute, self.inputs, self.trained = compute, inputs, trained

    def first(self) -> Sequence[Tensor]:
        """The results, whose gradients `again` takes."""
        self.cpu_state = torch.get_rng_state()
        self.devices, self.states = get_device_states(*self.inputs)
        with torch.no_grad():
            self.results = [result.detach().requires_grad_(self.trained) for result in self.compute(*self.inputs)]
        return self.results

    def again(self) -> None:
        """Adds the gradients of the parameters."""
        if all(before.grad is None for before in self.results):  # nothing is trained, or the loss does not use them
            return
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.states)
            results = self.compute(*self.inputs)
        # Some of several results may be a frozen tower's, or not used by the loss.
        known = [
            (result, before.grad)
            for result, before in zip(results, self.results, strict=True)
            if result.requires_grad and before.grad is not None
        ]
        if known:
            with torch.autocast(known[0][0].device.type, enabled=False):
                torch.autograd.backward([result for result, _ in known], [gradient for _, gradient in known])


def _pieces(tower: nn.Module, features: Callable[..., Any], micro_batch: int, **inputs: Tensor | None) -> list[Piece]:
    """The embeddings of micro-batches of a tower's inputs, the first of which counts them."""
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    (first, one), *others = given.items()
    for name, tensor in others:
        if len(tensor) != len(one):
            raise unsupported("cached_step", name, f"has {len(tensor)} rows beside {len(one)} of {first}", "as many")

    def embed(*tensors: Tensor) -> tuple[Tensor]:
        return (unit_length(pooled(features(**dict(zip(given, tensors, strict=True)), return_dict=True))),)

    trained = trains(tower) or any(tensor.requires_grad for tensor in given.values())
    parts = zip(*(tensor.split(micro_batch) for tensor in given.values()), strict=True)
    return [Piece(embed, *part, trained=trained) for part in parts]


def _average_gradients(parallel: nn.parallel.DistributedDataParallel) -> None:
    group = parallel.process_group
    gradients = [parameter.grad for parameter in parallel.parameters() if parameter.grad is not None]
    requests = [dist.all_reduce(gradient, group=group, async_op=True) for gradient in gradients]
    for request, gradient in zip(requests, gradients, strict=True):
        request.wait()
        gradient /= dist.get_world_size(group)
