"""Attention's kernels for Hopper, compiled without a GPU: registers, shared memory, wgmma, the inner loop's cost."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import pytest

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess
from bench.compiled.sass import Loop, inner_loops, measure

Counted = TypeVar("Counted", Row, Loop)
ROOT = Path(__file__).parents[3]
COLUMNS = {64: (64,), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128,)}


def columns(launch: str) -> tuple[int, ...]:
    return COLUMNS[int(launch.split("D=")[1].split()[0])]


FORWARD = "attention_forward_hopper_kernel"
QUERIES, KEYS = "attention_backward_queries_hopper_kernel", "attention_backward_keys_hopper_kernel"
ONLY = {"published": r"S=729 D=(72|64) \w+$", "every": ""}
LAUNCHES = {
    "published": {FORWARD: 2, QUERIES: 1, KEYS: 1},
    "every": {FORWARD: 10, QUERIES: 7, KEYS: 7},
}


def ours(found: Iterable[Counted]) -> list[Counted]:
    """Without the portable kernel that a backward launches as well, which has tests of its own."""
    return [one for one in found if one.kernel != "attention_backward_delta_kernel"]


@pytest.fixture(scope="module")
def rows(extent: str) -> list[Row]:
    return ours(rows_in_a_subprocess("attention_hopper", "h200", only=ONLY[extent]))


@pytest.fixture(scope="module")
def loops(extent: str) -> list[Loop]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compiled.sass", "attention_hopper", "--json", "--only", ONLY[extent]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return ours(Loop(**loop) for loop in json.loads(done.stdout))


def test_no_spill_and_shared_memory_that_fits(rows, extent):
    assert Counter(row.kernel for row in rows) == LAUNCHES[extent]
    assert not [str(row) for row in rows if row.problems()]
    assert all(row.shared_bytes <= 227 * 1024 for row in rows)


def test_registers_go_from_the_producer_to_the_consumers(rows):
    """All threads start with equal shares of the register file; setmaxnreg moves them."""
    for row in rows:
        assert row.registers * row.warps * 32 <= 65_536
        three = "S=729 D=64" in row.launch
        assert row.warps == (16 if three else 12), str(row)
        assert set(row.register_moves) >= ({160, 32} if three else {240, 24}), str(row)


def test_products_are_as_wide_as_the_head(rows):
    """Products with values are as wide as the head's columns, 80 at head dim 72."""
    for row in rows:
        widths = {int(name.split("n", 1)[1].split("k")[0]) for name in row.matrix}
        assert widths <= {128, 64, 32, 16} and widths >= set(columns(row.launch)), str(row)


def test_everything_moves_by_tma(rows):
    """Without TMA, the kernels of queries load and store statistics, and all load lengths, four bytes each."""
    for row in rows:
        assert row.accesses["tma"] >= 6
        assert set(row.accesses) <= {"tma", "st 4", "ld 4"}, str(row)
        assert ("st 4" in row.accesses) == (row.kernel != KEYS), str(row)
        if row.kernel != QUERIES:
            assert ("ld 4" in row.accesses) == ("lengths" in row.launch), str(row)


def test_one_inner_loop_for_each_consumer(loops, extent):
    """Two consumers; three in the forward of some launches with head dim 64."""
    found, launches = Counter(loop.kernel for loop in loops), LAUNCHES[extent]
    three = {"published": 1, "every": 2}[extent]
    assert found == {FORWARD: 2 * launches[FORWARD] + three, QUERIES: 2 * launches[QUERIES], KEYS: 2 * launches[KEYS]}


def wgmma(loop: Loop) -> dict[int, int]:
    """{width: count}"""
    return {int(name.split("x")[1]): n for name, n in loop.instructions.items() if name.startswith("HGMMA")}


@pytest.mark.parametrize(
    ("kernel", "many", "few", "wide_heads", "along_the_head", "across_it", "waits"),
    [(FORWARD, 128, 0, (), 1, 1, 2), (QUERIES, 128, 64, (96, 128), 2, 1, 3), (KEYS, 64, 32, (128,), 2, 2, 4)],
)
def test_products_run_together_and_exponentials_beneath_them(
    loops, kernel, many, few, wide_heads, along_the_head, across_it, waits
):
    """Wide heads have fewer tokens per step. Products with scores as the result sum over the head's columns; the others
    have them as the result."""
    for loop in loops:
        if loop.kernel != kernel:
            continue
        head = columns(loop.launch)
        tokens = few if sum(head) in wide_heads else many
        expected = Counter({tokens: along_the_head * sum(head) // 16})
        for width in head:
            expected[width] += across_it * tokens // 16
        assert wgmma(loop) == expected, str(loop)
        assert loop.waits == waits, str(loop)  # at most one per product, not one per wgmma
        corrections = 2 if kernel == FORWARD else 0
        assert loop.exponentials_under_way == loop.instructions["MUFU"] == tokens // 2 + corrections, str(loop)


def test_the_tensor_pipe_can_be_kept_busy(loops):
    """A score costs one multiply-add, without a separate multiplication by the scale."""
    for loop in loops:
        assert loop.share >= 0.96, str(loop)
        assert not {"STL", "LDL", "STS", "LDG", "STG"} & set(loop.instructions), str(loop)
        tokens = loop.instructions["MUFU"] * 2  # per step
        statistics = tokens // 4 if loop.kernel == KEYS else 0  # two numbers per load
        assert loop.instructions.get("LDS", 0) == statistics, str(loop)
        if loop.kernel == FORWARD:
            assert loop.instructions["FFMA"] in range(64, 72), str(loop)


LOOP = """
.L_x_1:
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT, gsb0 ;
        /*0010*/                   MUFU.EX2 R1, R2 ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/                   MUFU.EX2 R1, R2 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   MUFU.EX2 R1, R2 ;
        /*0070*/                   FFMA R1, R1, UR4, -R3 ;
        /*0080*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0090*/              @!P1 SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
        /*00a0*/               @P0 BRA `(.L_x_1) ;
        /*00b0*/               @P2 BRA `(.L_x_0) ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_2) ;
"""


def test_counting():
    """Neither an outer loop nor a block that is placed out of line is an inner loop."""
    (found,) = inner_loops(".L_x_0:\n        /*0000*/                   NOP ;" + LOOP)
    loop = measure("launch", "kernel", found)
    assert loop.clocks == {"tensor": 64, "shared": 48, "mufu": 24, "fma": 1, "alu": 0, "lsu": 4, "issue": 11}
    assert (loop.waits, loop.exponentials_under_way, loop.bound, loop.share) == (2, 2, "tensor", 1.0)
