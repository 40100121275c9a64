"""The operations in fp8: against their definition, against fp64 beside torchao's formula, outliers, and refusals."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import machines
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compiled.launch import GPUS
from siglip_kernels import MissingBackendError, UnsupportedInputError, fp8, reference
from siglip_kernels.device import pretend
from siglip_kernels.fp8 import reference as fp8_reference
from siglip_kernels.fp8.quantise import quantise_rows
from siglip_kernels.gemm import config
from siglip_kernels.gemm.kernels import Scales, gemm
from siglip_kernels.gemm.tiles import Shape

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "seed"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


def decibels(result: Tensor, exact: Tensor) -> float:
    """Signal to quantisation noise."""
    noise = (result.double() - exact).pow(2).sum()
    return float(10 * torch.log10(exact.pow(2).sum() / noise))


def parameters(width: int, hidden: int, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Of pre_norm_mlp."""
    made = {
        "norm_weight": torch.rand(width) + 0.5,
        "norm_bias": torch.randn(width) / 4,
        "fc1_weight": torch.randn(hidden, width) / math.sqrt(width),
        "fc1_bias": torch.randn(hidden) / 4,
        "fc2_weight": torch.randn(width, hidden) / math.sqrt(hidden),
        "fc2_bias": torch.randn(width) / 4,
    }
    return {name: value.to(device, dtype) for name, value in made.items()}


def attention_parameters(width: int, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Of pre_norm_attention."""
    made: dict[str, Any] = {"norm_weight": torch.rand(width) + 0.5, "norm_bias": torch.randn(width) / 4}
    for name in ("q", "k", "v", "out"):
        made[f"{name}_weight"] = torch.randn(width, width) / math.sqrt(width)
        made[f"{name}_bias"] = torch.randn(width) / 4
    return {name: value.to(device, dtype) for name, value in made.items()} | {"eps": 1e-6, "num_heads": width // 8}


def exact(operation: Callable, **inputs: Any) -> Tensor:
    widened = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    result: Tensor = operation(**widened)
    return result


def rowwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product as torchao's float8 dynamic activations and weights, per row, compute it."""
    return fp8_reference.linear(x, fp8_reference.quantise_projection(weight, bias)).to(x.dtype)


# Quantisation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (37, 64), (5, 768), (9, 1152), (2, 4304)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_are_quantised_as_defined(shape, dtype, device):
    x = torch.randn(shape).to(device, dtype)
    x[0] = 0
    found = quantise_rows(x)
    values, scales = fp8_reference.quantise(x)
    torch.testing.assert_close(found.values.float(), values.float(), rtol=0, atol=0)
    torch.testing.assert_close(found.scales, scales, rtol=0, atol=0)
    assert (found.values[0].float() == 0).all() and found.scales[0] > 0 and found.next_scales is None


@pytest.mark.parametrize("width", [17, 64, 1152])
def test_rows_are_normalised_and_bounded_in_the_same_pass(width, device):
    p = parameters(width, 40, device)
    x = (torch.randn(37, width) * 3 + 20).to(device, torch.bfloat16)
    fc1 = fp8_reference.quantise_projection(p["fc1_weight"], p["fc1_bias"])
    found = quantise_rows(x, (p["norm_weight"], p["norm_bias"], 1e-6), fc1.gains)
    normed = reference.layer_norm(x.float(), p["norm_weight"].float(), p["norm_bias"].float(), 1e-6)
    torch.testing.assert_close(found.scales, normed.abs().amax(-1) / 448, rtol=1e-4, atol=0)
    error = (fp8_reference.dequantise(found.values, found.scales) - normed).abs()
    assert (error <= normed.abs() / 16 * 1.01 + found.scales[:, None] * 2**-9).all()
    hidden = F.gelu(fp8_reference.product(found.values, found.scales, fc1), approximate="tanh")
    assert found.next_scales is not None
    assert (hidden.abs().amax(-1) <= 448 * found.next_scales).all()
    assert (448 * found.next_scales <= 60 * hidden.abs().amax(-1)).all()  # a bound, but not an absurd one


@pytest.mark.parametrize("width", [17, 200])
def test_a_huge_constant_row_is_normalised_to_the_bias(width, device):
    """Columns past its end are as far from its mean as it is large."""
    p = parameters(width, 40, device)
    x = torch.full((2, width), 1e36, device=device, dtype=torch.bfloat16)
    gains = torch.ones(2, device=device)
    found = quantise_rows(x, (p["norm_weight"], p["norm_bias"], 1e-6), gains)
    bias = p["norm_bias"].float()
    assert found.next_scales is not None
    torch.testing.assert_close(found.scales, (bias.abs().max() / 448).expand(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.next_scales, ((bias.norm() + 1) / 448).expand(2), rtol=1e-4, atol=0)


def test_no_rows(device):
    assert quantise_rows(torch.empty(0, 64, device=device)).scales.shape == (0,)


# Products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 16, 16), (3, 17, 9), (127, 48, 40), (129, 272, 257), (5, 4304, 48), (33, 768, 96)],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_are_as_defined(rows, depth, columns, with_bias, device):
    x = torch.randn(rows, depth).to(device)
    weight, bias = (torch.randn(columns, depth) / math.sqrt(depth)).to(device), torch.randn(columns).to(device)
    residual = torch.randn(rows, columns).to(device, torch.bfloat16)
    projection = fp8_reference.quantise_projection(weight, bias if with_bias else None)
    values, scales = fp8_reference.quantise(x)
    found = gemm(
        values,
        [projection.values],
        [projection.bias],
        residual=residual,
        scales=Scales(scales, projection.scales),
        out_dtype=torch.float32,
    )[0]
    wanted = fp8_reference.product(values, scales, projection) + residual
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gpu", ["rtx4090", "h200", "b200", "rtx5090"])
def test_products_with_tiles_of_gpus(gpu, device):
    """All epilogues, with tiles at every edge, and a depth that several programs share."""
    x, weight = torch.randn(70, 160, device=device), torch.randn(176, 160, device=device) / math.sqrt(160)
    projection, (values, scales) = fp8_reference.quantise_projection(weight, weight[:, 0]), fp8_reference.quantise(x)
    hidden = F.gelu(fp8_reference.product(values, scales, projection), approximate="tanh")
    out_scales = hidden.abs().amax(-1) * 30 / 448
    residual = torch.randn(70, 176, device=device)
    for splits in (1, 2):
        with pretend(GPUS[gpu]):
            shape = Shape(70, 176, 160, 1, 1, 0, "forward", tf32=False, aligned=True)
            tile = dataclasses.replace(config.usual_tiles(shape, GPUS[gpu])[-1], depth=32, splits=splits)
            to_fp8 = gemm(
                values,
                [projection.values],
                [projection.bias],
                gelu="forward",
                scales=Scales(scales, projection.scales, out_scales),
                out_dtype=torch.float8_e4m3fn,
                tile=tile,
            )[0]
            added = gemm(
                values,
                [projection.values],
                [projection.bias],
                residual=residual,
                scales=Scales(scales, projection.scales),
                out_dtype=torch.float32,
                tile=tile,
            )[0]
        error = (fp8_reference.dequantise(to_fp8, out_scales) - hidden).abs()
        assert (error <= hidden.abs() / 16 + 0.001).all()  # also where GELU is nearly 0
        wanted = fp8_reference.product(values, scales, projection) + residual
        torch.testing.assert_close(added, wanted, rtol=1e-5, atol=1e-4)


def _summed_with(bits: int, a: Tensor, weight: Tensor) -> Tensor:
    """a weightᵀ as Hopper adds it: 32 products and the sum so far, cut to so many bits below the largest of them."""
    total = torch.zeros(len(a), len(weight), dtype=torch.float64)
    for k in range(0, a.shape[1], 32):
        products = a[:, None, k : k + 32].double() * weight[None, :, k : k + 32].double()
        terms = torch.cat([products, total[..., None]], -1)
        unit = torch.exp2(torch.floor(torch.log2(terms.abs().amax(-1, keepdim=True).clamp(min=1e-30))) - bits)
        total = (torch.trunc(terms / unit) * unit).sum(-1)
    return total


@pytest.mark.parametrize("depth", [1152, 4304])
def test_sums_of_fourteen_bits_lose_nothing(depth):
    x, weight = torch.randn(8, depth).abs(), torch.randn(16, depth)
    (a, a_scales), (w, w_scales) = fp8_reference.quantise(x), fp8_reference.quantise(weight)
    wanted, scales = x.double() @ weight.double().T, a_scales[:, None] * w_scales
    whole = a.double() @ w.double().T
    found = _summed_with(13, a.float(), w.float())
    assert not torch.equal(found, whole)
    assert decibels(found * scales, wanted) > decibels(whole * scales, wanted) - 0.02


# Operations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "hidden"), [(48, 80), (160, 592), pytest.param(1152, 4304, marks=pytest.mark.thorough)], ids=str
)
def test_mlp_beside_torchao(width, hidden, device):
    p = parameters(width, hidden, device)
    x = torch.randn(33, width).to(device, torch.bfloat16)
    wanted = exact(reference.pre_norm_mlp, x=x, eps=1e-6, **p) - x.double()
    found = fp8.pre_norm_mlp(x, eps=1e-6, **p)
    assert found.dtype == torch.bfloat16
    normed = reference.layer_norm(x, p["norm_weight"], p["norm_bias"], 1e-6)
    hidden_rows = F.gelu(rowwise(normed, p["fc1_weight"], p["fc1_bias"]), approximate="tanh")
    torchao = rowwise(hidden_rows, p["fc2_weight"], p["fc2_bias"])
    without_norm = fp8.mlp(normed, *(p[name] for name in p if name.startswith("fc")))
    assert decibels(without_norm, wanted) > max(25, decibels(torchao, wanted) - 0.5)
    assert decibels(found, wanted + x.double()) > 30


@pytest.mark.parametrize("width", [48, 160])
def test_attention_beside_torchao(width, device):
    p = attention_parameters(width, device)
    x = torch.randn(2, 19, width).to(device, torch.bfloat16)
    found = fp8.pre_norm_attention(x, **p)
    wanted = exact(_attention, x=x, **p)
    torchao = _attention(x, product=rowwise, **p)
    assert decibels(found, x.double() + wanted) > max(27, decibels(torchao + x, x.double() + wanted) - 0.5)


def _attention(x: Tensor, product: Callable = F.linear, **p: Any) -> Tensor:
    """Without the residual."""
    normed = reference.layer_norm(x, p["norm_weight"], p["norm_bias"], p["eps"]).flatten(0, 1)
    q, k, v = (
        product(normed, p[f"{name}_weight"], p[f"{name}_bias"]).unflatten(-1, (p["num_heads"], -1)) for name in "qkv"
    )
    attended = reference.attention(*(part.unflatten(0, x.shape[:2]) for part in (q, k, v)))
    return product(attended.flatten(-2).flatten(0, 1), p["out_weight"], p["out_bias"]).view(x.shape)


def test_qkv_are_those_of_attention(device):
    p = attention_parameters(48, device)
    del p["out_weight"], p["out_bias"]
    x = torch.randn(2, 19, 48).to(device, torch.bfloat16)
    for found, wanted in zip(fp8.pre_norm_qkv(x, **p), exact_qkv(x, p), strict=True):
        assert found.shape == (2, 19, 6, 8) and decibels(found, wanted) > 27


def test_packed_weights_of_qkv(device):
    p = attention_parameters(48, device)
    x = torch.randn(2, 19, 48).to(device, torch.bfloat16)
    packed = {
        **p,
        **{f"{name}_{kind}": None for name in "kv" for kind in ("weight", "bias")},
        **{f"q_{kind}": torch.cat([p[f"{name}_{kind}"] for name in "qkv"]) for kind in ("weight", "bias")},
    }
    assert torch.equal(fp8.pre_norm_attention(x, **packed), fp8.pre_norm_attention(x, **p))
    for each in (p, packed):
        del each["out_weight"], each["out_bias"]
    for found, wanted in zip(fp8.pre_norm_qkv(x, **packed), fp8.pre_norm_qkv(x, **p), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(UnsupportedInputError, match="fp8.pre_norm_qkv: q_weight has 143 rows; supported: those of q"):
        fp8.pre_norm_qkv(x, **{**packed, "q_weight": packed["q_weight"][:-1], "q_bias": None})
    with pytest.raises(UnsupportedInputError, match="fp8.pre_norm_qkv: k_weight is NoneType; supported: a tensor"):
        fp8.pre_norm_qkv(x, **{**p, "k_weight": None, "k_bias": None})


def exact_qkv(x: Tensor, p: dict[str, Any]) -> tuple[Tensor, ...]:
    widened = {name: value.double() if isinstance(value, Tensor) else value for name, value in p.items()}
    return reference.pre_norm_qkv(x.double(), **widened)


def test_packed_sequences_and_lengths(device):
    p = attention_parameters(48, device)
    x = torch.randn(2, 19, 48).to(device, torch.bfloat16)
    lengths = torch.tensor([19, 7], dtype=torch.int32, device=device)
    padded = fp8.pre_norm_attention(x, lengths=lengths, **p)
    starts = torch.tensor([0, 19, 26], dtype=torch.int32, device=device)
    packed = fp8.pre_norm_attention(torch.cat([x[0], x[1, :7]]), cu_seqlens=starts, max_seqlen=19, **p)
    # Attention rounds differently, by tiles of another size, and then a number may round to another one of fp8.
    assert decibels(packed, torch.cat([padded[0], padded[1, :7]]).double()) > 40


def test_an_outlier_channel(device):
    """A thousand times larger than the others: what a fixed point of eight bits would lose."""
    p = parameters(160, 320, device)
    x = torch.randn(33, 160)
    x[:, 7] *= 1000
    x = x.to(device, torch.bfloat16)
    fcs = [p[name] for name in p if name.startswith("fc")]
    wanted = exact(reference.mlp, x=x, **{name: p[name] for name in p if name.startswith("fc")})
    assert decibels(fp8.mlp(x, *fcs), wanted) > 26
    # After normalisation, x itself is not added: the outlier would hide all others.
    wanted = exact(reference.pre_norm_mlp, x=x, eps=1e-6, **p)
    small = [column for column in range(160) if column != 7]
    assert decibels(fp8.pre_norm_mlp(x, eps=1e-6, **p)[:, small], wanted[:, small]) > 27


def test_rows_of_any_size_are_independent(device):
    """Rows of zeros, tiny, huge and infinite numbers each have a scale of their own."""
    p = parameters(64, 96, device)
    fcs = [p[name] for name in p if name.startswith("fc")]
    x = torch.randn(6, 64)
    x[1], x[2], x[3] = 0, x[2] * 1e-20, x[3] * 1e20
    alone = fp8.mlp(x[5:].to(device, torch.bfloat16), *fcs)
    x[4, 3] = torch.inf
    x = x.to(device, torch.bfloat16)
    found, wanted = fp8.mlp(x, *fcs), exact(reference.mlp, x=x, **{name: p[name] for name in p if "fc" in name})
    for row in (0, 1, 2, 3):
        assert decibels(found[row], wanted[row]) > 24, row
    assert not found[4].isfinite().any()
    torch.testing.assert_close(found[5:], alone, rtol=0, atol=0)


def test_same_bits_every_time(device):
    p, x = parameters(64, 96, device), torch.randn(70, 64).to(device, torch.bfloat16)
    first, second = (fp8.pre_norm_mlp(x, eps=1e-6, **p) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_autocast_quantises_the_weights_as_they_are(device):
    p, x = parameters(64, 96, device, torch.float32), torch.randn(5, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        found = fp8.pre_norm_mlp(x, eps=1e-6, **p)
        normed = fp8.mlp(x, *(p[name] for name in p if name.startswith("fc")))
    assert found.dtype == torch.float32 and normed.dtype == torch.bfloat16
    assert decibels(found, exact(reference.pre_norm_mlp, x=x, eps=1e-6, **p)) > 29


# Contract -------------------------------------------------------------------------------------------------------------


def test_operators_pass_opcheck(device):
    p, x = parameters(16, 24, device), torch.randn(3, 16).to(device, torch.bfloat16)
    fcs = [p[name] for name in p if name.startswith("fc")]
    tests = ("test_schema", "test_faketensor")
    operators = torch.ops.siglip_kernels
    torch.library.opcheck(operators.fp8_mlp.default, (x, None, None, 0.0, *fcs, None, torch.bfloat16), test_utils=tests)
    q = attention_parameters(16, device)
    eps, heads = q.pop("eps"), q.pop("num_heads")
    norm, projections = list(q.values())[:2], list(q.values())[2:]
    x = x[None]
    qkv = (x, *norm, eps, *projections[:6], heads, torch.bfloat16)
    torch.library.opcheck(operators.fp8_pre_norm_qkv.default, qkv, test_utils=tests)
    attention = (x, *norm, eps, *projections, heads, None, None, None, None, torch.bfloat16)
    torch.library.opcheck(operators.fp8_pre_norm_attention.default, attention, test_utils=tests)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("operation", ["mlp", "pre_norm_qkv", "pre_norm_attention"])
def test_gradients_raise(operation, compiled, device):
    """In the backward pass, and there alone."""
    x = torch.randn(1, 3, 16).to(device, torch.bfloat16).requires_grad_()
    if operation == "mlp":
        named = {name: value for name, value in parameters(16, 24, device).items() if name.startswith("fc")}
    else:
        named = attention_parameters(16, device)
        named = {name: value for name, value in named.items() if operation != "pre_norm_qkv" or "out" not in name}
    function = functools.partial(getattr(fp8, operation), **named)
    with torch.no_grad():
        expected = function(x)
    found = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found = found[0] if operation == "pre_norm_qkv" else found
    with pytest.raises(UnsupportedInputError, match=rf"^fp8.{operation}: x needs gradients; supported: inference"):
        found.sum().backward()


def test_unsupported_dtypes_and_widths_raise(device):
    with pytest.raises(UnsupportedInputError, match=r"fp8.pre_norm_mlp: x has dtype torch.float32; supported: float16"):
        fp8.pre_norm_mlp(torch.randn(3, 16, device=device), eps=1e-6, **parameters(16, 24, device, torch.float32))
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UnsupportedInputError, match=r"x is cast to torch.float32 by autocast; supported: float16"),
    ):
        patch.setattr("siglip_kernels.fp8.api.autocast_dtype", lambda x: torch.float32)  # CPUs have no such autocast
        fp8.pre_norm_mlp(torch.randn(3, 16).to(device, torch.bfloat16), eps=1e-6, **parameters(16, 24, device))
    wide = parameters(8200, 8, device)
    with pytest.raises(
        UnsupportedInputError, match=r"fp8.pre_norm_mlp: x makes rows 8200 wide; supported: widths up to 8192"
    ):
        fp8.pre_norm_mlp(torch.randn(1, 8200).to(device, torch.bfloat16), eps=1e-6, **wide)


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (machines.A100, "has compute capability 8.0; products of fp8 need 8.9 or later"),
        (machines.RTX_2080, "has compute capability 7.5; the kernels need 8.0 or later"),
    ],
)
def test_older_gpus_are_refused(gpu, reason, monkeypatch):
    machines.report(monkeypatch, gpu, machines.H100)
    assert reason in str(fp8.why_not(torch.device("cuda", 0)))
    assert fp8.why_not(torch.device("cuda", 1)) is None and fp8.why_not_here() is None
    machines.report(monkeypatch, gpu)
    assert reason in str(fp8.why_not_here())


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr("siglip_kernels.device.interpreting", lambda: False)
    p = parameters(16, 24, "cpu")
    with pytest.raises(
        MissingBackendError, match=r"fp8.mlp: x is on cpu, and .* use a model's backend 'triton', 'sdpa'"
    ):
        fp8.pre_norm_mlp(torch.randn(3, 16).bfloat16(), eps=1e-6, **p)
