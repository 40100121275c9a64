"""Patch embedding: error budget, image sizes, layouts, positions, registration, and what bad input gets."""

import functools
import itertools

import pytest
import torch
from error_budget import check_budget, run
from torch import Tensor

from siglip_kernels import UnsupportedInputError, patch_embed, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty", "seed")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPERATORS = torch.ops.siglip_kernels


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def random_inputs(
    batch: int,
    size: tuple[int, int],
    patch: int | tuple[int, int],
    width: int,
    dtype: torch.dtype,
    device: str,
    channels: int = 3,
    position: tuple[int, ...] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The arguments and the gradient of the output. position: its shape, (S, width) unless given."""
    p, q = (patch, patch) if isinstance(patch, int) else patch
    tokens = (size[0] // p) * (size[1] // q)
    shapes = {
        "pixel_values": (batch, channels, *size),
        "weight": (width, channels, p, q),
        "bias": (width,),
        "position": (tokens, width) if position is None else position,
    }
    inputs = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    inputs["weight"] /= (channels * p * q) ** 0.5
    out_grad = torch.randn(batch, tokens, width, device=device).to(dtype)
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}, out_grad


def check(inputs: dict[str, Tensor], out_grad: Tensor) -> dict[str, Tensor]:
    return check_budget(patch_embed, reference.patch_embed, inputs, out_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patch", [14, 16, 1, (3, 5), 32], ids=str)
def test_patch_sizes(patch, dtype, device):
    size = (7, 9) if patch == 1 else (35, 47)
    check(*random_inputs(2, size, patch, 70, dtype, device))


@pytest.mark.parametrize("size", [(14, 14), (28, 15), (27, 29), (41, 98), (126, 126)], ids=str)
def test_image_sizes_whole_patches_or_not(size, device):
    inputs, out_grad = random_inputs(2, size, 14, 24, torch.bfloat16, device)
    found = check(inputs, out_grad)
    height, width = (extent // 14 * 14 for extent in size)
    assert not found["pixel_values"][:, :, height:].any() and not found["pixel_values"][:, :, :, width:].any()


def test_pixels_beyond_the_last_patch_are_never_read(device):
    inputs, _ = random_inputs(2, (30, 31), 14, 24, torch.float16, device)
    clean = patch_embed(**inputs)
    inputs["pixel_values"][:, :, 28:] = float("nan")
    inputs["pixel_values"][:, :, :, 28:] = float("nan")
    assert torch.equal(patch_embed(**inputs), clean)


@pytest.mark.parametrize("width", [1, 63, 64, 65, 129])
@pytest.mark.parametrize("channels", [1, 4])
def test_widths_and_channels(width, channels, device):
    check(*random_inputs(3, (32, 32), 4, width, torch.float16, device, channels))


def test_widths_of_models(device):
    check(*random_inputs(1, (56, 42), 14, 1152, torch.bfloat16, device))
    check(*random_inputs(1, (48, 32), 16, 768, torch.float16, device))


@pytest.mark.parametrize("shape", [(1, 6, 24), (24,), (1, 24), (6, 1), (1, 1, 1), (), (2, 6, 24), (2, 1, 24)], ids=str)
def test_positions_that_broadcast(shape, device):
    for dtype in (torch.float32, torch.bfloat16):
        check(*random_inputs(2, (8, 13), 4, 24, dtype, device, position=shape))


def test_one_token_for_several_positions(device):
    inputs, _ = random_inputs(2, (5, 5), 4, 24, torch.float32, device, position=(9, 24))
    out_grad = torch.randn(2, 9, 24, device=device)
    check(inputs, out_grad)


def test_interpolated_positions_get_gradients(device):
    """As the model makes them: a transposed view of an interpolation."""
    inputs, out_grad = random_inputs(2, (12, 20), 4, 24, torch.float32, device)
    square = torch.randn(1, 24, 4, 4, device=device)

    def embed(function, square, **others):
        position = torch.nn.functional.interpolate(square, (3, 5), mode="bicubic").flatten(2).squeeze(0).T
        return function(**others, position=position)

    inputs["position"] = square
    renamed = {"square" if name == "position" else name: tensor for name, tensor in inputs.items()}
    kernel, definition = (functools.partial(embed, function) for function in (patch_embed, reference.patch_embed))
    check_budget(kernel, definition, renamed, out_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_position_of_another_dtype(dtype, device):
    inputs, _ = random_inputs(2, (8, 8), 4, 24, dtype, device)
    inputs["position"] = 100 * torch.randn(4, 24, device=device)
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out, expected = patch_embed(**tensors), reference.patch_embed(**tensors)
    assert out.dtype == expected.dtype == torch.float32
    exact = reference.patch_embed(**{name: tensor.double() for name, tensor in inputs.items()})
    assert (out - exact).norm() <= 1e-6 * exact.norm()  # the tokens are not rounded before position is added
    for found, true in zip(
        torch.autograd.grad(out.sum(), tensors.values()),
        torch.autograd.grad(expected.sum(), tensors.values()),
        strict=True,
    ):
        assert found.dtype == true.dtype
        torch.testing.assert_close(found, true, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("kind", ["channels last", "crop", "flipped", "every other image", "expanded", "odd start"])
def test_views_equal_their_contiguous_copies(kind, device):
    inputs, out_grad = random_inputs(2, (28, 28), 14, 24, torch.float16, device)
    pixels = inputs["pixel_values"]
    if kind == "channels last":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    elif kind == "crop":
        pixels = torch.nn.functional.pad(pixels, (5, 4, 3, 2))[:, :, 3:-2, 5:-4]
    elif kind == "flipped":
        pixels = pixels.transpose(2, 3)
    elif kind == "every other image":
        pixels = pixels.repeat_interleave(2, 0)[::2]
    elif kind == "expanded":
        pixels = pixels[:1, :1].expand(2, 3, 28, 28)
    else:
        pixels = torch.cat([pixels.new_zeros(1), pixels.flatten()])[1:].view(pixels.shape)
    views = run(patch_embed, {**inputs, "pixel_values": pixels}, out_grad, torch.float16)
    weight = inputs["weight"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    copies = {**inputs, "pixel_values": pixels.contiguous(), "weight": weight}
    for name, found in run(patch_embed, copies, out_grad, torch.float16).items():
        assert torch.equal(views[name], found), name


def test_crops_are_not_copied(device, monkeypatch):
    inputs, _ = random_inputs(2, (30, 30), 14, 24, torch.float16, device)
    inputs["pixel_values"] = inputs["pixel_values"][:, :, 1:29, 2:30]
    monkeypatch.setattr(Tensor, "clone", lambda *_, **__: pytest.fail("a copy was made"))
    patch_embed(**inputs)


def test_integers_whose_answer_is_exact(device):
    """Weights that pick one pixel each."""
    pixels = torch.randint(-8, 8, (2, 1, 8, 8), device=device).bfloat16()
    weight = torch.eye(16, device=device).bfloat16().view(16, 1, 4, 4)
    position = torch.arange(4.0, device=device).bfloat16()[:, None]
    found = patch_embed(pixels, weight, torch.ones(16, device=device).bfloat16(), position)
    picked = pixels.view(2, 2, 4, 2, 4).transpose(2, 3).reshape(2, 4, 16)
    assert torch.equal(found, picked + 1 + position)


def test_one_huge_outlier(device):
    for dtype in DTYPES:
        inputs, out_grad = random_inputs(2, (28, 28), 14, 24, dtype, device)
        inputs["pixel_values"][1, 2, 17, 5] = 3e4
        check(inputs, out_grad)


def test_bitwise_repeatable(device):
    inputs, out_grad = random_inputs(3, (28, 42), 14, 70, torch.bfloat16, device)
    first = run(patch_embed, inputs, out_grad, torch.bfloat16)
    second = run(patch_embed, inputs, out_grad, torch.bfloat16)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=4))[1:], ids=str)
def test_only_the_gradients_asked_for(needed, device):
    inputs, out_grad = random_inputs(2, (8, 8), 4, 24, torch.float16, device)
    everything = run(patch_embed, inputs, out_grad, torch.float16)
    tensors = {n: t.detach().requires_grad_(need) for (n, t), need in zip(inputs.items(), needed, strict=True)}
    patch_embed(**tensors).backward(out_grad)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.grad, everything[name]) if tensor.requires_grad else tensor.grad is None


def test_without_bias(device):
    inputs, out_grad = random_inputs(2, (8, 8), 4, 24, torch.float16, device)
    del inputs["bias"]
    kernel, definition = (functools.partial(f, bias=None) for f in (patch_embed, reference.patch_embed))
    check_budget(kernel, definition, inputs, out_grad)


def test_empty_batch(device):
    inputs, out_grad = random_inputs(0, (8, 8), 4, 24, torch.float16, device)
    found = run(patch_embed, inputs, out_grad, torch.float16)
    assert found["out"].shape == (0, 4, 24)
    assert all(found[name].shape == inputs[name].shape and not found[name].any() for name in inputs)


def test_second_derivatives(device):
    """The derivatives are PyTorch's own, so they have derivatives."""
    inputs, _ = random_inputs(2, (8, 8), 4, 6, torch.float32, device)
    results = []
    for function in (patch_embed, reference.patch_embed):
        tensors = [tensor.detach().requires_grad_() for tensor in inputs.values()]
        (gradient,) = torch.autograd.grad((function(*tensors) ** 2).sum(), tensors[1], create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), tensors[:2]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_as_conv2d(dtype, device):
    inputs, _ = random_inputs(2, (8, 8), 4, 24, torch.float32, device)
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with torch.autocast(device, dtype):
        out, expected = patch_embed(**tensors), reference.patch_embed(**tensors)
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.02)
    for gradient in torch.autograd.grad(out.sum(), tensors.values()):
        assert gradient.dtype == torch.float32


def test_backward_inside_autocast(device):
    inputs, _ = random_inputs(2, (8, 8), 4, 24, torch.float32, device)
    tensors = [tensor.requires_grad_() for tensor in inputs.values()]
    results = []
    for enabled in (False, True):
        total = patch_embed(*tensors).sum()
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(total, tensors))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_32_bits(device):
    """The second image begins after 2^31 elements, and so does its last row."""
    step = 2**31 + 8
    if device == "cpu":
        try:
            storage = torch.from_file(_sparse_file(2 * (step + 512)), size=step + 512, dtype=torch.float16)
        except (OSError, RuntimeError) as error:
            pytest.skip(f"no sparse file of 4 GB: {error}")
    else:
        storage = torch.empty(step + 512, dtype=torch.float16, device=device)
    inputs, _ = random_inputs(2, (8, 8), 4, 24, torch.float16, device)
    expected = patch_embed(**inputs)
    far = storage.as_strided((2, 3, 8, 8), (step, 64, 8, 1)).copy_(inputs["pixel_values"])
    assert torch.equal(patch_embed(**{**inputs, "pixel_values": far}), expected)
    far = storage.as_strided((1, 3, 8, 8), (step, 8, step // 56 * 8, 1)).copy_(inputs["pixel_values"][:1])
    assert torch.equal(patch_embed(**{**inputs, "pixel_values": far}), expected[:1])


def _sparse_file(size: int) -> str:
    import tempfile

    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.truncate(size)
    return file.name


def test_operator_checks(device):
    inputs, _ = random_inputs(2, (9, 8), 4, 24, torch.float16, device)
    tensors = [tensor.requires_grad_() for tensor in inputs.values()]
    torch.library.opcheck(OPERATORS.patch_embed.default, (*tensors, torch.float16))
    torch.library.opcheck(OPERATORS.patch_embed.default, (*tensors[:2], None, None, torch.float16))


def test_compiles_as_one_graph_forward_and_backward(device):
    def block(**tensors):
        return patch_embed(**tensors).sin()

    inputs, _ = random_inputs(2, (9, 8), 4, 24, torch.float16, device)
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(**tensors).sum(), tensors.values())
    expected = torch.autograd.grad(block(**tensors).sum(), tensors.values())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiles_for_any_batch_and_size(device):
    compiled = torch.compile(patch_embed, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, side in ((2, 8), (3, 13), (4, 20)):
        inputs, _ = random_inputs(batch, (side, side), 4, 24, torch.float16, device)
        assert torch.equal(compiled(**inputs), patch_embed(**inputs))


def test_shapes_without_data():
    inputs, _ = random_inputs(2, (384, 384), 14, 1152, torch.bfloat16, "meta")
    out = patch_embed(**inputs)
    assert out.is_meta and out.shape == (2, 729, 1152) and out.dtype == torch.bfloat16


GOOD = dict(
    pixel_values=torch.zeros(2, 3, 9, 8),
    weight=torch.zeros(6, 3, 4, 4),
    bias=torch.zeros(6),
    position=torch.zeros(4, 6),
)
BAD = {
    "list": ({"pixel_values": [1.0]}, "pixel_values is list; supported: a tensor"),
    "no position": ({"position": None}, "position is NoneType; supported: a tensor"),
    "one image": (
        {"pixel_values": torch.zeros(3, 9, 8)},
        r"pixel_values has 3 dimensions; supported: 4: \(B, C, H, W\)",
    ),
    "integers": ({"pixel_values": torch.zeros(2, 3, 9, 8, dtype=torch.uint8)}, "pixel_values has dtype torch.uint8"),
    "fp64": ({"position": torch.zeros(4, 6).double()}, "position has dtype torch.float64; supported: float32, float16"),
    "mixed": ({"weight": torch.zeros(6, 3, 4, 4).half()}, "weight has dtype torch.float16 while pixel_values has"),
    "channels": ({"weight": torch.zeros(6, 1, 4, 4)}, r"weight has shape \(6, 1, 4, 4\); supported: \(any, 3, any"),
    "rank of weight": ({"weight": torch.zeros(6, 48)}, r"weight has shape \(6, 48\); supported: \(any, 3, any, any\)"),
    "no pixel": ({"weight": torch.zeros(6, 3, 0, 4)}, r"weight has shape \(6, 3, 0, 4\)"),
    "too small": ({"pixel_values": torch.zeros(2, 3, 3, 8)}, "while a patch has 4 × 4 pixels; supported: at least one"),
    "bias": ({"bias": torch.zeros(5)}, r"bias has shape \(5,\); supported: \(6,\)"),
    "positions": ({"position": torch.zeros(5, 6)}, r"position has shape \(5, 6\) while the tokens have \(2, 4, 6\)"),
    "wide position": ({"position": torch.zeros(4, 7)}, r"position has shape \(4, 7\)"),
    "position of rank 4": ({"position": torch.zeros(1, 1, 4, 6)}, r"position has shape \(1, 1, 4, 6\)"),
    "device": (
        {"bias": torch.zeros(6, device="meta")},
        "bias is on meta while pixel_values is on cpu; supported: one",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, message):
    with pytest.raises(UnsupportedInputError, match="^patch_embed: .*" + message):
        patch_embed(**{**GOOD, **change})


@pytest.mark.parametrize("name", ["one image", "integers", "channels", "too small", "positions"])
def test_bad_input_is_named_by_compiled_code(name):
    change, message = BAD[name]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="patch_embed: .*" + message):
        torch.compile(patch_embed, backend="eager", fullgraph=True)(**{**GOOD, **change})
