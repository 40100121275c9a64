"""The emulator computes what Gluon on Hopper computes: types, rounding, copies, products, and unmodified launches."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hopper_emulator.faults import Fault, UnsupportedByEmulator
from hopper_emulator.launch import emulate, emulating
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def rounding_kernel(x, bf16, fp16, N: gl.constexpr):
    i = gl.arange(0, N, LAYOUT)
    values = gl.load(x + i)
    gl.store(bf16 + i, values.to(gl.bfloat16))
    gl.store(fp16 + i, values.to(gl.float16))


def test_narrowing_rounds_to_nearest_even():
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3e38, 3.4e38, float("nan"), 2.0**-140])
    bf16, fp16 = torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.float16)
    emulate(rounding_kernel, (1,), x=x, bf16=bf16, fp16=fp16, N=8)
    inf = float("inf")
    assert bf16[:4].tolist() == [1, 1 + 2**-6, 1 + 2**-7, -1] and bf16[5] == inf and bf16[6].isnan()
    assert bf16[7] == 0.0 or bf16[7] == 2.0**-133 * round(2.0**-140 / 2.0**-133)
    assert fp16[4] == inf and fp16[0] == 1 + 2**-8


@gluon.jit
def types_kernel(ints, halves, out_ints, out_floats):
    a = gl.load(ints)
    b = gl.load(ints + 1)
    gl.store(out_ints, a // b)
    gl.store(out_ints + 1, a % b)
    gl.store(out_ints + 2, a * 2147483647)
    gl.store(out_ints + 3, a.to(gl.int64) * 2147483647 // 2)
    gl.store(out_ints + 4, (a < b).to(gl.int32) + (a >> 1))
    h = gl.load(halves)
    f = gl.load(halves + 1).to(gl.float32)
    gl.store(out_floats, h + 0.001)  # bf16, as h is
    gl.store(out_floats + 1, h + f * 0.001)  # fp32
    gl.store(out_floats + 2, a / b)
    gl.store(out_floats + 3, f.to(gl.int32, bitcast=True).to(gl.float32))


def test_types_are_tritons():
    ints, halves = torch.tensor([-7, 2], dtype=torch.int32), torch.ones(2, dtype=torch.bfloat16)
    out_ints, out_floats = torch.zeros(5, dtype=torch.int64), torch.zeros(4)
    emulate(types_kernel, (1,), ints=ints, halves=halves, out_ints=out_ints, out_floats=out_floats)
    wrapped = (-7 * 2147483647 + 2**31) % 2**32 - 2**31
    assert out_ints.tolist() == [-3, -1, wrapped, int(-7 * 2147483647 / 2), 1 - 4]
    torch.testing.assert_close(out_floats, torch.tensor([1.0, 1.001, -3.5, float(0x3F800000)]))


@gluon.jit
def loop_kernel(out, n):
    out += gl.program_id(0) * (n + 2)
    for i in range(n):
        gl.store(out + i.to(gl.int64), i * 2)
    for i in gl.static_range(2):
        gl.store(out + n + i, gl.num_programs(0) + 10 * i)


def test_loops_over_tensors():
    out = torch.zeros(3, 6, dtype=torch.int32)
    emulate(loop_kernel, (3, 1), out=out, n=4)
    assert out.tolist() == [[0, 2, 4, 6, 3, 13]] * 3


@gluon.jit
def larger(a, b):
    return gl.where(a > b, a, b)


@gluon.jit
def reduction_kernel(x, out, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    tile = gl.load(x + rows[:, None] * COLUMNS + columns[None, :])
    gl.static_assert(tile.type.layout == layout and gl.sum(tile, 1).type.layout == gl.SliceLayout(1, layout))
    gl.store(out + rows, gl.max(tile, 1))
    gl.store(out + ROWS + rows, gl.sum(tile, axis=1))
    gl.store(out + 2 * ROWS + rows, gl.reduce(tile, 1, larger))
    gl.store(out + 3 * ROWS + rows, gl.min(tile, 1))


def test_reductions():
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(4, 4)
    emulate(reduction_kernel, (1,), x=x, out=out, ROWS=4, COLUMNS=32)
    torch.testing.assert_close(out, torch.stack([x.amax(1), x.sum(1), x.amax(1), x.amin(1)]))


@gluon.jit
def shapes_kernel(x, out, N: gl.constexpr):
    i = gl.arange(0, N, LAYOUT)
    values = gl.load(x + i)
    powers = gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [values], gl.float32, True, 1)
    pairs = gl.join(values, powers)
    again, power = gl.split(pairs)
    gl.store(out + i, gl.fma(again, 2.0, power))
    rows = gl.reshape(values, [2, N // 2])
    gl.store(out + N + gl.arange(0, 2, LAYOUT), gl.sum(gl.permute(rows, [1, 0]), 0))
    gl.multiple_of(i * 8, 8)


@gluon.jit
def unknown_assembly_kernel(x):
    gl.store(x, gl.inline_asm_elementwise("lop3.b32 $0, $1, $1, $1, 3;", "=r,r", [gl.load(x)], gl.float32, True, 1))


@gluon.jit
def wrong_hint_kernel(n):
    gl.multiple_of(n, 8)


def test_shapes_assembly_and_hints():
    x, out = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.zeros(6)
    emulate(shapes_kernel, (1,), x=x, out=out, N=4)
    torch.testing.assert_close(out, torch.cat([2 * x + x.exp2(), x.view(2, 2).sum(1)]))
    with pytest.raises(UnsupportedByEmulator, match="lop3"):
        emulate(unknown_assembly_kernel, (1,), x=x)
    emulate(wrong_hint_kernel, (1,), n=16)
    with pytest.raises(Fault, match=r"multiple_of\(8\) is not true of 12"):
        emulate(wrong_hint_kernel, (1,), n=12)


@gluon.jit
def masked_kernel(x, out, n, N: gl.constexpr):
    i = gl.arange(0, N, LAYOUT)
    gl.store(out + i, gl.load(x + i, mask=i < n, other=7.0), mask=i < n + 1)


def test_masks_and_bounds():
    x, out = torch.arange(3.0), torch.full((5,), -1.0)
    emulate(masked_kernel, (1,), x=x, out=out, n=3, N=8)
    assert out.tolist() == [0, 1, 2, 7, -1]
    with pytest.raises(Fault, match=r"out of bounds .*loads elements 0\.\.3 of a tensor with 3"):
        emulate(masked_kernel, (1,), x=x, out=out, n=4, N=8)


@aggregate
class Counter:
    start: gl.tensor
    step: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, start, step):
        self.start = start
        self.step = gl.constexpr(step)

    @gluon.jit
    def after(self, n):
        return self.start + n * self.step


@gluon.constexpr_function
def doubled(n):
    return 2 * n


@gluon.jit
def aggregate_kernel(out, start, STEP: gl.constexpr):
    counter = Counter(start, doubled(STEP))
    gl.store(out, counter.after(3))


def test_aggregates_and_constexpr_functions():
    out = torch.zeros(1, dtype=torch.int32)
    emulate(aggregate_kernel, (1,), out=out, start=5, STEP=4)
    assert out.item() == 5 + 3 * 8


@gluon.jit
def saturating_kernel(x, out, N: gl.constexpr):
    i = gl.arange(0, N, LAYOUT)
    gl.store(out + i, gl.load(x + i).to(gl.float8e4nv).to(gl.float32))


def test_rounding_to_fp8_saturates():
    x, out = torch.tensor([448.0, 464.0, 1e9, -torch.inf, torch.nan, 17.0, 2.0**-10, 0.3]), torch.zeros(8)
    emulate(saturating_kernel, (1,), x=x, out=out, N=8)
    torch.testing.assert_close(out, torch.tensor([448, 448, 448, -448, torch.nan, 16, 0, 0.3125]), equal_nan=True)


@gluon.jit
def fp8_kernel(a, b, out, B_TRANSPOSED: gl.constexpr, DEPTH: gl.constexpr):
    """a b of a [64, K] and b [64, K] or, if it lies transposed, [K, 64]. DEPTH: of an instruction."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, DEPTH])
    a_shared = gl.allocate_shared_memory(a.dtype, a.block_type.shape, a.layout)
    b_shared = gl.allocate_shared_memory(b.dtype, b.block_type.shape, b.layout)
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=1)
    fence_async_shared()
    mbarrier.expect(landed, a.block_type.nbytes + b.block_type.nbytes)
    tma.async_copy_global_to_shared(a, [0, 0], landed, a_shared)
    tma.async_copy_global_to_shared(b, [0, 0], landed, b_shared)
    mbarrier.wait(landed, 0)
    if not B_TRANSPOSED:
        b_shared = b_shared.permute((1, 0))
    product = warpgroup_mma(a_shared, b_shared, gl.zeros((64, 64), gl.float32, layout))
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 64, gl.SliceLayout(0, layout))
    gl.store(out + (rows[:, None] * 64 + columns[None, :]), product)


def test_products_of_fp8_lie_along_the_depth():
    """As wgmma requires of both operands, in instructions of 32 bytes."""
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    out = torch.zeros(64, 64)

    def run(transposed: bool, depth: int, width: int = 64) -> None:
        layout = gl.NVMMASharedLayout.get_default_for([64, width], gl.float8e4nv)
        blocks = [TensorDescriptor.from_tensor(x, [64, width], layout) for x in (a[:, :width], b[:, :width])]
        emulate(fp8_kernel, (1,), a=blocks[0], b=blocks[1], out=out, B_TRANSPOSED=transposed, DEPTH=depth)

    run(False, 32)
    torch.testing.assert_close(out, a.float() @ b.float().T)
    with pytest.raises(Fault, match="do not lie along the depth"):
        run(True, 32)
    with pytest.raises(Fault, match="in instructions of depth 16"):
        run(False, 16)
    with pytest.raises(Fault, match=r"a product of \[64, 16\] and \[16, 64\]"):
        run(False, 32, 16)


@gluon.jit
def box_kernel(source, target, row, column, to_row, to_column, N: gl.constexpr):
    tile = gl.allocate_shared_memory(gl.float16, [N, N], source.layout)
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=1)
    fence_async_shared()
    mbarrier.expect(landed, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [row, column], landed, tile)
    mbarrier.wait(landed, 0)
    mbarrier.invalidate(landed)
    tma.async_copy_shared_to_global(target, [to_row, to_column], tile)
    tma.store_wait(0)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 3), (-3, -2), (30, 10), (-16, 0)])
@pytest.mark.parametrize("padding", ["zero", "nan"])
def test_boxes_are_filled_and_clipped_at_the_edges(row, column, padding):
    layout = gl.NVMMASharedLayout.get_default_for([16, 16], gl.float16)
    source = torch.randn(20, 24, generator=torch.Generator().manual_seed(0)).half()[:, :19]
    target = torch.full((18, 24), 9.0, dtype=torch.float16)[:, :17]
    want = torch.full((80, 80), 0.0 if padding == "zero" else float("nan"), dtype=torch.float16)
    want[20:40, 20:39] = source
    box = want[20 + row : 36 + row, 20 + column : 36 + column]
    descriptors = [TensorDescriptor.from_tensor(x, [16, 16], layout, padding) for x in (source, target)]
    emulate(box_kernel, (1,), source=descriptors[0], target=descriptors[1], row=row, column=column, to_row=4,
            to_column=-3, N=16)  # fmt: skip
    expected = torch.full((18, 17), 9.0, dtype=torch.float16)
    expected[4:, :13] = box[:14, 3:]
    torch.testing.assert_close(target, expected, equal_nan=True)


@pytest.mark.parametrize("base", [torch.zeros(1, 64).half().expand(64, 64), torch.zeros(64, 68).half()[:, 1:65]])
def test_what_tma_cannot_read_is_refused(base):
    """Expanded rows, although their stride of 0 is a multiple of 16 bytes, and a misaligned start."""
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    with pytest.raises(Fault, match="TMA cannot read strides"):
        emulate(address_kernel, (1,), x=base, row=base.stride(0), LAYOUT=layout)


@gluon.jit
def address_kernel(x, row, LAYOUT: gl.constexpr):
    tma.make_tensor_descriptor(x, [64, 64], [row, 1], [64, 64], LAYOUT)


@gluon.jit
def products_kernel(a, b, out, M: gl.constexpr, N: gl.constexpr, FROM_REGISTERS: gl.constexpr):
    """Two products in flight: the wait for the first leaves the second pending, which has an accumulator of its own."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    rows = gl.arange(0, M, gl.SliceLayout(1, layout))
    columns = gl.arange(0, N, gl.SliceLayout(0, layout))
    tile = rows[:, None] * N + columns[None, :]
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, N], gl.float16)
    a_shared = gl.allocate_shared_memory(gl.float16, [M, N], shared, gl.load(a + tile))
    b_shared = gl.allocate_shared_memory(gl.float16, [M, N], shared)
    b_shared.store(gl.load(b + tile))
    fence_async_shared()
    left = gl.convert_layout(gl.load(a + tile), operand) if FROM_REGISTERS else a_shared
    garbage = gl.full((M, N), float("nan"), gl.float32, layout)
    first = warpgroup_mma(left, b_shared, garbage, use_acc=False, is_async=True)
    ones = gl.full((M, N), 1.0, gl.float32, layout)
    second = warpgroup_mma(a_shared, b_shared.permute((1, 0)), ones, is_async=True)
    first = warpgroup_mma_wait(1, deps=(first,))
    gl.store(out + tile, first)
    second = warpgroup_mma_wait(0, deps=(second,))
    gl.store(out + M * N + tile, second)


@pytest.mark.parametrize("from_registers", [False, True])
def test_two_products_in_flight(from_registers):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).half() for _ in range(2))
    out = torch.zeros(2, 64, 64)
    emulate(products_kernel, (1,), a=a, b=b, out=out, M=64, N=64, FROM_REGISTERS=from_registers)
    torch.testing.assert_close(out, torch.stack([a.float() @ b.float(), a.float() @ b.float().T + 1]))


@gluon.jit
def device_descriptor_kernel(x, out, N: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, N], gl.float16)
    source = tma.make_tensor_descriptor(x, [N, N], [N, 1], [N, N], layout)
    target = tma.make_tensor_descriptor(out, [N, N], [N, 1], [N, N], layout)
    tile = gl.allocate_shared_memory(gl.float16, [N, N], layout)
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=1)
    fence_async_shared()
    mbarrier.expect(landed, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [0, 0], landed, tile)
    mbarrier.wait(landed, 0)
    tma.async_copy_shared_to_global(target, [0, 0], tile)
    tma.store_wait(0)


def test_descriptors_made_in_the_kernel():
    x, out = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).half(), torch.zeros(64, 64).half()
    emulate(device_descriptor_kernel, (1,), x=x, out=out, N=64)
    assert torch.equal(x, out)


@gluon.jit
def late_kernel(x, out, rounds):
    """Two loads of each round overtake each other: each barrier signals its own only."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 64, gl.SliceLayout(0, layout))
    tiles = gl.allocate_shared_memory(gl.float16, [2, 16, 64], x.layout)
    landed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(landed.index(i), count=1)
    fence_async_shared()
    for n in range(rounds):
        for i in gl.static_range(2):
            mbarrier.expect(landed.index(i), x.block_type.nbytes)
            tma.async_copy_global_to_shared(x, [n * 32 + i * 16, 0], landed.index(i), tiles.index(i))
        for i in gl.static_range(2):
            mbarrier.wait(landed.index(1 - i), n & 1)
            where = (n * 32 + (1 - i) * 16 + rows)[:, None] * 64 + columns[None, :]
            gl.store(out + where, tiles.index(1 - i).load(layout))


@pytest.mark.parametrize("seed", range(4))
def test_loads_land_in_any_order(seed):
    x, out = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).half(), torch.zeros(96, 64).half()
    layout = gl.NVMMASharedLayout.get_default_for([16, 64], gl.float16)
    emulate(late_kernel, (1,), seed=seed, x=TensorDescriptor.from_tensor(x, [16, 64], layout), out=out, rounds=3)
    assert torch.equal(x, out)


@gluon.jit
def unsupported_kernel(x):
    gl.atomic_add(x, 1)


@gluon.jit
def failing_kernel(x, N: gl.constexpr):
    gl.static_assert(N > 3, "N is too small")


def test_what_is_not_modelled_is_an_error_that_says_so():
    with pytest.raises(UnsupportedByEmulator, match="atomic_add is not modelled"):
        emulate(unsupported_kernel, (1,), x=torch.zeros(1))
    with pytest.raises(Fault, match="static_assert: N is too small"):
        emulate(failing_kernel, (1,), x=torch.zeros(1), N=3)


def test_a_launch_is_emulated_as_it_is_written():
    out = torch.zeros(3, dtype=torch.int32)
    with emulating():
        loop_kernel[lambda constants: (1,)](out, n=1, num_warps=8)
    assert out.tolist() == [0, 1, 11]
    assert "run" not in vars(type(loop_kernel))


_COMPILE = """
import pipelines, torch
from bench.compiled.ahead_of_time import GPUS, compiling_for
compiled = {}
def record(name, kernel):
    assert not isinstance(kernel, Exception), kernel
    compiled[name] = kernel.asm["ptx"]
with compiling_for(GPUS["h200"], record):
    a, b = (torch.empty(256, 256, dtype=torch.bfloat16) for _ in range(2))
    pipelines.product(a, b[:64])
    pipelines.exchange(2)
    pipelines.squares(a[:, :64])
    pipelines.unfenced(a[:64, :64])
    pipelines.totals(3)
assert "setmaxnreg" in compiled["product_kernel"] and "wgmma.mma_async" in compiled["product_kernel"]
assert "mbarrier.try_wait" in compiled["exchange_kernel"] and "cp.async.bulk.tensor" in compiled["squares_kernel"]
assert "wgmma.mma_async" in compiled["unfenced_kernel"]
"""


def test_the_kernels_of_these_tests_compile_for_hopper():
    """The compiler accepts the kernels that the emulator is tested with. In a process that does not interpret."""
    import os

    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(here), str(here.parent / "support"), *filter(None, [environment.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-c", _COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here.parent.parent)
    assert done.returncode == 0, done.stderr
