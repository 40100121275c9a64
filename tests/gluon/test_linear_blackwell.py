"""The GEMM kernel for Blackwell, emulated: epilogues, tiles, ragged shapes, interleavings, dispatch."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from gemm_cases import SHAPES, check, check_products, gelu, gelu_derivative, operands
from hopper_emulator.faults import Fault
from hopper_emulator.launch import emulating
from torch import Tensor

from bench.compiled.ahead_of_time import GPUS
from siglip_kernels import MissingBackendError, UnsupportedInputError, linear, mlp, pre_norm_qkv, sigmoid_loss
from siglip_kernels.device import pretend
from siglip_kernels.gemm import blackwell, epilogue, ring
from siglip_kernels.gemm.kernels import gemm

# Few multiprocessors, so that each program has several tiles.
BLACKWELL = dataclasses.replace(GPUS["b200"], multiprocessors=2)
TILES = {"wide": blackwell.WIDE, "narrow": blackwell.NARROW}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """SIGLIP_KERNELS_BLACKWELL is on, and torch.empty is filled with NaN."""
    monkeypatch.setenv("SIGLIP_KERNELS_BLACKWELL", "1")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def on_blackwell(seed: int = 0, gpu=BLACKWELL):
    with pretend(gpu), emulating(seed):
        yield


@pytest.fixture
def pin(monkeypatch):
    """Pins the tile."""
    return lambda tile: monkeypatch.setattr(blackwell, "tile_for", lambda *_: TILES[tile])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES, ids=str)
def test_forward_epilogues(rows, columns, depth, tile, pin):
    pin(tile)
    dtype = torch.float16 if (rows + columns) % 3 == 0 else torch.bfloat16
    x, w, w2, w3, b, b2, residual = operands(rows, columns, depth, dtype)
    with on_blackwell(rows):
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


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES, ids=str)
def test_backward_epilogue(rows, columns, depth, tile, pin):
    """dY·W2 without a transposed copy of W2, times GELU's derivative; the recomputed activation; the bias gradient."""
    pin(tile)
    dtype = torch.float16 if (rows + columns) % 3 == 0 else torch.bfloat16
    out_grad, w, _, _, _, _, h = operands(rows, columns, depth, dtype)
    weight = w.T.contiguous().T
    options = {"gelu": "backward", "pre_activation": h, "keep_column_sums": True}
    with on_blackwell(rows):
        grad, _, activation, sums = gemm(out_grad, [weight], [None], **options, keep_activation=True)
        frozen, _, nothing, _ = gemm(out_grad, [weight], [None], **options)
    truth = (out_grad.double() @ w.double().T) * gelu_derivative(h.double())
    check(grad, truth, (out_grad @ w.T) * gelu_derivative(h))
    check(activation, gelu(h.double()), gelu(h))
    assert torch.equal(frozen, grad) and nothing is None
    assert (sums.double() - truth.sum(0)).norm() <= 1e-5 * truth.abs().sum(0).norm()


def test_a_residual_stream_in_fp32():
    x, w, _, _, b, _, residual = operands(130, 264, 136)
    with on_blackwell():
        out = gemm(x, [w], [b], residual=residual.float())[0]
    truth = x.double() @ w.double().T + b + residual
    assert out.dtype == torch.float32
    assert (out.double() - truth).norm() <= 1e-6 * truth.norm()


@pytest.mark.parametrize("depth", [64, 456])
def test_every_interleaving_gives_the_same(depth, pin):
    """Bitwise, with fewer steps along the depth than stages, and with more."""
    pin("wide")
    x, w, _, _, b, _, h = operands(300, 264, depth)

    def run(seed: int) -> list[Tensor]:
        with on_blackwell(seed):
            grad, _, activation, sums = gemm(
                x, [w], [None], gelu="backward", pre_activation=h, keep_activation=True, keep_column_sums=True
            )
            return [gemm(x, [w], [b], gelu="forward")[0], gemm(x, [w], [b], residual=h)[0], grad, activation, sums]

    first = run(100)
    for seed in range(3):
        assert all(map(torch.equal, first, run(seed)))


def test_integers_are_exact():
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randint(-3, 4, shape, generator=generator).bfloat16() for shape in ((70, 200), (72, 200), (72,)))
    with on_blackwell():
        out = gemm(x, [w], [b], residual=torch.zeros(70, 72))[0]
    assert torch.equal(out, x.float() @ w.float().T + b.float())


def test_a_nan_stays_in_its_row():
    x, w, _, _, b, _, _ = operands(130, 72, 64)
    x[3, 5] = float("nan")
    with on_blackwell():
        out = gemm(x, [w], [b], gelu="forward")[0]
    assert out[3].isnan().all() and out[torch.arange(130) != 3].isfinite().all()


def test_through_the_public_operations_with_gradients(monkeypatch):
    """linear with a residual, the MLP and the projections, against the portable kernels."""
    x, w1, _, _, b1, _, _ = operands(70, 136, 72)
    w2, b2 = w1.T.contiguous(), b1[:72].clone()
    inputs = [t.clone().requires_grad_() for t in (x, w1, b1, w2, b2)]
    out_grad = torch.randn(70, 72, generator=torch.Generator().manual_seed(3)).bfloat16()
    norm = torch.ones(72, dtype=x.dtype)
    projections = [value for weight in operands(72, 72, 72)[1:4] for value in (weight, b2)]

    def run() -> list[Tensor]:
        out = linear(mlp(*inputs), inputs[3] @ inputs[1], inputs[4], residual=inputs[0])
        q, k, v = pre_norm_qkv(out[None], norm, 0 * norm, 1e-6, *projections, num_heads=1)
        out = q[0, :, 0] + k[0, :, 0] * v[0, :, 0]
        return [out, *torch.autograd.grad(out, inputs, out_grad)]

    with on_blackwell():
        found = run()
    monkeypatch.setenv("SIGLIP_KERNELS_BLACKWELL", "0")
    for one, other in zip(found, run(), strict=True):
        assert (one.double() - other.double()).norm() <= 2**-6 * other.double().norm()


def test_chosen_only_where_asked_for_and_nothing_falls_back(monkeypatch):
    x, w, _, _, b, _, residual = operands(70, 72, 64)
    with pytest.raises(
        UnsupportedInputError, match=r"x is on interpreter; supported: data-centre Blackwell \(sm_100\)"
    ):
        linear(x, w, b, residual)
    with pretend(GPUS["rtx5090"]), pytest.raises(UnsupportedInputError, match=r"RTX 5090; supported: data-centre"):
        linear(x, w, b, residual)
    with on_blackwell():
        with pytest.raises(UnsupportedInputError, match=r"linear: x has dtype torch.float32"):
            linear(x.float(), w.float(), b.float(), residual.float())
        with pytest.raises(UnsupportedInputError, match=r"linear: in_features is 60; supported: multiples of 8"):
            linear(x[:, :60], w[:, :60], b, residual)
        assert linear(x[:0], w, b, residual[:0]).shape == (0, 72)
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "1")
    with pytest.raises(MissingBackendError, match="HOPPER and SIGLIP_KERNELS_BLACKWELL are both 1; supported: one"):
        linear(x, w, b, residual)
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "0")
    monkeypatch.setenv("SIGLIP_KERNELS_BLACKWELL", "on")
    with pytest.raises(MissingBackendError, match="SIGLIP_KERNELS_BLACKWELL is 'on'; supported: 1"):
        linear(x, w, b, residual)
    monkeypatch.delenv("SIGLIP_KERNELS_BLACKWELL")
    with pretend(BLACKWELL):  # the portable kernel: a Gluon kernel cannot run outside of the emulator
        assert linear(x, w, b, residual).isfinite().all()


def test_the_loss_stays_portable():
    """A Gluon kernel could not run outside of the emulator."""
    x = F.normalize(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    assert sigmoid_loss(x, x, torch.tensor(1.0), torch.tensor(0.0)).isfinite()


def test_tiles_follow_the_shapes_of_models():
    b200 = GPUS["b200"]

    def tile(columns: int, depth: int, parts: int = 1, dtype=torch.bfloat16, rows: int = 64 * 729):
        return blackwell.tile_for(rows, columns, depth, parts, dtype, b200)

    assert tile(4304, 1152) == tile(1152, 4304) == tile(1152, 1152, parts=3) == blackwell.WIDE
    assert tile(1152, 4304, dtype=torch.float32) == tile(1152, 1152, rows=64) == blackwell.NARROW
    assert blackwell.WIDE.stages(2, torch.bfloat16, b200.shared_memory) == 4
    assert blackwell.WIDE.stages(5, torch.bfloat16, b200.shared_memory) == 3


# What breaks a line of the ring, of the kernel or of the epilogues.
BROKEN = {
    "the producer does not wait": ("            mbarrier.wait(emptied.index(stage), (step // STAGES & 1) ^ 1)\n", ""),
    "the bytes of a are not counted": ("BLOCKS * a.block_type.nbytes + b", "b"),
    "products start before their blocks have landed": (
        "            mbarrier.wait(filled.index(stage), step // STAGES & 1)\n", ""
    ),
    "products wait for the other phase": ("filled.index(stage), step // STAGES & 1)", "filled.index(stage), 1)"),
    "stages are never handed back": (", mbarriers=[emptied.index(stage)]", ", mbarriers=[]"),
    "a stage is handed back before its products are done": (
        "            tcgen05_mma(",
        "            mbarrier.arrive(emptied.index(stage), count=1)\n            tcgen05_mma(",
    ),
    "a new tile starts on an accumulator that is being read": (
        "        mbarrier.wait(drained.index(which), (done // ACCUMULATORS & 1) ^ 1)\n", ""
    ),
    "an accumulator is handed back before it is read": (
        "mbarrier.wait(landed.index(0), done & 1)\n",
        "mbarrier.wait(landed.index(0), done & 1)\n        mbarrier.arrive(drained.index(which), count=1)\n",
    ),
    "an accumulator is never handed back": ("        mbarrier.arrive(drained.index(which), count=1)\n", ""),
    "a tile adds to the one before it": ("use_acc=k > 0", "use_acc=True"),
    "a tile is read before its products are done": (
        "        mbarrier.wait(finished.index(which), done // ACCUMULATORS & 1)\n", ""
    ),
    "a tile is announced before its products are done": (
        "        tcgen05_commit(finished.index(which))", "        mbarrier.arrive(finished.index(which), count=1)"
    ),
    "the epilogue reads the other accumulator": (
        "accumulators.index(which).slice(", "accumulators.index(1 - which).slice("
    ),
    "a result is sent without a fence": ("    fence_async_shared()\n    async_store", "    async_store"),
    "a buffer is written while it is sent": ("    if added is None:\n        tma.store_wait(pendings=1)\n", ""),
    "the turns of the buffers are mixed up at the edge": (
        "            tma.store_wait(pendings=0)\n        done += 1", "            pass\n        done += 1"
    ),
    "the last results are not waited for": ("    tma.store_wait(pendings=0)\n\n", "\n"),
    "the residual is not waited for": ("mbarrier.wait(landed.index(0), done & 1)", "pass"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_fault_in_the_kernel_is_found(broken, plant, pin):
    """Each of these compiles, and each is found by a fault or by its numbers, under every seed."""
    plant(BROKEN[broken], [ring, epilogue, blackwell], blackwell, "gemm_blackwell_kernel")
    pin("wide")
    x, w, _, _, _, _, residual = operands(700, 264, 456)
    for seed in range(2):
        with on_blackwell(seed), pytest.raises((Fault, AssertionError)):
            check_products(x, w, residual)
