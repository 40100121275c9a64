"""What no operation takes, in any argument: tensors that are not dense, and tangents of forward-mode derivatives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import siglip_kernels
from siglip_kernels import UnsupportedInputError

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "linear": {"x": (3, 16), "weight": (16, 16), "bias": (16,), "residual": (3, 16)},
    "mlp": {
        "x": (3, 16),
        "fc1_weight": (24, 16),
        "fc1_bias": (24,),
        "fc2_weight": (16, 24),
        "fc2_bias": (16,),
        "residual": (3, 16),
    },
    "layer_norm": {"x": (3, 16), "weight": (16,), "bias": (16,)},
    "pre_norm_mlp": {
        "x": (3, 16),
        "norm_weight": (16,),
        "norm_bias": (16,),
        "fc1_weight": (24, 16),
        "fc1_bias": (24,),
        "fc2_weight": (16, 24),
        "fc2_bias": (16,),
    },
    "pre_norm_qkv": {
        "x": (2, 3, 16),
        "norm_weight": (16,),
        "norm_bias": (16,),
        "q_weight": (16, 16),
        "q_bias": (16,),
        "k_weight": (16, 16),
        "k_bias": (16,),
        "v_weight": (16, 16),
        "v_bias": (16,),
    },
    "pre_norm_attention": {
        "x": (2, 3, 16),
        "norm_weight": (16,),
        "norm_bias": (16,),
        "q_weight": (16, 16),
        "q_bias": (16,),
        "k_weight": (16, 16),
        "k_bias": (16,),
        "v_weight": (16, 16),
        "v_bias": (16,),
        "out_weight": (16, 16),
        "out_bias": (16,),
    },
    "attention": {"q": (2, 3, 2, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8)},
    "attention_pool": {
        "x": (2, 3, 16),
        "probe": (1, 1, 16),
        "in_proj_weight": (48, 16),
        "in_proj_bias": (48,),
        "out_proj_weight": (16, 16),
        "out_proj_bias": (16,),
    },
    "patch_embed": {"pixel_values": (2, 3, 8, 8), "weight": (16, 3, 4, 4), "bias": (16,), "position": (4, 16)},
    "sigmoid_loss": {"image_embeds": (4, 16), "text_embeds": (4, 16), "logit_scale": (), "logit_bias": ()},
    "chunked_sigmoid_loss": {"image_embeds": (4, 16), "text_embeds": (4, 16), "logit_scale": (), "logit_bias": ()},
}
OPTIONS: dict[str, dict[str, object]] = {
    "pre_norm_mlp": {"eps": 1e-6},
    "pre_norm_qkv": {"eps": 1e-6, "num_heads": 2},
    "pre_norm_attention": {"eps": 1e-6, "num_heads": 2},
    "attention_pool": {"num_heads": 2},
}
ARGUMENTS = [(operation, argument) for operation, shapes in SHAPES.items() for argument in shapes]


def tensors(operation: str, device: str) -> dict[str, Tensor]:
    return {name: torch.randn(shape, device=device) for name, shape in SHAPES[operation].items()}


def call(operation: str, arguments: dict[str, Tensor]) -> Tensor:
    result = getattr(siglip_kernels, operation)(**arguments, **OPTIONS.get(operation, {}))
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(("operation", "argument"), ARGUMENTS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tangents_are_refused(operation, argument, requires_grad, device):
    arguments = tensors(operation, device)
    call(operation, arguments)
    primal = arguments[argument].requires_grad_(requires_grad)
    with forward_ad.dual_level():
        arguments[argument] = forward_ad.make_dual(primal, torch.randn_like(primal))
        with pytest.raises(UnsupportedInputError, match=f"^{operation}: {argument} has a tangent .*; supported: "):
            call(operation, arguments)


@pytest.mark.parametrize("operation", SHAPES)
def test_tangents_are_refused_under_transforms_and_compilation(operation, device):
    (name, x), *others = tensors(operation, device).items()

    def derivative(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: call(operation, {name: x, **dict(others)}), (x,), (torch.ones_like(x),))[1]

    message = f"{operation}: {name} has a tangent"
    with pytest.raises(UnsupportedInputError, match=message):
        derivative(x)
    with pytest.raises(UnsupportedInputError, match=message):
        torch.func.vmap(derivative)(torch.stack((x, x)))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):  # the compiler wraps it in an error of its own
        torch.compile(derivative, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("operation", ["linear", "plain_sigmoid_loss"])
def test_what_is_plain_pytorch_has_tangents(operation, device):
    if operation == "linear":
        arguments = tensors("linear", device)
        del arguments["residual"]
    else:
        arguments = tensors("sigmoid_loss", device)
    arguments = {name: tensor.double() for name, tensor in arguments.items()}
    function = getattr(siglip_kernels.reference, operation.removeprefix("plain_"))
    tangents = {name: torch.randn_like(tensor) for name, tensor in arguments.items()}

    def derivative(function: Callable, dtype: torch.dtype) -> Tensor:
        with forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(arguments[name].to(dtype), tangents[name].to(dtype)) for name in arguments
            }
            return forward_ad.unpack_dual(function(**duals)).tangent

    found = derivative(getattr(siglip_kernels, operation), torch.float32)
    torch.testing.assert_close(found.double(), derivative(function, torch.float64), rtol=1e-4, atol=1e-4)


NOT_DENSE = {
    "sparse": (Tensor.to_sparse, "layout torch.sparse_coo"),
    "nested": (lambda tensor: torch.nested.nested_tensor([tensor, tensor]), "nested tensor"),
    "jagged": (lambda tensor: torch.nested.nested_tensor([tensor[None]] * 2, layout=torch.jagged), "nested tensor"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("operation", "argument"), [*ARGUMENTS, ("plain_sigmoid_loss", "text_embeds")])
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_that_are_not_dense_are_refused(operation, argument, kind, device):
    make, what = NOT_DENSE[kind]
    arguments = tensors("sigmoid_loss" if operation == "plain_sigmoid_loss" else operation, device)
    arguments[argument] = make(arguments[argument])
    with pytest.raises(UnsupportedInputError, match=f"^{operation}: {argument} .*{what}.*; supported: "):
        call(operation, arguments)


def test_a_product_without_residual_asks_the_same(device):
    arguments = {name: tensor for name, tensor in tensors("linear", device).items() if name != "residual"}
    arguments["x"] = arguments["x"].to_sparse()
    with pytest.raises(UnsupportedInputError, match="^linear: x has layout torch.sparse_coo; supported: torch.strided"):
        call("linear", arguments)


@pytest.mark.parametrize(
    ("operation", "option"),
    [("layer_norm", "eps"), *((name, option) for name, options in OPTIONS.items() for option in options)],
)
def test_a_tensor_in_place_of_a_number_is_named_by_its_type(operation: str, option: str, device: str) -> None:
    """Its values would fill the message, and reading them from a GPU would wait for it."""
    options = {**OPTIONS.get(operation, {}), option: torch.ones(300, device=device)}
    with pytest.raises(UnsupportedInputError, match=rf"^{operation}: {option} is Tensor\b.{{1,80}}$"):
        getattr(siglip_kernels, operation)(**tensors(operation, device), **options)
