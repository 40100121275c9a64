"""What Triton's interpreter makes of operations on operands of many types and shapes.

As a program it prints that of the interpreter as it is, to compare with the one that tests run.
"""

import itertools
import json
import math
import operator
import warnings
from typing import Any

import torch
import triton
import triton.language as tl

DTYPES = (tl.int1, tl.int8, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32)
NUMBERS = (-0.0, 0, 1, -3, 2.5, math.nan, 1e-45, 1e300, True, 200, 2**31, 2**40, 2**64)
OPERATIONS = {
    operation.__name__: operation
    for operation in (
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod),
        *(operator.lt, operator.eq, operator.ne),
        *(operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift),
    )
} | {"maximum": lambda a, b: tl.maximum(a, b), "where": lambda a, b: tl.where(tl.arange(0, 4) < 2, a, b)}


@triton.jit
def _call_kernel(x, CALL: tl.constexpr):
    CALL(x)


def results() -> dict[str, list[str]]:
    """For each operation and kind of operand: the types and bits of the results, or the errors."""
    found: dict[str, list[str]] = {}
    values = torch.tensor([0.0, -0.0, 1.0, 127.0, 3.2, 1e-40, 6e4, math.inf])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _call_kernel[(1,)](values, CALL=lambda x: _observe(x, found))
    return found


def _observe(x: Any, found: dict[str, list[str]]) -> None:
    eight = tl.load(x + tl.arange(0, 8))
    four = eight.reshape(2, 4)
    blocks = {"(8,)": eight, "(2, 4)": four, "(1, 4)": tl.load(x + tl.arange(0, 4))[None, :], "()": tl.load(x + 3)}
    operands = {f"{dtype} {shape}": block.to(dtype) for dtype in DTYPES for shape, block in blocks.items()}
    for dtype in DTYPES:
        found[f"to {dtype}"] = [_shown(tl.cast, block, dtype) for block in operands.values()]
    operands |= {f"{number!r}": number for number in NUMBERS}
    operands["pointers"] = x + tl.arange(0, 8)
    for (name, operation), (left, a) in itertools.product(OPERATIONS.items(), operands.items()):
        others = [b for b in operands.values() if isinstance(a, tl.tensor) or isinstance(b, tl.tensor)]
        found[f"{left} {name}"] = [_shown(operation, a, b) for b in others]


def _shown(operation: Any, *operands: Any) -> str:
    try:
        result = operation(*operands)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    data = result.handle.data
    bits = "an address" if result.dtype.is_ptr() else data.tobytes().hex()
    return f"{result.type} {result.shape} {result.handle.dtype} {data.dtype} {data.shape} {bits}"


if __name__ == "__main__":
    print(json.dumps(results()))
