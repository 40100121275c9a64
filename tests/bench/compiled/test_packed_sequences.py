"""The table of what attention computes of packed sequences."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.compiled import packed_sequences
from bench.compiled.launch import GPUS
from bench.compiled.packed_sequences import MIXES, Count, parse
from siglip_kernels import attention
from siglip_kernels.device import INTERPRETER

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("mix", MIXES)
def test_the_cost_follows_the_squared_lengths(mix, gpu):
    """Rounded up to tiles of at most 128 by 128, and not the number of sequences times the longest squared."""
    one = Count(parse(mix), GPUS[gpu], 72)
    assert one.squares <= one.packed <= sum((length + 127) ** 2 for length in one.lengths)
    assert one.packed <= one.padded <= one.dense
    assert 0 <= one.idle <= len(one.lengths) + 1
    if len(set(one.lengths)) > 1:
        assert one.dense > 3 * one.packed


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    # Few long ones among many short ones, and anything else; from half of the smallest tile on.
    groups=st.lists(st.tuples(st.sampled_from([8, 16, 40, 64, 65, 128, 300, 1024, 4096]), st.integers(1, 300))),
    others=st.lists(st.integers(8, 4096), min_size=1, max_size=20),
    gpu=st.sampled_from(list(GPUS)),
)
def test_no_mix_costs_more_than_ten_times_its_squared_lengths(groups, others, gpu):
    """A tile is shorter than twice the root mean square of the lengths."""
    one = Count([*others, *(length for length, count in groups for _ in range(count))], GPUS[gpu], 72)
    assert one.packed <= 10 * one.squares


@pytest.mark.parametrize(
    ("lengths", "longest", "block"),
    [([150, 0, 7, 129, 1], 150, 128), ([16, 0, 7, 1], 16, 16), ([90, *[7] * 20], 90, 32)],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the products of Triton's interpreter")
def test_the_kernel_computes_what_is_counted(lengths, longest, block, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    products = []
    create_dot = InterpreterBuilder.create_dot

    def count(self, *arguments):
        products.append(arguments)
        return create_dot(self, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    one = Count(lengths, INTERPRETER, 64)
    q = torch.randn(sum(one.lengths), 2, 64)
    boundaries = torch.tensor([0, *one.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    attention(q.half(), q.half(), q.half(), cu_seqlens=boundaries, max_seqlen=longest)
    assert len(products) == 2 * 2 * one.packed // block**2  # of scores and of values, in two heads


def test_readme_has_the_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["packed_sequences"])
    assert packed_sequences.main() == 0
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert set(capsys.readouterr().out.splitlines()) <= set(lines)


@pytest.mark.parametrize("lengths", ["none", "4096x", "0x3", ""])
def test_bad_lengths_are_named(lengths, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["packed_sequences", "--lengths", lengths])
    with pytest.raises(SystemExit):
        packed_sequences.main()
    assert f"--lengths: {lengths!r} is not a list" in capsys.readouterr().err
