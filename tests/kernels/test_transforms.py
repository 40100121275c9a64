"""Each operation under each transform of torch.func and torch.autograd: plain PyTorch's result, or refused by name."""

from collections.abc import Callable

import pytest
import torch
from test_arguments import ARGUMENTS, OPTIONS, SHAPES, call, tensors
from torch import Tensor, func
from torch.autograd import forward_ad
from transforms import FIRST, SECOND, SERVED, Function

import siglip_kernels
from siglip_kernels import UnsupportedInputError, reference


def first_elements(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten()[:2] for part in (result if isinstance(result, tuple) else (result,))])


def of_one_argument(operation: str, argument: str, arguments: dict[str, Tensor]) -> tuple[Function, Function]:
    """The operation and its definition, as functions of this argument."""
    options = OPTIONS.get(operation, {})

    def function(of: Callable) -> Function:
        return lambda x: first_elements(of(**{**arguments, argument: x}, **options))

    name = operation.removeprefix("chunked_").removeprefix("plain_")
    return function(getattr(siglip_kernels, operation)), function(getattr(reference, name))


OPERATIONS = [(operation, next(iter(shapes))) for operation, shapes in SHAPES.items()]


@pytest.mark.parametrize(
    ("operation", "argument", "transform"),
    [
        *((operation, argument, "func.grad") for operation, argument in ARGUMENTS),
        *((operation, argument, transform) for operation, argument in OPERATIONS for transform in FIRST),
    ],
)
def test_transforms_are_refused_by_name(operation, argument, transform, device):
    arguments = tensors(operation, device)
    function, _ = of_one_argument(operation, argument, arguments)
    differentiated = (
        r"(has a tangent .*; supported: reverse mode|is differentiated by torch.func.*; supported: backward)"
    )
    with pytest.raises(UnsupportedInputError, match=f"^{operation}: {argument} {differentiated}.*'eager'"):
        FIRST[transform](function, arguments[argument])


@pytest.mark.parametrize(("operation", "argument"), OPERATIONS)
@pytest.mark.parametrize("transform", SECOND)
def test_second_derivatives_are_refused_by_name(operation, argument, transform, device):
    arguments = tensors(operation, device)
    function, definition = of_one_argument(operation, argument, arguments)
    if operation == "patch_embed":  # whose derivative is plain PyTorch
        torch.testing.assert_close(
            SECOND[transform](function, arguments[argument]), SECOND[transform](definition, arguments[argument])
        )
        return
    name = operation.removeprefix("chunked_")
    with pytest.raises(UnsupportedInputError, match=f"^{name}: create_graph asks for second derivatives.*'eager'"):
        SECOND[transform](function, arguments[argument])


@pytest.mark.parametrize(("operation", "argument"), OPERATIONS)
@pytest.mark.parametrize("transform", SERVED)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_what_first_derivatives_and_calls_per_sample_give(operation, argument, transform, device):
    arguments = tensors(operation, device)
    function, definition = of_one_argument(operation, argument, arguments)
    found = SERVED[transform](function, arguments[argument])
    torch.testing.assert_close(found, SERVED[transform](definition, arguments[argument]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("operation", "argument"), OPERATIONS)
def test_no_samples(operation, argument, device):
    arguments = tensors(operation, device)
    function, _ = of_one_argument(operation, argument, arguments)
    x = arguments[argument]
    expected = function(x)
    found = func.vmap(function, in_dims=1)(x.new_empty(x.shape[0], 0, *x.shape[1:]))
    assert found.shape == (0, *expected.shape) and found.dtype == expected.dtype


@pytest.mark.parametrize("operation", ["linear", "plain_sigmoid_loss"])
@pytest.mark.parametrize("transform", FIRST | SECOND | SERVED)
def test_what_is_plain_pytorch_is_transformed(operation, transform, device):
    """linear without a residual, and the loss of the backends without kernels."""
    arguments = tensors(operation.removeprefix("plain_"), device)
    arguments.pop("residual", None)
    argument = next(iter(arguments))
    function, definition = of_one_argument(operation, argument, arguments)
    call = (FIRST | SECOND | SERVED)[transform]
    torch.testing.assert_close(call(function, arguments[argument]), call(definition, arguments[argument]))


@pytest.mark.parametrize("loss", [siglip_kernels.plain_sigmoid_loss, siglip_kernels.SigLipLoss()])
def test_a_loss_of_many_pairs_is_transformed(loss, device):
    """From 1024 pairs on it is computed in chunks, which cannot be."""
    x, y = torch.randn(2, 1030, 4, device=device).unbind()
    found = func.grad(lambda x: loss(x, y, 2.0, -1.0))(x)
    torch.testing.assert_close(found, func.grad(lambda x: reference.sigmoid_loss(x, y, 2.0, -1.0))(x))


@pytest.mark.parametrize(("operation", "argument"), OPERATIONS)
def test_a_call_beside_what_is_differentiated(operation, argument, device):
    """Constants within a transform, and what is computed from them there, are no business of it."""
    arguments = tensors(operation, device)
    function, _ = of_one_argument(operation, argument, arguments)
    scale, expected = torch.tensor(3.0, device=device), function(2 * arguments[argument]).sum()
    for transform in (func.grad, func.jacfwd):
        gradient = transform(lambda scale: scale * function(2 * arguments[argument]).sum())(scale)
        torch.testing.assert_close(gradient, expected)
    parameter = arguments[argument].requires_grad_()
    with pytest.raises(UnsupportedInputError, match=f"{operation}: {argument} is differentiated by torch.func.grad"):
        func.grad(lambda scale: scale * function(parameter).sum())(scale)


@pytest.mark.parametrize(("operation", "argument"), OPERATIONS)
def test_tangents_of_a_gradient_are_refused(operation, argument, device):
    """They would be dropped silently."""
    arguments = tensors(operation, device)
    x = arguments[argument].requires_grad_()
    out = call(operation, arguments)
    with forward_ad.dual_level():
        gradient = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        if operation == "patch_embed":
            (found,) = torch.autograd.grad(out, x, gradient)
            assert forward_ad.unpack_dual(found).tangent is not None
            return
        with pytest.raises(UnsupportedInputError, match="out_grad has a tangent"):
            torch.autograd.grad(out, x, gradient)


@pytest.mark.parametrize(
    "operation",
    [name if name == "attention" else pytest.param(name, marks=pytest.mark.thorough) for name in SHAPES],
)
@pytest.mark.parametrize("within", [False, True])
def test_transforms_are_refused_under_compilation(operation, within, device):
    """within: the transform is compiled, or else what it is applied to."""
    arguments = tensors(operation, device)
    argument = next(iter(arguments))
    function, _ = of_one_argument(operation, argument, arguments)

    def loss(x: Tensor) -> Tensor:
        return function(x).sum()

    torch._dynamo.reset()
    compiled = (
        torch.compile(func.grad(loss), backend="eager") if within else func.grad(torch.compile(loss, backend="eager"))
    )
    with pytest.raises(Exception, match=f"{operation}: {argument} is differentiated by torch.func.grad"):
        compiled(arguments[argument])
