"""Hopper's pipeline with operands of fp8, compiled without a GPU: registers, shared memory, QGMMA, the main loop."""

import json

import pytest

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess
from bench.compiled.sass import Loop

ONLY = {"published": "^so400m 46656 (out_proj|gelu)$", "every": ""}
LAUNCHES = {"published": 2, "every": 13}

_LOOPS = """
import dataclasses, json
from bench.compiled.launches import launches_of
from bench.compiled.sass import inner_loops, measure_parts
found = measure_parts(launches_of("fp8_hopper", {only!r}), inner_loops)
print(json.dumps([dataclasses.asdict(one) for one in found]))
"""


@pytest.fixture(scope="module")
def rows(extent: str) -> list[Row]:
    return rows_in_a_subprocess("fp8_hopper", "h200", only=ONLY[extent])


@pytest.fixture(scope="module")
def loops(extent: str, run_python) -> list[Loop]:
    done = run_python(_LOOPS.format(only=ONLY[extent]))
    assert done.returncode == 0, done.stderr
    return [Loop(**loop) for loop in json.loads(done.stdout)]


def test_no_spill_and_shared_memory_that_fits(rows, extent):
    assert len(rows) == LAUNCHES[extent] and {row.kernel for row in rows} == {"gemm_kernel"}
    assert not [str(row) for row in rows if row.problems() or row.stack_bytes]
    assert all(row.shared_bytes <= 227 * 1024 for row in rows)


def test_products_are_of_fp8_in_tiles_of_the_widths_of_models(rows):
    for row in rows:
        assert row.products == {"fp8": sum(row.products.values())}, str(row)
        assert set(row.matrix) <= {"wgmma m64n256k32", "wgmma m64n128k32"}, str(row)
        if row.launch.startswith("so400m 46656"):
            assert ("wgmma m64n256k32" in row.matrix) == row.launch.endswith("gelu"), str(row)


def test_registers_move_from_the_producer_to_the_consumers(rows):
    for row in rows:
        assert {24, 240} <= set(row.register_moves), str(row)


def test_matrices_move_by_tma(rows):
    """Besides, only scales and the bias are loaded, and nothing is stored."""
    for row in rows:
        assert row.accesses["tma"] >= 7, str(row)
        assert set(row.accesses) <= {"tma", "ld 4", "ld 8"}, str(row)


def test_the_main_loop_keeps_the_tensor_cores_busy(loops, extent):
    """Nothing but products of one block of depth, one of which is always in flight; of narrow ones, shared memory is
    busier, as in half precision."""
    assert len(loops) == 2 * LAUNCHES[extent]
    for loop in loops:
        products = {name: n for name, n in loop.instructions.items() if "GMMA" in name}
        assert all(name.startswith("QGMMA.64x") and name.endswith("x32") for name in products), str(loop)
        assert sum(products.values()) in (4, 8) and loop.waits == 1, str(loop)
        narrow = any(name.startswith("QGMMA.64x128x") for name in products)
        assert loop.share >= (0.8 if narrow else 1) and loop.clocks["issue"] < 0.5 * loop.clocks["tensor"], str(loop)
        assert not {"STL", "LDL", "LDS", "STS", "LDG", "STG"} & set(loop.instructions), str(loop)
