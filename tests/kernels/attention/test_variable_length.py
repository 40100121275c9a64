"""Attention over packed sequences against fp64: error budget, the dense operation, boundaries, repeatability."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from error_budget import check_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from siglip_kernels import attention, reference
from siglip_kernels.attention import config, flash_attn_varlen_func
from siglip_kernels.attention.dispatch import launch_packed_backward, launch_packed_forward
from siglip_kernels.attention.sequences import Sequences, programs_of_head, tile_of_program

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)


def boundaries(lengths: list[int], device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def random_inputs(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and the gradient of the output (T, H, D): the first three are views of one tensor."""
    packed = torch.randn(tokens, 3, heads, head_dim, device=device).to(dtype)
    return [*packed.unbind(1), torch.randn(tokens, heads, head_dim, device=device).to(dtype)]


def run(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, **options: object) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    q, k, v, out_grad = (tensor.to(dtype) for tensor in inputs)
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    out = function(q, k, v, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), out_grad)]


def check_budget(inputs: list[Tensor], lengths: list[int], **options: object) -> list[Tensor]:
    """Asserts the error budget of the output and each gradient, and returns the kernel's."""
    dtype, device = inputs[0].dtype, str(inputs[0].device)
    options["cu_seqlens"] = boundaries(lengths, device)
    found = run(attention, inputs, dtype, **options)
    truth = run(reference.attention, inputs, torch.float64, **options)
    eager = run(reference.attention, inputs, dtype, **options)
    # Of sequences of one key, the gradients of the scores are zero in eager's order and rounding in any other.
    slack = torch.finfo(torch.float32).eps * inputs[2].double().norm() * inputs[3].double().norm()
    for name, one, exact, other in zip(("out", "dq", "dk", "dv"), found, truth, eager, strict=True):
        assert one.dtype == dtype
        check_error(one, other, exact, name, slack=slack if name in ("dq", "dk") else 0.0)
    return found


# Empty sequences, one token, and lengths beside those of tiles.
LENGTHS = st.one_of(st.integers(0, 5), st.sampled_from([63, 64, 65, 127, 128, 129]), st.integers(0, 200))


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=6),
    unused=st.integers(0, 3),
    head_dim=st.sampled_from([64, 72, 24, 96]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_lengths(lengths, unused, head_dim, dtype, device):
    inputs = random_inputs(sum(lengths) + unused, 1, head_dim, dtype, device)
    for result in check_budget(inputs, lengths):
        assert (result[sum(lengths) :] == 0).all()


@pytest.mark.thorough
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=8),
    head_dim=st.integers(1, 16).map(lambda eighths: 8 * eighths),
    dtype=st.sampled_from(DTYPES),
)
def test_any_lengths_and_head_dim(lengths, head_dim, dtype, device):
    check_budget(random_inputs(sum(lengths), 1, head_dim, dtype, device), lengths)


@pytest.mark.thorough
def test_lengths_from_one_to_4096(device):
    lengths = [1, 0, 4096, 17, 1025, 0, 256]
    check_budget(random_inputs(sum(lengths), 1, 72, torch.bfloat16, device), lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("longest", [16, 33])
def test_short_sequences_have_tiles_of_their_size(longest, dtype, device):
    lengths = [longest, 1, 0, 7, longest - 1]
    inputs = random_inputs(sum(lengths) + 2, 2, 72, dtype, device)
    inputs[1][3] *= 20  # rows that need an exact delta
    check_budget(inputs, lengths, max_seqlen=longest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_sequence_among_short_ones_has_many_of_their_tiles(dtype, device):
    lengths = [5] * 12 + [90] + [0, 16] + [9] * 12
    assert config.typical_length(sum(lengths), len(lengths), 90) == 32
    inputs = random_inputs(sum(lengths), 1, 72, dtype, device)
    inputs[1][70] *= 20  # rows that need an exact delta
    check_budget(inputs, lengths, max_seqlen=90)


@pytest.mark.parametrize(
    ("lengths", "longest", "expected"),
    [
        ([256] * 16, 256, 256), ([256] * 16, None, 256), ([50] * 64, 50, 64), ([256] + [16] * 255, 256, 32),
        ([4096] + [64] * 15, 4096, 2048), ([1], 1, 16), ([], None, 16), ([0, 0], 7, 16), ([300], 16, 16),
    ],
)  # fmt: skip
def test_typical_lengths(lengths, longest, expected):
    assert config.typical_length(sum(lengths), len(lengths), longest) == expected


def test_a_longest_that_is_too_small_costs_time_only(device):
    """The host does not read boundaries on a GPU, so that nothing else may depend on it."""
    inputs = random_inputs(61, 2, 24, torch.float16, device)
    inputs[1][3] *= 20
    *tensors, out_grad = inputs
    cu_seqlens = boundaries([40, 21], device)
    packing = (cu_seqlens, None, 16, 16)
    out, log_sum_exp = launch_packed_forward(*tensors, *packing, None, True)
    gradients = launch_packed_backward(out_grad, *tensors, out, log_sum_exp, *packing, None, True, True)
    expected = run(attention, inputs, torch.float16, cu_seqlens=cu_seqlens)
    for found, one in zip((out, *gradients), expected, strict=True):
        torch.testing.assert_close(found, one, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_has_the_bits_of_the_dense_operation(dtype, device):
    """Where that has the same kernels: sequences that are not short."""
    lengths = [130, 0, 70]
    inputs = random_inputs(200, 2, 72, dtype, device)
    inputs[1][150] *= 20  # rows that need an exact delta
    packed = run(attention, inputs, dtype, cu_seqlens=boundaries(lengths, device), max_seqlen=130)
    first = 0
    for length in filter(None, lengths):
        alone = [tensor[None, first : first + length] for tensor in inputs]
        for one, other in zip(packed, run(attention, alone, dtype), strict=True):
            assert torch.equal(one[first : first + length], other[0])
        first += length


def test_equal_lengths_have_the_bits_of_a_dense_batch(device):
    inputs = random_inputs(4 * 70, 1, 64, torch.float16, device)
    packed = run(attention, inputs, torch.float16, cu_seqlens=boundaries([70] * 4, device))
    dense = run(attention, [tensor.unflatten(0, (4, 70)) for tensor in inputs], torch.float16)
    assert all(torch.equal(one, other.flatten(0, 1)) for one, other in zip(packed, dense, strict=True))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2])
def test_any_scale(scale, device):
    for dtype in (torch.float32, torch.bfloat16):
        check_budget(random_inputs(80, 1, 40, dtype, device), [70, 10], scale=scale)


def test_tokens_of_other_sequences_are_never_read(device):
    inputs = random_inputs(150, 1, 72, torch.bfloat16, device)
    cu_seqlens = boundaries([40, 66, 30], device)  # and 14 tokens of no sequence
    clean = run(attention, inputs, torch.bfloat16, cu_seqlens=cu_seqlens)
    for tensor in inputs:
        tensor[:40] = float("nan")
        tensor[106:136] = float("nan")
    for tensor in inputs[:3]:
        tensor[136:] = float("nan")
    for before, after in zip(clean, run(attention, inputs, torch.bfloat16, cu_seqlens=cu_seqlens), strict=True):
        assert torch.equal(before[40:106], after[40:106])
        assert after[:40].isnan().all() and after[106:136].isnan().all()
        assert (after[136:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [[], [0, 0, 0], [0, 3], [3, 0, 0, 2, 0], [1] * 5], ids=str)
def test_empty_sequences(lengths, dtype, device):
    inputs = random_inputs(5, 2, 16, torch.float16, device)
    cu_seqlens = boundaries(lengths, device, dtype)
    found = run(attention, inputs, torch.float16, cu_seqlens=cu_seqlens)
    nonempty = [length for length in lengths if length]
    expected = run(attention, inputs, torch.float16, cu_seqlens=boundaries(nonempty, device))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    if nonempty:
        exact = reference.attention(*(tensor.double() for tensor in inputs[:3]), cu_seqlens=cu_seqlens)
        torch.testing.assert_close(found[0].double(), exact, atol=2e-3, rtol=2e-3)
    else:
        assert all((result == 0).all() for result in found)


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=len)
@pytest.mark.parametrize("heads", [0, 2])
def test_nothing_to_do(lengths, heads, device):
    inputs = random_inputs(0, heads, 16, torch.float16, device)
    for result in run(attention, inputs, torch.float16, cu_seqlens=boundaries(lengths, device)):
        assert result.shape == (0, heads, 16)


@triton.jit
def tiles_kernel(
    tiles, slots, starts, other_starts, sequences, tokens, other_tokens, BLOCK: tl.constexpr
):  # a program per slot
    index = tl.program_id(0)
    slot = tl.load(slots + index)
    first, end, start, count = tile_of_program(slot, starts, other_starts, sequences, tokens, other_tokens, BLOCK, True)
    tl.store(tiles + 4 * index, first)
    tl.store(tiles + 4 * index + 1, end)
    tl.store(tiles + 4 * index + 2, start.to(tl.int32))
    tl.store(tiles + 4 * index + 3, count)


def found_tiles(starts: Tensor, others: Tensor, slots: list[int], tokens: int, block: int) -> list[list[int]]:
    """(first token, end of the sequence, first of the others, their number) of each slot with a tile."""
    tiles = torch.empty(len(slots), 4, dtype=torch.int32, device=starts.device)
    numbers = torch.tensor(slots, dtype=torch.int32, device=starts.device)
    tiles_kernel[(len(slots),)](tiles, numbers, starts, others, len(starts) - 1, tokens, tokens, block)
    return [tile for tile in tiles.tolist() if tile[0] != tile[1]]


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("unused", [0, 40])
def test_every_tile_has_one_slot(block, unused, device):
    lengths = [0, 1, 15, 16, 17, 0, 0, 127, 128, 129, 300, 1, 0]
    starts = boundaries(lengths, device)
    others = boundaries([3] * len(lengths), device)
    tokens = sum(lengths) + unused
    slots = range(programs_of_head(tokens, block, Sequences(starts, others, (0, 0))))
    ends = starts.tolist()
    expected = [
        [first, end, 3 * index, 3]
        for index, (start, end) in enumerate(pairwise(ends))
        for first in range(start, end, block)
    ]
    expected += [[first, tokens, 3 * len(lengths), 0] for first in range(ends[-1], tokens, block)]
    assert found_tiles(starts, others, list(slots), tokens, block) == expected


def test_the_search_takes_as_many_steps_as_there_are_sequences(device):
    """More than 1,024 take two steps, with empty ones among them."""
    lengths = [index % 4 for index in range(3000)]
    starts = boundaries(lengths, device)
    ends = starts.tolist()
    chosen = [1, 2, 3, 1021, 1023, 1025, 1501, 2047, 2049, 2999]
    slots = [ends[index] // 16 + index for index in chosen]
    found = found_tiles(starts, starts, slots, ends[-1], 16)
    assert found == [[ends[index], ends[index + 1], ends[index], lengths[index]] for index in chosen]


def test_bitwise_repeatable(device):
    inputs = random_inputs(200, 2, 72, torch.bfloat16, device)
    cu_seqlens = boundaries([130, 70], device)
    first = run(attention, inputs, torch.bfloat16, cu_seqlens=cu_seqlens)
    again = run(attention, inputs, torch.bfloat16, cu_seqlens=cu_seqlens)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_only_the_required_gradients(device):
    q, k, v, out_grad = random_inputs(90, 2, 24, torch.float16, device)
    cu_seqlens = boundaries([20, 70], device)
    everything = run(attention, [q, k, v, out_grad], torch.float16, cu_seqlens=cu_seqlens)[1:]
    for chosen in range(3):
        inputs = [tensor.detach().requires_grad_(i == chosen) for i, tensor in enumerate((q, k, v))]
        (gradient,) = torch.autograd.grad(attention(*inputs, cu_seqlens=cu_seqlens), inputs[chosen], out_grad)
        assert torch.equal(gradient, everything[chosen])


def test_packed_views_are_not_copied(device, monkeypatch):
    q, k, v = (tensor.requires_grad_() for tensor in random_inputs(90, 2, 72, torch.float16, device)[:3])
    cu_seqlens = boundaries([20, 70], device)

    def refuse(self, *arguments, **options):
        raise AssertionError("a copy was made")

    for name in ("contiguous", "clone"):
        monkeypatch.setattr(Tensor, name, refuse)
    out = attention(q, k, v, cu_seqlens=cu_seqlens)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


@pytest.mark.parametrize("kind", ["transposed", "heads first", "every other token"])
def test_views_equal_their_contiguous_copies(kind, device):
    def view() -> Tensor:
        if kind == "transposed":
            return torch.randn(90, 72, 2, device=device).half().transpose(1, 2)
        if kind == "heads first":
            return torch.randn(2, 90, 72, device=device).half().transpose(0, 1)
        return torch.randn(180, 2, 72, device=device).half()[::2]

    inputs, cu_seqlens = [view() for _ in range(4)], boundaries([20, 70], device)
    found = run(attention, inputs, torch.float16, cu_seqlens=cu_seqlens)
    copies = [tensor.contiguous() for tensor in inputs]
    expected = run(attention, copies, torch.float16, cu_seqlens=cu_seqlens)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_lengths_of_keys(dtype, device):
    """Cross attention, with a sequence without queries, one without keys, and tokens of no sequence."""
    query_lengths, key_lengths = [70, 0, 9, 5], [20, 7, 0, 130]
    q, _, _, out_grad = random_inputs(86, 2, 24, dtype, device)
    _, k, v, _ = random_inputs(159, 2, 24, dtype, device)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split([*query_lengths, 2]), k.split([*key_lengths, 2]), v.split([*key_lengths, 2]), strict=True)
        *sequences, _ = [reference.attention(*(tensor[None] for tensor in part))[0] for part in parts]
        return torch.cat([*sequences, q.new_zeros(2, 2, 24)])

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(
            q, k, v, boundaries(query_lengths, device), boundaries(key_lengths, device), 70, 130
        )

    inputs = [q, k, v, out_grad]
    found, truth, eager = run(packed, inputs, dtype), run(alone, inputs, torch.float64), run(alone, inputs, dtype)
    for one, exact, other in zip(found, truth, eager, strict=True):
        check_error(one, other, exact)
    out, dq, dk, dv = found
    assert (out[70:79] == 0).all() and (dq[70:79] == 0).all() and (dk[20:27] == 0).all() and (dv[-2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_boundaries_that_break_the_rules_lead_to_no_access_elsewhere(dtype, device):
    """On a GPU the host does not read them."""
    lowest, highest = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    rules = [0, 30, 60, 90]
    for values in (
        [0, 500, 600, 700],
        [0, 50, 20, 90],
        [-40, 30, 60, 90],
        [60, 70, 80, 90],
        [90, 60, 30, 0],
        [highest, lowest, 5, highest],
        [lowest, highest, lowest, 0],
    ):
        wrong = torch.tensor(values, dtype=dtype, device=device)
        right = torch.tensor(rules, dtype=dtype, device=device)
        for starts, others in ((wrong, right), (right, wrong), (wrong, wrong)):
            slots = range(programs_of_head(90, 16, Sequences(starts, others, (0, 0))))
            for first, end, start, count in found_tiles(starts, others, list(slots), 90, 16):
                assert 0 <= first < end <= 90
                assert start >= 0 and count >= 0 and start + count <= 90
