"""The GEMM kernel for Hopper with operands of fp8, emulated: scales, epilogues, edges, interleavings, dispatch."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gemm_cases import check
from hopper_emulator.faults import Fault
from hopper_emulator.gpu import HOPPER, on_hopper
from torch import Tensor

from bench.compiled.ahead_of_time import GPUS
from siglip_kernels import UnsupportedInputError, fp8
from siglip_kernels.device import pretend
from siglip_kernels.fp8 import reference
from siglip_kernels.fp8.reference import Projection
from siglip_kernels.gemm import epilogue, hopper, hopper_pipeline, ring
from siglip_kernels.gemm.kernels import Scales, gemm

pytestmark = pytest.mark.usefixtures("hopper_selected")
TILES = {"wide": hopper.WIDE, "tall": hopper.TALL, "small": hopper.SMALL}
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def pin(monkeypatch):
    """Pins the tile."""
    return lambda tile: monkeypatch.setattr(hopper, "tile_for", lambda *_: TILES[tile])


@dataclasses.dataclass
class Case:
    """A product of quantised rows, and what it is exactly."""

    values: Tensor
    scales: Tensor
    projection: Projection
    residual: Tensor  # bf16

    @classmethod
    def of(cls, rows: int, columns: int, depth: int, with_bias: bool = True) -> "Case":
        generator = torch.Generator().manual_seed(rows + columns + depth)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        sizes = 2 ** random(rows, 1)  # no two rows have the same scale
        values, scales = reference.quantise(random(rows, depth) * sizes)
        weight = random(columns, depth) * depth**-0.5 * 2 ** random(columns, 1)
        bias = random(columns).bfloat16() if with_bias else None
        residual = random(rows, columns).bfloat16()
        return cls(values, scales, reference.quantise_projection(weight, bias), residual)

    @property
    def truth(self) -> Tensor:
        """fp64."""
        a, w = self.values.double() * self.scales[:, None], self.projection.values.double()
        bias = 0 if self.projection.bias is None else self.projection.bias.double()
        return a @ (w * self.projection.scales[:, None]).T + bias

    def gemm(self, out_scales: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Tensor:
        scales = Scales(self.scales, self.projection.scales, out_scales)
        return gemm(
            self.values, [self.projection.values], [self.projection.bias], scales=scales, out_dtype=dtype, **options
        )[0]

    def check(self, residual_dtype: torch.dtype = torch.bfloat16) -> None:
        """Without a residual, and with one; results are in the residual's dtype."""
        check(self.gemm(), self.truth, self.truth.bfloat16())
        residual = self.residual.to(residual_dtype)
        found = self.gemm(residual=residual, dtype=residual_dtype)
        eager = reference.product(self.values, self.scales, self.projection) + residual.float()
        check(found, self.truth + residual.double(), eager.to(residual_dtype))

    def check_gelu(self) -> None:
        """Within a rounding to fp8: a half of the last of its bits, or of the last below the smallest normal number."""
        hidden = F.gelu(self.truth, approximate="tanh")
        out_scales = (hidden.abs().amax(-1) * 30 / 448).float()  # about as far from a row's maximum as the bound
        found = self.gemm(out_scales, E4M3, gelu="forward")
        error = (found.double() * out_scales[:, None] - hidden).abs()
        assert (error <= hidden.abs() * (1 / 16 + 1e-3) + out_scales[:, None] * 2**-10 * 1.01).all()


SHAPES = [(1, 16, 16), (63, 80, 128), (65, 272, 144), (130, 528, 656), (300, 144, 400)]  # rows, columns, depth


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epilogues(shape, tile, pin):
    pin(tile)
    for with_bias in (True, False):
        case = Case.of(*shape, with_bias=with_bias)
        with on_hopper(shape[0]):
            case.check()
            case.check_gelu()


@pytest.mark.parametrize("depth", [768, 1152, 3072, 4304])
def test_depths_of_published_models(depth):
    """4304 is no multiple of a block's 128."""
    case = Case.of(70, 272, depth)
    with on_hopper():
        case.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_residual_stream_in_another_dtype(dtype):
    with on_hopper():
        Case.of(130, 264, 144).check(dtype)


def test_a_residual_that_is_narrower_than_the_result():
    """fp16 rows under autocast to bf16: the result is fp32."""
    case = Case.of(70, 136, 144)
    with on_hopper():
        found = case.gemm(residual=case.residual.half(), dtype=torch.float32)
    assert (found.double() - case.truth - case.residual.half().double()).norm() <= 1e-6 * case.truth.norm()


def test_gelu_saturates_and_keeps_nan():
    case = Case.of(70, 144, 144)
    tiny = torch.full((70,), 1e-6)
    hidden = F.gelu(case.truth, approximate="tanh")
    with on_hopper():
        found = case.gemm(tiny, E4M3, gelu="forward").float()
        assert (found[hidden > 1e-3] == 448).all() and (found[hidden < -1e-3] == -448).all()
        case.scales[3] = torch.nan
        found = case.gemm(tiny, E4M3, gelu="forward").float()
    assert found[3].isnan().all() and found[:3].isfinite().all() and found[4:].isfinite().all()


def test_integers_are_exact():
    generator = torch.Generator().manual_seed(0)
    values, weight, bias = (torch.randint(-3, 4, shape, generator=generator) for shape in ((70, 208), (80, 208), (80,)))
    of_rows, of_columns = (2.0 ** torch.randint(-3, 4, (n,), generator=generator) for n in (70, 80))
    projection = Projection(weight.to(E4M3), of_columns, bias.bfloat16(), torch.zeros(2))
    case = Case(values.to(E4M3), of_rows, projection, torch.zeros(70, 80).bfloat16())
    with on_hopper():
        found = case.gemm(residual=torch.zeros(70, 80), dtype=torch.float32)
    assert torch.equal(found.double(), case.truth)


@pytest.mark.parametrize("depth", [128, 400, 912])
def test_every_interleaving_gives_the_same(depth, pin):
    """Bitwise, with fewer steps along the depth than stages, and with more."""
    pin("wide")
    case = Case.of(300, 272, depth)
    out_scales = torch.ones(300)

    def run(seed: int) -> list[Tensor]:
        with on_hopper(seed):
            to_fp8 = case.gemm(out_scales, E4M3, gelu="forward")
            return [to_fp8.float(), case.gemm(residual=case.residual)]

    first = run(100)
    for seed in range(4):
        assert all(map(torch.equal, first, run(seed)))


def test_through_the_public_operations(monkeypatch):
    """The layers of an encoder, beside the portable kernels."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])).bfloat16()

    width, hidden = 48, 80
    x, norm = random(2, 19, width) * 4, (random(width) + 1, random(width), 1e-6)
    projections = [value for _ in range(4) for value in (random(width, width), random(width))]
    fcs = (random(hidden, width), random(hidden), random(width, hidden), random(width))

    def run() -> tuple[Tensor, ...]:
        attended = fp8.pre_norm_attention(x, *norm, *projections, num_heads=6)
        q, k, v = fp8.pre_norm_qkv(x, *norm, *projections[:6], num_heads=6)
        return attended, fp8.pre_norm_mlp(attended, *norm, *fcs), fp8.mlp(x, *fcs), q, k, v

    with on_hopper():
        found = run()
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "0")
    for one, other in zip(found, run(), strict=True):
        # Another last bit of bf16 may round to another number of fp8.
        assert (one.double() - other.double()).norm() <= 2**-6 * other.double().norm()


def test_chosen_only_where_asked_for_and_nothing_falls_back(monkeypatch):
    case = Case.of(70, 80, 144)

    def cut(rows: int, columns: int) -> Case:
        projection = case.projection._replace(
            values=case.projection.values[:columns], scales=case.projection.scales[:columns]
        )
        return Case(case.values[:rows], case.scales[:rows], projection._replace(bias=None), case.residual)

    with pytest.raises(UnsupportedInputError, match=r"linear: x is on interpreter; supported: Hopper \(sm_90\)"):
        case.gemm()
    with on_hopper():
        narrow = cut(70, 72)
        check(narrow.gemm(), narrow.truth, narrow.truth.bfloat16())  # bf16 needs multiples of 8, fp8 of 16
        with pytest.raises(UnsupportedInputError, match=r"linear: out_features is 72; supported: multiples of 16 with"):
            narrow.gemm(torch.ones(70), E4M3, gelu="forward")
        with pytest.raises(UnsupportedInputError, match=r"linear: in_features is 136; supported: multiples of 16 with"):
            short = case.projection._replace(values=case.projection.values[:, :136])
            Case(case.values[:, :136], case.scales, short, case.residual).gemm()
        with pytest.raises(
            UnsupportedInputError, match=r"linear: weight is a transposed view of fp8; supported: contig"
        ):
            turned = case.projection._replace(values=case.projection.values.T.contiguous().T)
            Case(case.values, case.scales, turned, case.residual).gemm()
        assert cut(0, 80).gemm().shape == (0, 80)
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "0")
    with pretend(HOPPER):  # the portable kernel: a Gluon kernel cannot run outside of the emulator
        check(case.gemm(), case.truth, case.truth.bfloat16())
        monkeypatch.setenv("SIGLIP_KERNELS_BLACKWELL", "1")  # whose own kernel has no fp8
        check(case.gemm(), case.truth, case.truth.bfloat16())


def test_tiles_follow_the_shapes_of_models():
    h200 = GPUS["h200"]

    def tile(columns: int, depth: int, gelu: str = "", dtype: torch.dtype = torch.bfloat16, rows: int = 64 * 729):
        return hopper.tile_for(rows, columns, depth, 1, gelu, 1, dtype, h200)

    assert tile(4304, 1152, "forward", E4M3) == hopper.WIDE
    assert tile(1152, 4304) == tile(3456, 1152) == hopper.TALL
    assert tile(1152, 4304, dtype=torch.float32) == hopper.SMALL
    assert hopper.WIDE.stages(2, E4M3, h200.shared_memory) == 4


# What breaks a line that only operands of fp8 need.
BROKEN = {
    "all rows have the scales of the first": ("o_rows = first_row + gl.arange", "o_rows = gl.arange"),
    "columns have the scales of the first": ("(column_scales + columns,", "(column_scales + columns - column,"),
    "columns are not scaled": ("* of_columns[None, :]", ""),
    "the bias is left out": ("    if bias is not None:\n        value +=", "    if False:\n        value +="),
    "scales of rows beyond the last are read": (
        "(row_scales + o_rows, mask=o_rows < rows", "(row_scales + o_rows, mask=o_rows >= 0"
    ),
    "gelu's result has another scale": ("half_scales = 0.5 /", "half_scales = 0.52 /"),
    "gelu is another": ("_ROOT_CUBIC = gl.constexpr(0.797", "_ROOT_CUBIC = gl.constexpr(0.497"),
    "blocks are loaded at the steps of bf16": ("range(0, depth, BLOCK_DEPTH)", "range(0, depth, BLOCK_K)"),
    "blocks are counted as those of bf16": ("gl.cdiv(depth, BLOCK_DEPTH)", "gl.cdiv(depth, 64)"),
    "instructions have the depth of bf16": ("return 256 // dtype.primitive_bitwidth", "return 16"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_fault_in_the_kernel_is_found(broken, plant, pin):
    plant(BROKEN[broken], [ring, epilogue, hopper_pipeline, hopper], hopper, "gemm_kernel")
    pin("wide")
    case = Case.of(300, 272, 912)
    with on_hopper(), pytest.raises((Fault, AssertionError)):
        case.check()
        case.check_gelu()
