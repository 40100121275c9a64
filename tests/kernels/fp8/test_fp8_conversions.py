"""To and from e4m3 as PyTorch does it: rounding, ties, subnormal numbers, saturation, NaN. The interpreter is wrong."""

import pytest
import torch
import triton
import triton.language as tl

from siglip_kernels.fp8.reference import to_e4m3
from siglip_kernels.interpreter import dot, narrow


@triton.jit
def _narrow_kernel(x, y, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, narrow(tl.load(x + offsets, mask=offsets < count), tl.float8e4nv), mask=offsets < count)


@triton.jit
def _dot_kernel(a, b, c, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    o_rows = tl.arange(0, ROWS)[:, None]
    o_depth = tl.arange(0, DEPTH)
    left = tl.load(a + o_rows * DEPTH + o_depth[None, :])
    right = tl.load(b + o_rows * DEPTH + o_depth[None, :]).T
    products = dot(left, right, tl.zeros((ROWS, ROWS), tl.float32), "ieee")
    tl.store(c + o_rows * ROWS + tl.arange(0, ROWS)[None, :], products)


def numbers() -> torch.Tensor:
    """Every number of e4m3, what lies halfway between neighbours and beside it, random ones, and special ones."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    halfway = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(halfway, torch.full_like(halfway, towards)) for towards in (1e9, -1e9)]
    torch.manual_seed(0)
    spread = torch.randn(5000) * torch.logspace(-5, 3, 5000)
    special = [448.1, 464, 480, 500, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 1e-40, -(2**-10)]
    return torch.cat([codes, halfway, *beside, spread, torch.tensor(special)])


def test_rounding_to_e4m3(device):
    x = numbers().to(device)
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    _narrow_kernel[(triton.cdiv(len(x), 1024),)](x, y, len(x), BLOCK=1024)
    torch.testing.assert_close(y.float(), to_e4m3(x).float(), rtol=0, atol=0, equal_nan=True)


def test_products_read_every_number_of_e4m3(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    a = torch.where((codes & 0x7F) == 0x7F, 0, codes).view(torch.float8_e4m3fn).view(16, 16)
    c = torch.empty((16, 16), device=device)
    _dot_kernel[(1,)](a, torch.eye(16, device=device).to(torch.float8_e4m3fn), c, ROWS=16, DEPTH=16)
    torch.testing.assert_close(c, a.float(), rtol=0, atol=0)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_products_keep_nan(device, code):
    a = torch.full((16, 16), code, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    c = torch.empty((16, 16), device=device)
    _dot_kernel[(1,)](a, torch.ones((16, 16), device=device).to(torch.float8_e4m3fn), c, ROWS=16, DEPTH=16)
    assert c.isnan().all()
