"""What counts as a problem of a compiled kernel: on planted kernels, and on rows at the limits."""

import dataclasses
import json
import subprocess
import sys

import pytest

from bench.compiled.ahead_of_time import STACK_LIMIT, Row, element_types, products, products_by_vectors
from bench.environment import ROOT, process_environment

PLANTED = ROOT / "tests" / "support" / "planted_kernels.py"


def compile_planted(cache, source=PLANTED):
    environment = process_environment(TRITON_CACHE_DIR=str(cache))
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, source], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {row["launch"]: Row(**row) for row in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def planted(cache):
    return compile_planted(cache)


@pytest.mark.parametrize(
    ("launch", "problem"),
    [
        ("a spill", "B of stack, the limit is 16"),
        ("shared memory", "262144 B of shared memory, the limit is 101376"),
        ("half precision without matrix instructions", "products of fp16 without matrix instructions"),
        ("tf32 without matrix instructions", "products of tf32 without matrix instructions"),
        ("does not compile", "must be a power of 2"),
    ],
)
def test_each_planted_fault_is_a_problem(planted, launch, problem):
    (found,) = planted[launch].problems()
    assert problem in found and "\n" not in found and len(found) < 600


@pytest.mark.parametrize("launch", ["no product", "half precision", "tf32", "fp32"])
def test_kernels_without_a_fault_are_not_accused(planted, launch):
    assert planted[launch].problems() == []


def row(**values):
    facts = dict(registers=200, shared_bytes=1000, shared_limit=1000, matrix={"mma m16n8k16": 4}, inputs=["bf16"])
    return Row("bf16", "kernel", "h200", **{**facts, **values})


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (dict(stack_bytes=STACK_LIMIT), None),
        (dict(stack_bytes=STACK_LIMIT + 4), "20 B of stack"),
        (dict(shared_bytes=1001), "1001 B of shared memory"),
        (dict(tensor_memory_columns=512), None),
        (dict(tensor_memory_columns=513), "513 columns of tensor memory"),
        (dict(error="PTXASError: no"), "PTXASError"),
        (dict(matrix={}), None),  # no products: a layer norm
        (dict(matrix={}, products={"bf16": 1}), "products of bf16 without matrix instructions"),
        (dict(matrix={}, products={"fp32": 1}), "products of fp32"),  # of bf16 inputs, converted before the product
        (dict(matrix={}, products={"fp32": 1}, inputs=["fp32"]), None),
        (dict(matrix={}, products={"tf32": 1}, inputs=["fp32"]), "products of tf32"),
        (dict(products={"bf16": 2}), None),
        (dict(products={"bf16": 2}, products_by_vectors=1), "products of bf16"),  # one of two
        (dict(products={"bf16": 2, "fp32": 1}, products_by_vectors=1), None),  # it may be the one in fp32
    ],
)
def test_the_limits(values, problem):
    found = row(**values).problems()
    assert (len(found), problem is None) in ((0, True), (1, False)) and (problem or "") in "".join(found)


def test_products_are_read_from_the_compilers_code():
    ttir = """
    %8 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<32x16xf32> * tensor<16x32xf32> -> tensor<32x32xf32> loc(#1)
    %9 = tt.dot %a, %b, %c : tensor<32x16xf32> * tensor<16x32xf32> -> tensor<32x32xf32> loc(#1)
    %10 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<2x16x16xbf16> * tensor<2x16x16xbf16> -> tensor<2x16x16xf32>
    %11 = tt.dot %a, %b, %c : tensor<32x16xf16> * tensor<16x32xf16> -> tensor<32x32xf32> loc(#1)
    """
    assert products(ttir) == {"bf16": 1, "fp16": 1, "fp32": 1, "tf32": 1}
    gluon = "%o = ttng.warp_group_dot %q, %k, %s : !ttg.memdesc<64x16xbf16, #shared> * !ttg.memdesc<16x8xbf16, #shared>"
    assert products(gluon) == {"bf16": 1}
    assert products("%1 = tt.load %x : tensor<32x!tt.ptr<bf16>>") == {}
    dot = (
        "%8 = tt.dot %a, %b, %c : tensor<8x8xf16, #ttg.dot_op<{parent = #X}>> * tensor<8x8xf16> -> tensor<8x8xf32, #X>"
    )
    assert [products_by_vectors(dot.replace("X", layout)) for layout in ("blocked2", "mma", "linear")] == [1, 0, 0]


def test_inputs_are_read_from_the_signature():
    assert element_types(["*bf16", "*fp32", "i32", "constexpr", "tensordesc<fp16[64, 64]>"]) == ["bf16", "fp16", "fp32"]


def entries(cache):
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}


def test_what_is_compiled_is_kept_by_its_source(planted, cache, tmp_path):
    before = entries(cache)
    assert compile_planted(cache) == planted
    assert entries(cache) == before  # nothing was compiled
    changed = tmp_path / PLANTED.name
    changed.write_text(PLANTED.read_text().replace("range(3)", "range(4)"))
    again = compile_planted(cache, changed)
    same = {launch for launch, one in again.items() if one.key == planted[launch].key and one.key}
    assert same == set(planted) - {"a spill", "no product", "does not compile"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        pytest.param(lambda path: path.unlink(), marks=pytest.mark.thorough),
    ],
    ids=["half-written", "missing"],
)
def test_a_damaged_cache_is_compiled_again(planted, cache, damage):
    for path in entries(cache):
        damage(path)
    assert {name: dataclasses.replace(one, error="") for name, one in compile_planted(cache).items()} == {
        name: dataclasses.replace(one, error="") for name, one in planted.items()
    }


def test_an_unusable_cache_is_no_error(planted, tmp_path):
    (tmp_path / "file").write_text("")
    assert compile_planted(tmp_path / "file") == planted
