"""The GEMM kernel for Hopper, emulated: epilogues, tiles, ragged shapes, interleavings, dispatch."""

import pytest
import torch
import torch.nn.functional as F
from gemm_cases import SHAPES, check, check_products, gelu, gelu_derivative, operands
from hopper_emulator.faults import Fault
from hopper_emulator.gpu import HOPPER, on_hopper
from torch import Tensor

from bench.compiled.ahead_of_time import GPUS
from siglip_kernels import MissingBackendError, UnsupportedInputError, linear, mlp, pre_norm_qkv
from siglip_kernels.device import pretend
from siglip_kernels.gemm import epilogue, hopper, hopper_pipeline, ring
from siglip_kernels.gemm.kernels import gemm

pytestmark = pytest.mark.usefixtures("hopper_selected")
TILES = {"wide": hopper.WIDE, "tall": hopper.TALL, "small": hopper.SMALL}


@pytest.fixture
def pin(monkeypatch):
    """Pins the tile."""
    return lambda tile: monkeypatch.setattr(hopper, "tile_for", lambda *_: TILES[tile])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES, ids=str)
def test_forward_epilogues(rows, columns, depth, tile, pin):
    pin(tile)
    dtype = torch.float16 if (rows + columns) % 3 == 0 else torch.bfloat16
    x, w, w2, w3, b, b2, residual = operands(rows, columns, depth, dtype)
    with on_hopper(rows):
        plain = gemm(x, [w], [None])[0]
        added = gemm(x, [w], [b], residual=residual)[0]
        activated = gemm(x, [w], [b], gelu="forward")[0]
        again, kept, _, _ = gemm(x, [w], [b], gelu="forward", keep_pre_activation=True)
        packed = gemm(x, [w, w2, w3], [b, None, b2])[0]
    product = x.double() @ w.double().T
    check(plain, product, x @ w.T)
    check(added, product + b + residual, F.linear(x, w, b) + residual)
    check(activated, gelu(product + b), gelu(F.linear(x, w, b)))
    assert torch.equal(activated, again)
    check(kept, product + b, F.linear(x, w, b))
    others = [x.double() @ w2.double().T, x.double() @ w3.double().T + b2]
    eager = torch.cat([F.linear(x, w, b), x @ w2.T, F.linear(x, w3, b2)], 1)
    check(packed, torch.cat([product + b, *others], 1), eager)


@pytest.mark.parametrize("tile", ["wide", "small"])
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES, ids=str)
def test_backward_epilogue(rows, columns, depth, tile, pin):
    """dY·W2 without a transposed copy of W2, times GELU's derivative; the recomputed activation; the bias gradient."""
    pin(tile)
    dtype = torch.float16 if (rows + columns) % 3 == 0 else torch.bfloat16
    out_grad, w, _, _, _, _, h = operands(rows, columns, depth, dtype)
    weight = w.T.contiguous().T
    options = {"gelu": "backward", "pre_activation": h, "keep_column_sums": True}
    with on_hopper(rows):
        grad, _, activation, sums = gemm(out_grad, [weight], [None], **options, keep_activation=True)
        frozen, _, nothing, _ = gemm(out_grad, [weight], [None], **options)
    truth = (out_grad.double() @ w.double().T) * gelu_derivative(h.double())
    check(grad, truth, (out_grad @ w.T) * gelu_derivative(h))
    check(activation, gelu(h.double()), gelu(h))
    assert torch.equal(frozen, grad) and nothing is None
    assert (sums.double() - truth.sum(0)).norm() <= 1e-5 * truth.abs().sum(0).norm()


def test_a_residual_stream_in_fp32():
    x, w, _, _, b, _, residual = operands(130, 264, 136)
    with on_hopper():
        out = gemm(x, [w], [b], residual=residual.float())[0]
    truth = x.double() @ w.double().T + b + residual
    assert out.dtype == torch.float32
    assert (out.double() - truth).norm() <= 1e-6 * truth.norm()


def test_a_residual_of_the_other_half_precision():
    """The result is fp32, and leaves from the buffers that the residual is loaded into."""
    x, w, _, _, b, _, residual = operands(70, 72, 136)
    with on_hopper():
        found = gemm(x, [w], [b], residual=residual.half())[0]
        wanted = gemm(x, [w], [b], residual=residual.half().float())[0]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("depth", [64, 200, 456])
def test_every_interleaving_gives_the_same(depth, pin):
    """Bitwise, with fewer steps along the depth than stages, and with more."""
    pin("wide")
    x, w, _, _, b, _, h = operands(300, 264, depth)

    def run(seed: int) -> list[Tensor]:
        with on_hopper(seed):
            grad, _, activation, sums = gemm(
                x, [w], [None], gelu="backward", pre_activation=h, keep_activation=True, keep_column_sums=True
            )
            return [gemm(x, [w], [b], gelu="forward")[0], gemm(x, [w], [b], residual=h)[0], grad, activation, sums]

    first = run(100)
    for seed in range(4):
        assert all(map(torch.equal, first, run(seed)))


def test_rows_that_lie_apart_or_nowhere_near_a_boundary():
    x, w, _, _, b, _, residual = operands(70, 72, 136)
    with on_hopper():
        want = gemm(x, [w], [b], residual=residual)[0]
        for room, start in ((160, 8), (139, 3)):  # read where they lie; copied
            apart = torch.zeros(70, room, dtype=x.dtype)[:, start : start + 136].copy_(x)
            assert torch.equal(gemm(apart, [w], [b], residual=residual)[0], want)
        crowded = torch.zeros(72, 137, dtype=x.dtype)[:, 1:].copy_(w)
        assert torch.equal(gemm(x, [crowded], [b], residual=residual)[0], want)


def test_extreme_pre_activations():
    """Like the portable kernel: finite where GELU is, NaN where an input is."""
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    bias = torch.tensor([-3e38, -1e4, -100.0, -10.0, 10.0, 100.0, 1e4, 3e38], dtype=torch.bfloat16)
    with on_hopper():
        out = gemm(x, [x[:8]], [bias], gelu="forward")[0]
        h = bias.expand(64, 8).contiguous()
        ones = torch.eye(8, dtype=torch.bfloat16).repeat(8, 1)
        grad = gemm(ones, [torch.ones(8, 8, dtype=torch.bfloat16)], [None], gelu="backward", pre_activation=h)[0]
        nan = gemm(x, [x[:8]], [bias * float("nan")], gelu="forward")[0]
    torch.testing.assert_close(out[5], torch.where(bias > 0, bias, 0.0), atol=1e-35, rtol=0)
    torch.testing.assert_close(grad[0], (bias > 0).bfloat16(), atol=1e-34, rtol=0)
    assert nan.isnan().all()


def test_integers_are_exact():
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randint(-3, 4, shape, generator=generator).bfloat16() for shape in ((70, 200), (72, 200), (72,)))
    with on_hopper():
        out = gemm(x, [w], [b], residual=torch.zeros(70, 72))[0]
    assert torch.equal(out, x.float() @ w.float().T + b.float())


def test_through_the_public_operations_with_gradients(monkeypatch):
    """linear with a residual, the MLP and the projections, against the portable kernels."""
    x, w1, _, _, b1, _, _ = operands(70, 136, 72)
    w2, b2 = w1.T.contiguous(), b1[:72].clone()
    inputs = [t.clone().requires_grad_() for t in (x, w1, b1, w2, b2)]
    out_grad = torch.randn(70, 72, generator=torch.Generator().manual_seed(3)).bfloat16()

    norm = torch.ones(72, dtype=x.dtype)
    square = operands(72, 72, 72)[1:4]
    projections = [value for weight in square for value in (weight, b2)]

    def run() -> list[Tensor]:
        out = linear(mlp(*inputs), inputs[3] @ inputs[1], inputs[4], residual=inputs[0])
        q, k, v = pre_norm_qkv(out[None], norm, 0 * norm, 1e-6, *projections, num_heads=1)
        out = q[0, :, 0] + k[0, :, 0] * v[0, :, 0]
        return [out, *torch.autograd.grad(out, inputs, out_grad)]

    with on_hopper():
        found = run()
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "0")
    for one, other in zip(found, run(), strict=True):
        assert (one.double() - other.double()).norm() <= 2**-6 * other.double().norm()


def test_chosen_only_where_asked_for_and_nothing_falls_back(monkeypatch):
    x, w, _, _, b, _, residual = operands(70, 72, 64)
    with pytest.raises(UnsupportedInputError, match=r"linear: x is on interpreter; supported: Hopper \(sm_90\)"):
        linear(x, w, b, residual)
    with on_hopper():
        with pytest.raises(UnsupportedInputError, match=r"linear: x has dtype torch.float32"):
            linear(x.float(), w.float(), b.float(), residual.float())
        with pytest.raises(UnsupportedInputError, match=r"linear: in_features is 60; supported: multiples of 8"):
            linear(x[:, :60], w[:, :60], b, residual)
        with pytest.raises(UnsupportedInputError, match=r"linear: out_features is 70"):
            linear(x, w[:70], b[:70], residual[:, :70])
        assert linear(x[:0], w, b, residual[:0]).shape == (0, 72)
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "on")
    with pytest.raises(MissingBackendError, match="SIGLIP_KERNELS_HOPPER is 'on'"):
        linear(x, w, b, residual)
    monkeypatch.delenv("SIGLIP_KERNELS_HOPPER")
    with pretend(HOPPER):  # the portable kernel: a Gluon kernel cannot run outside of the emulator
        assert linear(x, w, b, residual).isfinite().all()


def test_tiles_follow_the_shapes_of_models():
    h200 = GPUS["h200"]

    def tile(columns: int, depth: int, parts: int = 1, gelu: str = "", dtype=torch.bfloat16, rows: int = 64 * 729):
        return hopper.tile_for(rows, columns, depth, parts, gelu, 2, dtype, h200)

    assert tile(4304, 1152, gelu="forward") == hopper.WIDE
    assert tile(1152, 4304) == tile(1152, 1152, parts=3) == hopper.TALL
    assert tile(4304, 1152, gelu="backward") == hopper.WIDE
    assert tile(1152, 4304, dtype=torch.float32) == hopper.SMALL
    assert tile(1152, 1152, rows=64) == hopper.SMALL
    assert hopper.WIDE.stages(2, torch.bfloat16, h200.shared_memory) == 4
    assert hopper.WIDE.stages(5, torch.bfloat16, h200.shared_memory) == 3


# What breaks a line of the ring, of the main loop, of the kernel or of the epilogues.
BROKEN = {
    "the producer does not wait": ("            mbarrier.wait(emptied.index(stage), (step // STAGES & 1) ^ 1)\n", ""),
    "the producer waits for the other phase": ("(step // STAGES & 1) ^ 1)", "step // STAGES & 1)"),
    "half of a's bytes are counted": ("BLOCKS * a.block_type.nbytes +", "a.block_type.nbytes +"),
    "one consumer empties a stage": ("emptied.index(stage), count=READERS)", "emptied.index(stage), count=1)"),
    "a stage is handed back while it is read": ("(step + block - 1) % STAGES)", "(step + block) % STAGES)"),
    "a consumer does not wait for its block": ("    mbarrier.wait(filled.index(stage), step // STAGES & 1)\n", ""),
    "the last product is not waited for": ("num_outstanding=0, deps", "num_outstanding=1, deps"),
    "the last stage is never handed back": (
        "    mbarrier.arrive(emptied.index((step + blocks - 1) % STAGES), count=1)\n", ""
    ),
    "the first consumer never gets ahead": ("(block == LAG))", "(block == -1))"),
    "the lead is taken with one stage": ("staggered = blocks >= STAGES", "staggered = blocks >= 1"),
    "both consumers take the same rows": ("stage * CONSUMERS + consumer)\n    b =", "stage * CONSUMERS)\n    b ="),
    "a result is sent without a fence": ("    fence_async_shared()\n    async_store", "    async_store"),
    "a buffer is written while it is sent": (
        "    if added is None:\n        tma.store_wait(pendings=1)\n", ""
    ),
    "the turns of the buffers are mixed up at the edge": (
        "            tma.store_wait(pendings=0)\n        done += 1", "            pass\n        done += 1"
    ),
    "the last results are not waited for": ("    tma.store_wait(pendings=0)\n\n", "\n"),
    "the residual arrives on a result that is being sent": (
        "    tma.store_wait(pendings=0)\n    mbarrier", "    mbarrier"
    ),
    "the residual is not waited for": ("mbarrier.wait(landed.index(consumer), done & 1)", "pass"),
    "the residual's phase does not turn": ("landed.index(consumer), done & 1)", "landed.index(consumer), 0)"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_fault_in_the_kernel_is_found(broken, plant, pin):
    """Each of these compiles, and each is found by a fault or by its numbers, under every seed."""
    plant(BROKEN[broken], [ring, epilogue, hopper_pipeline, hopper], hopper, "gemm_kernel")
    pin("wide")
    x, w, _, _, _, _, residual = operands(300, 264, 456)
    for seed in range(2):
        with on_hopper(seed), pytest.raises((Fault, AssertionError)):
            check_products(x, w, residual)
            short = gemm(x[:, :64].contiguous(), [w[:, :64].contiguous()], [None])[0]
            check(short, x[:, :64].double() @ w[:, :64].double().T, x[:, :64] @ w[:, :64].T)
