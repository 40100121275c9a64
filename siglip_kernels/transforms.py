"""What is registered for each operator beside its kernels: first derivatives, and vmap as one launch per sample.

The operators have no forward-mode and no second derivatives, and PyTorch cannot differentiate a registered operator
under torch.func: those raise UnsupportedInputError, which names operation, argument and transform. The fallbacks ask
`under_transform` before they choose an operator.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from siglip_kernels.arguments import Affine
from siglip_kernels.errors import unsupported

_REVERSE = "reverse mode; for tangents, use the backend 'eager' or siglip_kernels.reference"
_PLAIN = "backward() and torch.autograd.grad; for transforms, use the backend 'eager' or siglip_kernels.reference"
_FIRST = "first derivatives; for more, use the backend 'eager', or a model that is not accelerated"
_DERIVATIVES = {"Grad": "torch.func.grad, vjp or jacrev", "Jvp": "torch.func.jvp, jacfwd or linearize"}


def under_transform() -> bool:
    """Whether a call is within a transform of torch.func or forward-mode differentiation; traceable, 0.1 µs."""
    return torch._C._are_functorch_transforms_active() or in_forward_mode()


def can_read_values(tensor: Tensor) -> bool:
    """Whether the host may read values: not while they are traced, captured or batched by torch.func.vmap."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(tensor) is not Tensor or under_transform():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def in_forward_mode() -> bool:
    """Whether a call is within forward-mode differentiation."""
    return forward_ad._current_level >= 0


def refuse_transforms(operation: str, **arguments: Tensor | Affine | None) -> None:
    """Raises where PyTorch would fail in its own words or, for tangents, drop them silently: see the module.

    arguments: all differentiable inputs of the operator; of an Affine named `fc1` the inputs are fc1_weight, fc1_bias.
    """
    if not under_transform():  # asking each tensor would take longer
        return
    tensors: dict[str, Tensor | None] = {}
    for name, value in arguments.items():
        if isinstance(value, Affine):
            tensors[f"{name}_weight"], tensors[f"{name}_bias"] = value
        else:
            tensors[name] = value
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if in_forward_mode() and _has_tangent(tensor):
            raise unsupported(operation, name, "has a tangent (forward-mode differentiation)", _REVERSE)
    transform = _differentiating()
    if transform is None or not torch.is_grad_enabled():
        return
    for name, tensor in given.items():
        # torch.compile cannot trace whether they require gradients.
        if torch.compiler.is_compiling() or _requires_gradients(tensor):
            raise unsupported(operation, name, f"is differentiated by {transform}", _PLAIN)


def _differentiating() -> str | None:
    """The innermost transform under way that differentiates."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return next((_DERIVATIVES[kind] for kind in (i.key().name for i in reversed(stack)) if kind in _DERIVATIVES), None)


# A constant while torch.compile traces: see siglip_kernels.device.
_differentiating._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_tangent(tensor: Tensor) -> bool:
    return any(forward_ad.unpack_dual(layer).tangent is not None for layer in _layers(tensor))


def _requires_gradients(tensor: Tensor) -> bool:
    return any(layer.requires_grad for layer in _layers(tensor))


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor as each transform under way sees it, but for vmap, which hides derivatives."""
    if torch.compiler.is_compiling():  # which cannot trace the questions below
        yield tensor
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if not torch._C._functorch.is_batchedtensor(tensor):
            yield tensor
        tensor = torch._C._functorch.get_unwrapped(tensor)
    yield tensor


def register_derivative(
    operation: str, operator: Any, backward_operator: Any, differentiate: Callable[..., Any], keep: Callable[..., None]
) -> None:
    """Registers the first derivative of an operator, the refusal of the second, and vmap of both.

    differentiate, keep: as torch.library.register_autograd's backward and setup_context. backward_operator: the
    operator that `differentiate` calls; None if PyTorch differentiates all that it calls.
    """

    def checked(ctx, *gradients):
        if backward_operator is not None:
            refuse_transforms(operation, out_grad=gradients[0])  # the only differentiable output
        return differentiate(ctx, *gradients)

    def refuse(ctx, *gradients):
        raise unsupported(operation, "create_graph", "asks for second derivatives", _FIRST)

    operator.register_autograd(checked, setup_context=keep)
    operator.register_vmap(_one_by_one(operator))
    if backward_operator is not None:
        backward_operator.register_autograd(refuse)
        backward_operator.register_vmap(_one_by_one(backward_operator))


def _one_by_one(operator: Any) -> Callable[..., tuple[Any, Any]]:
    """A rule for torch.func.vmap: one call per sample. PyTorch's own takes no lists of tensors, and warns."""

    def rule(info, in_dims, *arguments):
        leaves, structure = pytree.tree_flatten(arguments)
        dims = pytree.tree_leaves(in_dims, is_leaf=lambda dim: dim is None)
        results = []
        for index in range(max(info.batch_size, 1)):
            sample = [_sample(leaf, dim, index) for leaf, dim in zip(leaves, dims, strict=True)]
            results.append(operator(*pytree.tree_unflatten(sample, structure)))
        if isinstance(results[0], Tensor):
            return torch.stack(results)[: info.batch_size], 0
        parts = tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True))
        return parts, (0,) * len(parts)

    return rule


def _sample(argument: Any, dim: int | None, index: int) -> Any:
    if dim is None:
        return argument
    if argument.shape[dim] == 0:  # of no samples, one of zeros gives the shapes of the results
        return argument.new_zeros((*argument.shape[:dim], *argument.shape[dim + 1 :]))
    return argument.select(dim, index)
