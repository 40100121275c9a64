"""Attention against fp64: error budget, shapes, strides, lengths, adversarial inputs, repeatability."""

import tempfile
from collections.abc import Callable, Iterable

import pytest
import torch
from error_budget import check_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.compiled.launch import GPUS
from siglip_kernels import UnsupportedInputError, attention, reference
from siglip_kernels.attention.config import advances_offsets, grid, split_head_dim

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)


def random_inputs(
    batch: int, query_tokens: int, key_tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    shapes = [(batch, tokens, heads, head_dim) for tokens in (query_tokens, key_tokens, key_tokens, query_tokens)]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def run(
    function: Callable[..., Tensor], inputs: Iterable[Tensor], dtype: torch.dtype, **options: object
) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    q, k, v, out_grad = (tensor.to(dtype) for tensor in inputs)
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    out = function(q, k, v, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), out_grad)]


def of_eager(inputs: list[Tensor], orders: int, **options: object) -> list[list[Tensor]]:
    """Output and gradients of same-dtype eager, once for each order of the head dim's columns.

    The order changes only the rounding. Where a few rows carry all of the error, a single order may be exact by luck.
    """
    dtype, head_dim = inputs[0].dtype, inputs[0].shape[-1]
    found = []
    for shuffled in range(orders):
        order = torch.randperm(head_dim) if shuffled else torch.arange(head_dim)
        order = order.to(inputs[0].device)
        results = run(reference.attention, [tensor[..., order] for tensor in inputs], dtype, **options)
        found.append([result[..., order.argsort()] for result in results])
    return found


def check_budget(inputs: list[Tensor], orders: int = 1, **options: object) -> list[Tensor]:
    """Asserts the error budget of the output and each gradient, and returns the kernel's."""
    dtype = inputs[0].dtype
    found = run(attention, inputs, dtype, **options)
    truth = run(reference.attention, inputs, torch.float64, **options)
    eager = zip(*of_eager(inputs, orders, **options), strict=True)
    for name, one, exact, others in zip(("out", "dq", "dk", "dv"), found, truth, eager, strict=True):
        assert one.dtype == dtype
        roundings, slack = 1, 0.0
        if not all(other.isfinite().all() for other in others):  # eager's logits overflow fp16, and the kernel's do not
            assert dtype == torch.float16
            roundings, others = 16, exact  # nothing for eager's error
        if exact.norm() == 0:  # one key: terms that cancel exactly in eager's order, and to fp32 rounding in any other
            slack = torch.finfo(torch.float32).eps * (inputs[2].double().norm() * inputs[3].double().norm())
            others = exact
        check_error(one, others, exact, name, roundings=roundings, slack=slack)
    return found


_TOKENS, _HEAD_DIMS = (1, 17, 63, 64, 65, 196), (64, 72, 80, 88)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype"),
    [
        (tokens, head_dim, DTYPES[(i + j) % 3])  # every length and every head dim is run in every dtype
        for i, tokens in enumerate(_TOKENS)
        for j, head_dim in enumerate(_HEAD_DIMS)
    ],
    ids=str,
)
def test_lengths_and_head_dims_of_models(tokens, head_dim, dtype, device):
    check_budget(random_inputs(1, tokens, tokens, 2 if tokens <= 65 else 1, head_dim, dtype, device))


@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype"),
    [(256, 72, torch.bfloat16), (577, 64, torch.float16), (729, 72, torch.bfloat16), (1025, 64, torch.bfloat16)],
    ids=str,
)
def test_long_sequences(tokens, head_dim, dtype, device):
    check_budget(random_inputs(1, tokens, tokens, 1, head_dim, dtype, device))


@pytest.mark.parametrize("head_dim", range(8, 129, 8))
def test_every_head_dim(head_dim, device):
    if head_dim % 16 == 0:
        check_budget(random_inputs(1, 70, 66, 1, head_dim, torch.float16, device))
    else:
        check_budget(random_inputs(1, 66, 70, 1, head_dim, torch.bfloat16, device))
    check_budget(random_inputs(1, 9, 30, 1, head_dim, torch.float16, device))


def test_head_dims_are_split_and_not_rounded_up():
    assert split_head_dim(72) == (64, 16)
    for head_dim in range(8, 129, 8):
        main, tail = split_head_dim(head_dim)
        next_power = max(16, 1 << (head_dim - 1).bit_length())
        assert head_dim <= main + tail <= next_power
        for width in (main, tail):
            assert width == 0 or (width >= 16 and width & (width - 1) == 0)


@pytest.mark.parametrize(("query_tokens", "key_tokens"), [(1, 130), (130, 1), (65, 129), (7, 40), (40, 7)])
def test_numbers_of_queries_and_keys_differ(query_tokens, key_tokens, device):
    check_budget(random_inputs(2, query_tokens, key_tokens, 2, 72, torch.bfloat16, device))
    check_budget(random_inputs(1, query_tokens, key_tokens, 2, 72, torch.float16, device))


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-300, -1e-300, -0.3, 1.0, 2])
@pytest.mark.parametrize("tokens", [20, 70])
def test_any_scale(tokens, scale, device):
    lengths = torch.tensor([tokens - 3], dtype=torch.int32, device=device)
    for dtype, valid in ((torch.float32, lengths), (torch.float16, None), (torch.bfloat16, lengths)):
        check_budget(random_inputs(1, tokens, tokens, 1, 40, dtype, device), scale=scale, lengths=valid)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [20, 64, 130])
def test_lengths(tokens, dtype, device):
    lengths = torch.tensor([0, 1, tokens - 1, tokens, 17], dtype=torch.int32, device=device)
    inputs = random_inputs(5, tokens, tokens, 2, 72, dtype, device)
    out, dq, dk, dv = check_budget(inputs, lengths=lengths)
    for result in (out, dq, dk, dv):
        assert (result[0] == 0).all()
    for gradient in (dk, dv):
        assert (gradient[1, 1:] == 0).all()
        assert (gradient[4, 17:] == 0).all()


@pytest.mark.parametrize("tokens", [20, 130])
def test_padding_is_never_read(tokens, device):
    inputs = random_inputs(2, tokens, tokens, 2, 72, torch.bfloat16, device)
    lengths = torch.tensor([5, 19], dtype=torch.int32, device=device)
    clean = run(attention, inputs, torch.bfloat16, lengths=lengths)
    for sample, length in enumerate((5, 19)):
        for padded in inputs[1:3]:
            padded[sample, length:] = float("nan")
    for before, after in zip(clean, run(attention, inputs, torch.bfloat16, lengths=lengths), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("tokens", [20, 70])
def test_lengths_are_taken_into_range(tokens, device):
    inputs = random_inputs(2, tokens, tokens, 1, 16, torch.float16, device)
    beyond = torch.tensor([-3, tokens + 1000], dtype=torch.int32, device=device)
    within = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    for one, other in zip(
        run(attention, inputs, torch.float16, lengths=beyond),
        run(attention, inputs, torch.float16, lengths=within),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [20, 70])
def test_lengths_may_be_a_view(tokens, device):
    inputs = random_inputs(3, tokens, tokens, 1, 16, torch.float16, device)
    table = torch.tensor([[9, 1], [0, 2], [17, 3]], dtype=torch.int32, device=device)
    for view in (table[:, 0], table[0, :1].expand(3)):
        found = run(attention, inputs, torch.float16, lengths=view)
        expected = run(attention, inputs, torch.float16, lengths=view.clone())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def views(kind: str, tokens: int, device: str, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of head dim 72 as views of another layout."""
    make = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    if kind == "packed":
        return make(2, tokens, 3, 2, 72).unbind(2)
    if kind == "packed by head":
        return make(2, tokens, 2, 3, 72).unbind(3)
    if kind == "heads first":
        return tuple(make(2, 2, tokens, 72).transpose(1, 2) for _ in range(3))
    if kind == "slices that do not align":
        return tuple(make(2, tokens, 2, 75)[..., 1:73] for _ in range(3))
    if kind == "expanded":
        return (
            make(1, 1, 1, 72).expand(2, tokens, 2, 72),
            make(1, tokens, 1, 72).expand(2, -1, 2, -1),
            make(2, tokens, 2, 72),
        )
    if kind == "transposed":
        return tuple(make(2, tokens, 72, 2).transpose(2, 3) for _ in range(3))
    if kind == "last axis expanded":
        return make(2, tokens, 2, 1).expand(-1, -1, -1, 72), make(2, tokens, 2, 72), make(2, tokens, 2, 72)
    if kind == "every other token":
        return tuple(make(2, 2 * tokens, 2, 72)[:, ::2] for _ in range(3))
    raise ValueError(kind)


_KINDS = ("packed", "packed by head", "heads first", "slices that do not align", "expanded", "transposed")
_KINDS += ("last axis expanded", "every other token")


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("tokens", [20, 70])
def test_views_equal_their_contiguous_copies(kind, tokens, device):
    q, k, v = views(kind, tokens, device)
    out_grad = views(kind, tokens, device)[0]
    copies = [tensor.contiguous() for tensor in (q, k, v, out_grad)]
    for one, other in zip(
        run(attention, (q, k, v, out_grad), torch.float16), run(attention, copies, torch.float16), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [20, 70])
def test_packed_views_are_not_copied(tokens, device, monkeypatch):
    q, k, v = (tensor.requires_grad_() for tensor in views("packed", tokens, device))

    def refuse(self, *arguments, **options):
        raise AssertionError("a copy was made")

    for name in ("contiguous", "clone"):
        monkeypatch.setattr(Tensor, name, refuse)
    out = attention(q, k, v)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


@pytest.mark.parametrize("tokens", [20, 70])
def test_expanded_output_gradient(tokens, device):
    q, k, v = (tensor.detach().requires_grad_() for tensor in views("packed", tokens, device))
    summed = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    out = attention(q, k, v)
    for one, other in zip(summed, torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [20, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [80.0, 1e4])
def test_large_logits(magnitude, tokens, dtype, device):
    q, k, v, out_grad = random_inputs(1, tokens, tokens, 2, 64, dtype, device)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float())
    check_budget([q, k, v, out_grad], orders=3, scale=magnitude / logits.abs().max().item())


@pytest.mark.parametrize("tokens", [20, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows(tokens, dtype, device):
    q, k, v, out_grad = random_inputs(1, tokens, tokens, 2, 64, dtype, device)
    same = [tensor[:, :1].expand_as(tensor) for tensor in (q, k)]
    check_budget([*same, v, out_grad], orders=3)


@pytest.mark.parametrize("tokens", [7, 20])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_equal_values_of_short_sequences_leave_no_gradient_of_the_scores(tokens, dtype, device):
    q, k, v, out_grad = random_inputs(1, tokens, tokens, 2, 64, dtype, device)
    for keys in (k, k[:, :1].expand_as(k)):
        _, dq, dk, _ = run(attention, [q, keys, v[:, :1].expand_as(v), out_grad], dtype)
        assert (dq == 0).all() and (dk == 0).all()


@pytest.mark.parametrize("tokens", [20, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_huge_outlier(tokens, dtype, device):
    for which in range(3):
        inputs = random_inputs(1, tokens, tokens, 2, 64, dtype, device)
        inputs[which][0, tokens // 2, 0, 3] = 3e4
        check_budget(inputs, orders=3)


@pytest.mark.parametrize("seed", [4, 31, 39])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_one_key_with_nearly_all_of_the_weight(seed, dtype, device):
    """In the outlier's rows dS is nearly zero and is multiplied by 3e4, which shows an error of delta."""
    torch.manual_seed(seed)
    inputs = random_inputs(1, 70, 70, 2, 64, dtype, device)
    inputs[1][0, 35, 0, 3] = 3e4
    check_budget(inputs, orders=3)


@pytest.mark.parametrize("tokens", [16, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_whose_answer_is_exact(tokens, dtype, device):
    """Orthogonal keys and a large scale select one value; equal keys average a power of two of values."""
    k = torch.eye(tokens, 64, device=device)[None, :, None] if tokens <= 64 else None
    v = torch.randint(-8, 8, (1, tokens, 1, 64), device=device).to(dtype)
    if k is not None:
        picked = attention(k.to(dtype), k.to(dtype), v, scale=1000.0)
        assert torch.equal(picked, v)
    zeros = torch.zeros_like(v)
    average = attention(zeros, zeros, v)
    assert torch.equal(average, v.float().mean(1, keepdim=True).to(dtype).expand_as(v))


@pytest.mark.parametrize("tokens", [20, 130])
def test_not_a_number_is_not_hidden(tokens, device):
    q, k, v, _ = random_inputs(1, tokens, tokens, 2, 64, torch.float16, device)
    q[0, 3, 1] = float("nan")
    out = attention(q, k, v)
    assert out[0, 3, 1].isnan().all()
    assert out.isnan().sum() == 64


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_finite_exactly_where_eager_s_are(which, value, dtype, device):
    for tokens in (7, 70):
        inputs = random_inputs(2, tokens, tokens, 2, 24, dtype, device)
        inputs[which][0, 3, 1, 5] = value
        for one, eager in zip(run(attention, inputs, dtype), run(reference.attention, inputs, dtype), strict=True):
            assert torch.equal(one.isfinite(), eager.isfinite())


@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize(("tokens", "masked"), [(7, 3), (7, 7), (150, 140), (150, 150)])
def test_scores_of_minus_infinity_weigh_nothing_unless_all_are(tokens, masked, scale, device):
    q, k, v, _ = random_inputs(1, tokens, tokens, 2, 24, torch.float16, device)
    q[..., 0] = 1
    k[:, :masked, :, 0] = float("-inf") * scale
    out, eager = attention(q, k, v, scale=scale), reference.attention(q, k, v, scale=scale)
    assert eager.isnan().all() == (masked == tokens)
    torch.testing.assert_close(out, eager, rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("tokens", [7, 20, 70])
def test_padding_has_no_gradient_whatever_the_queries_are(tokens, device):
    inputs = random_inputs(1, tokens, tokens, 1, 24, torch.float16, device)
    inputs[0][0, 1] = float("nan")
    lengths = torch.tensor([5], dtype=torch.int32, device=device)
    for gradient in run(attention, inputs, torch.float16, lengths=lengths)[2:]:
        assert (gradient[:, 5:] == 0).all() and gradient[:, :5].isnan().all()


@pytest.mark.parametrize("tokens", [20, 130])
def test_bitwise_repeatable(tokens, device):
    inputs = random_inputs(2, tokens, tokens, 2, 72, torch.bfloat16, device)
    first = run(attention, inputs, torch.bfloat16)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(attention, inputs, torch.bfloat16), strict=True))


@pytest.mark.parametrize("tokens", [20, 130])
def test_results_do_not_depend_on_the_rest_of_the_batch(tokens, device):
    inputs = random_inputs(3, tokens, tokens, 2, 72, torch.bfloat16, device)
    together = run(attention, inputs, torch.bfloat16)
    alone = run(attention, [tensor[1:2] for tensor in inputs], torch.bfloat16)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("tokens", [20, 70])
def test_only_the_required_gradients(tokens, device):
    q, k, v, out_grad = random_inputs(1, tokens, tokens, 2, 72, torch.float16, device)
    everything = run(attention, (q, k, v, out_grad), torch.float16)[1:]
    for chosen in range(3):
        inputs = [tensor.detach().requires_grad_(i == chosen) for i, tensor in enumerate((q, k, v))]
        (gradient,) = torch.autograd.grad(attention(*inputs), inputs[chosen], out_grad)
        assert torch.equal(gradient, everything[chosen])


def test_nothing_is_kept_without_a_backward(device):
    q, k, v, _ = random_inputs(1, 130, 130, 2, 72, torch.float16, device)
    operator = torch.ops.siglip_kernels.attention
    assert operator(q, k, v, None, None, False)[1].numel() == 0
    assert operator(q, k, v, None, None, True)[1].shape == (1, 2, 130)
    with torch.no_grad():
        assert not attention(q.requires_grad_(), k, v).requires_grad


@pytest.mark.parametrize(
    "shape",
    [
        (0, 5, 5, 2),
        (2, 0, 5, 2),
        (2, 5, 0, 2),
        (2, 5, 5, 0),
        (0, 80, 80, 2),
        (2, 0, 80, 2),
        (2, 80, 0, 2),
        (2, 0, 0, 2),
    ],
)
def test_nothing_to_do(shape, device):
    batch, query_tokens, key_tokens, heads = shape
    inputs = random_inputs(batch, query_tokens, key_tokens, heads, 16, torch.float16, device)
    for result, exact in zip(
        run(attention, inputs, torch.float16), run(reference.attention, inputs, torch.float16), strict=True
    ):
        assert torch.equal(result, exact)


def test_more_heads_than_a_grid_axis_is_long(device, monkeypatch):
    """A grid's other axes are limited to 65,535, so every launch uses the first only."""
    from siglip_kernels.attention import backward, exact_delta, forward, short

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    for module in (forward, exact_delta, backward, short):
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder())
    for tokens in (1, 65):
        one = torch.zeros((), dtype=torch.float16, device=device).expand(70_000, tokens, 2, 8)
        run(lambda q, k, v: attention(q, k, v), [one] * 4, torch.float16)
    assert len(grids) == 6
    assert all(len(grid) == 1 for grid in grids)
    assert sum(grid[0] >= 140_000 for grid in grids) == 4


@pytest.mark.gpu
def test_more_sequences_than_a_grid_axis_is_long(device):
    q, k, v, _ = random_inputs(33_000, 1, 2, 2, 8, torch.float16, device)
    torch.testing.assert_close(attention(q, k, v), reference.attention(q, k, v), rtol=2e-3, atol=2e-3)


def test_more_programs_than_32_bits_count():
    assert grid(2**31 - 1) == 2**31 - 1
    with pytest.raises(UnsupportedInputError, match="q needs 2147483648 programs; supported: fewer than 2"):
        grid(2**31)


def test_offsets_beyond_32_bits(device):
    """Strides with which the second sample, or the last token, starts beyond 2^31 elements."""
    if device == "cpu":
        try:
            storage = _sparse_storage(2**31 + 2**20)
        except (OSError, RuntimeError) as error:
            pytest.skip(f"no sparse file of 4 GB: {error}")
    else:
        storage = torch.zeros(2**31 + 2**20, dtype=torch.float16, device=device)
    for tokens in (3, 70, 150):  # of which the last are more than one tile of keys
        far = 2**31 // (tokens - 1) // 8 * 8  # the stride of tokens: the last starts near 2^31
        for strides, batch in (((2**31, 16, 8, 1), 2), ((16, far, 8, 1), 1)):
            near = torch.randn(batch, tokens, 2, 8, device=device).half()
            view = storage.as_strided(near.shape, strides)
            view.copy_(near)
            out_grad = torch.randn_like(near)
            expected = run(attention, [near, near, near, out_grad], torch.float16)
            assert all(
                torch.equal(a, b)
                for a, b in zip(expected, run(attention, [view, view, view, out_grad], torch.float16), strict=True)
            )


def test_the_loop_over_keys_advances_offsets_only_within_32_bits():
    """And pointers on Blackwell, where that takes no more instructions."""
    for gpu, tokens, stride, offsets in (
        ("a100", 1024, 3456, True),
        ("h200", 2**11 - 1, 2**20, True),
        ("h200", 2**11, 2**20, False),
        ("b200", 1024, 3456, False),
        ("rtx5090", 1024, 3456, False),
    ):
        near, far = (
            torch.empty_strided((1, tokens, 1, 64), (0, between, 64, 1), device="meta") for between in (64, stride)
        )
        for k, v in ((near, far), (far, near)):
            assert advances_offsets(GPUS[gpu], k, v) == offsets


@pytest.mark.parametrize("tokens", [130, 256])
def test_keys_and_values_of_different_strides(device, tokens):
    """The kernels that loop over keys have a variant for k and v whose tokens have the same stride."""
    q, k, v, out_grad = random_inputs(1, tokens, tokens, 2, 16, torch.float16, device)
    padded = torch.cat([v, torch.full_like(v, float("nan"))], dim=2)[:, :, :2]  # a view, twice the stride
    assert k.stride(1) != padded.stride(1)
    expected = run(attention, [q, k, v, out_grad], torch.float16)
    found = run(attention, [q, k, padded, out_grad], torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def _sparse_storage(size: int) -> Tensor:
    """fp16 zeros that take no memory until they are written. The file is deleted with the tensor."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(2 * size)
        return torch.from_file(file.name, size=size, dtype=torch.float16, shared=True)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    query_tokens=st.integers(1, 80),
    key_tokens=st.integers(1, 140),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 16).map(lambda eighths: 8 * eighths),
    dtype=st.sampled_from(HALF),
    padded=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_drawn_shapes(device, batch, query_tokens, key_tokens, heads, head_dim, dtype, padded, seed):
    torch.manual_seed(seed)
    lengths = torch.randint(0, key_tokens + 1, (batch,), device=device, dtype=torch.int32) if padded else None
    check_budget(random_inputs(batch, query_tokens, key_tokens, heads, head_dim, dtype, device), lengths=lengths)
