"""What `fast_interpreter` replaces still does what it did."""

import json
import subprocess
import sys

import interpreted_operations
import pytest
import torch
import triton
import triton.language as tl

from siglip_kernels.device import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="of the interpreter")


@triton.jit
def _arithmetic_kernel(x, y, out, NAME: tl.constexpr):
    offsets = tl.arange(0, 2)
    a, b = tl.load(x + offsets), tl.load(y + offsets)
    tl.store(out + offsets, a + b if NAME == "add" else a - b if NAME == "sub" else a * b)


@pytest.mark.parametrize(
    ("name", "a", "b", "beyond"),
    [("add", 2**31 - 2, 1, 2), ("sub", -(2**31) + 1, 1, 2), ("mul", 2**16, 2**14, 2**15)],
)
def test_integers_that_overflow_are_found(name, a, b, beyond):
    x, y = (torch.tensor([0, value], dtype=torch.int32) for value in (a, b))
    out = torch.empty_like(x)
    _arithmetic_kernel[(1,)](x, y, out, NAME=name)
    assert out[1] == {"add": a + b, "sub": a - b, "mul": a * b}[name]
    y[1] = beyond
    with pytest.raises(Exception, match=f"int32 overflow detected for operation {name}"):
        _arithmetic_kernel[(1,)](x, y, out, NAME=name)
    _arithmetic_kernel[(1,)](x.long(), y.long(), out, NAME=name)


def test_every_operation_has_the_types_bits_and_errors_of_triton_s_interpreter():
    """But for integers that overflow, which Triton's interpreter lets pass."""
    program = [sys.executable, interpreted_operations.__file__]
    expected = json.loads(subprocess.run(program, capture_output=True, check=True, text=True).stdout)
    found = interpreted_operations.results()
    assert found.keys() == expected.keys()
    for operation in expected:
        for result, wanted in zip(found[operation], expected[operation], strict=True):
            assert result == wanted or "overflow detected" in result, operation
