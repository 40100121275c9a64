"""The product's kernel for Hopper, compiled without a GPU: registers, shared memory, wgmma, the main loop's cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess
from bench.compiled.sass import Loop

ROOT = Path(__file__).parents[3]
ONLY = {"published": "46656x1152 (qkv|bias, residual|gelu, kept|gelu backward)$", "every": ""}  # each epilogue once
LAUNCHES = {"published": 4, "every": 11}


@pytest.fixture(scope="module")
def rows(extent: str) -> list[Row]:
    return rows_in_a_subprocess("linear_hopper", "h200", only=ONLY[extent])


@pytest.fixture(scope="module")
def loops(extent: str) -> list[Loop]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compiled.sass", "linear_hopper", "--json", "--only", ONLY[extent]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [Loop(**loop) for loop in json.loads(done.stdout)]


def test_no_spill_and_shared_memory_that_fits(rows, extent):
    assert len(rows) == LAUNCHES[extent] and {row.kernel for row in rows} == {"gemm_kernel"}
    assert not [str(row) for row in rows if row.problems()]
    assert all(row.shared_bytes <= 227 * 1024 for row in rows)


def test_registers_move_from_the_producer_to_the_consumers(rows):
    for row in rows:
        assert {24, 240} <= set(row.register_moves), str(row)


def test_tiles_of_the_widths_of_so400m(rows):
    """256 columns of wgmma where 4304 are wanted, 128 where 1152 are: no tile of these is mostly empty."""
    for row in rows:
        if "46656" in row.launch:
            (shape,) = row.matrix
            assert shape == ("wgmma m64n256k16" if "gelu" in row.launch else "wgmma m64n128k16"), str(row)


def test_matrices_move_by_tma(rows):
    """Besides, only the bias is loaded, two numbers at a time, and only column sums are stored."""
    for row in rows:
        assert row.accesses["tma"] >= 7, str(row)
        assert set(row.accesses) <= {"tma", "ld 4", "st 8"}, str(row)
        assert ("st 8" in row.accesses) == ("backward" in row.launch), str(row)


def test_the_main_loop_keeps_the_tensor_cores_busy(loops, extent):
    """Nothing but products of one block of depth, one of which is always in flight. Of narrow products, the operands
    and what TMA writes keep shared memory busier than the tensor cores are."""
    assert len(loops) == 2 * LAUNCHES[extent]
    for loop in loops:
        products = [n for name, n in loop.instructions.items() if name.startswith("HGMMA")]
        assert sum(products) in (4, 8) and loop.waits == 1, str(loop)
        narrow = any(name.startswith("HGMMA.64x128x") for name in loop.instructions)
        assert loop.share >= (0.8 if narrow else 1) and loop.clocks["issue"] < 0.5 * loop.clocks["tensor"], str(loop)
        assert not {"STL", "LDL", "LDS", "STS", "LDG", "STG"} & set(loop.instructions), str(loop)
