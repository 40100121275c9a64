"""Clocks counted from machine code, and the table of `python -m bench count`."""

import pytest

from bench.compiled import public
from bench.compiled.count import HEADER, SAYS, Count, best, counts, markdown
from bench.compiled.row_cost import row_instructions
from bench.compiled.sass import (
    RATES,
    fill_clocks,
    inner_loops,
    measure,
    multiply_adds,
    shared_clocks,
    specialised_loops,
    tcgen05_shape,
)

AMPERE = """
.L_x_1:
        /*0000*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/                   HMMA.16816.F32.BF16 R28, R40, R216, RZ ;
        /*0030*/                   FFMA R1, R1, R2, R3 ;
        /*0040*/                   MUFU.EX2 R1, R1 ;
        /*0050*/                   FMNMX R1, R1, R2, PT ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R0+0x4000], [R14.64], !P0 ;
        /*0070*/               @P0 CALL.REL.NOINC `(.L_x_2) ;
        /*0080*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   EXIT ;
"""


def test_clocks_by_pipe_on_ampere():
    """The loop ends with a conditional exit and an unconditional branch."""
    (loop,) = inner_loops(AMPERE)
    counted = measure("launch", "kernel", loop, RATES[8, 0])
    assert counted.clocks == dict(tensor=8, shared=32, mufu=8, fma=2, alu=2, lsu=8, issue=9)
    assert (counted.multiply_adds, counted.bound) == (2048, "shared")


def test_a_loop_that_a_uniform_predicate_closes():
    (loop,) = inner_loops(AMPERE.replace("BRA `(.L_x_1)", "BRA.U !UP0, `(.L_x_1)").replace("@P0 CALL.REL.NOINC", "NOP"))
    assert len(loop) == 9


@pytest.mark.parametrize(
    ("line", "clocks"),
    [
        ("LDS R1, [R2]", 4),
        ("LDS.64 R2, [R2]", 8),
        ("STS.128 [R2], R4", 16),
        ("LDSM.16.MT88.2 R4, [R2]", 8),
        ("STSM.16.M88.4 [R2], R4", 16),
        ("LDGSTS.E [R2], [R4.64]", 4),
        ("LDG.E.128 R4, [R2.64]", 0),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0", 48),
        ("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR16], R24, gsb0", 32),
        ("UTCHMMA.128x256x16 gdesc[UR16], gdesc[UR18], tmem[UR34], tmem[UR20], idesc[UR21], UP1", 96),
        ("UTCHMMA.128x64x16 tmem[UR16], gdesc[UR18], tmem[UR34], tmem[UR20], idesc[UR21], UP1", 16),
    ],
)
def test_clocks_of_shared_memory(line, clocks):
    assert shared_clocks(line) == clocks


BLACKWELL = """
        /*0000*/                   UMOV UR21, 0x8400490 ;
.L_x_1:
        /*0010*/                   UTCHMMA gdesc[UR16], gdesc[UR18], tmem[UR34], tmem[UR20], idesc[UR21], UP1 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   UMOV UR21, 0x8050910 ;
.L_x_2:
        /*0040*/                   LDTM.x64 R4, tmem[UR9] ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
"""


def test_clocks_of_a_tcgen05_that_all_warps_share():
    """128 × 256 × 16 multiply-adds at 4096 per clock and multiprocessor, whichever warp issues them."""
    (loop,) = inner_loops(BLACKWELL)
    for warps in (4, 8):
        counted = measure("launch", "kernel", loop, RATES[10, 0], warps=warps)
        assert counted.clocks["tensor"] * warps / 4 == 128 and counted.clocks["issue"] == 2
        assert counted.multiply_adds == multiply_adds("UTCHMMA.128x256x16", warps) == 128 * 256 * 16 / warps
    assert [len(each) for each in specialised_loops(BLACKWELL)] == [2, 3]


@pytest.mark.parametrize(
    ("descriptor", "shape"),
    [(0x8400490, "128x256x16"), (0x8050490, "128x16x16"), (0x4200010, "64x128x16"), (0x8200910, "128x128x8.TF32")],
)
def test_the_shape_of_a_tcgen05_is_in_its_descriptor(descriptor, shape):
    assert tcgen05_shape(descriptor) == shape


SPECIALISED = """
    ttg.warp_specialize(%q)
    partition0(%q) num_warps(1) {
      %0:2 = scf.for %tile = %a to %b step %c -> (i32, i32)  : i32 {
        ttng.barrier_expect %full, 8192, %true : !ttg.memdesc<1xi64, #shared>
        %1 = scf.for %row = %a to %b step %c -> (i32)  : i32 {
          ttng.barrier_expect %k_full, 2048, %true : !ttg.memdesc<1xi64, #shared>
          scf.if %tail {
            ttng.barrier_expect %v_full, 512, %true : !ttg.memdesc<1xi64, #shared>
          }
          scf.yield %2 : i32
        }
        ttng.barrier_expect %next, 4096, %true : !ttg.memdesc<1xi64, #shared>
      }
"""


def test_clocks_of_what_another_warp_loads():
    """In the innermost loop, for two loops together: not what a tile loads once, nor what the same warp loads."""
    assert fill_clocks(SPECIALISED, 2) == (2048 + 512) / 128 / 2
    assert fill_clocks(SPECIALISED.replace("ttg.warp_specialize", ""), 2) == 0
    (loop,) = inner_loops(AMPERE)
    assert measure("launch", "kernel", loop, RATES[8, 0], 10).clocks["shared"] == 42


def count(busiest: float, issue: float, stack_bytes: int = 0) -> Count:
    clocks = dict(tensor=busiest, shared=0.0, mufu=0.0, fma=0.0, alu=0.0, lsu=0.0, issue=issue)
    return Count("attention", "S=1 forward", "a100", "kernel", "loop 1", 255, stack_bytes, clocks, 1000)


def test_the_best_of_several_tiles():
    assert best([count(5, 1), count(4, 3), count(4, 2), count(3, 1, stack_bytes=24)]) == count(4, 2)


def test_the_page_says_that_nothing_was_measured():
    page = markdown([count(4, 2)])
    assert SAYS in page and "not measured" in SAYS
    cells = dict(zip(HEADER, page.splitlines()[-1].strip("| ").split(" | "), strict=False))
    assert (cells["arch"], cells["bound"], cells["of peak"], cells["busiest"]) == ("sm_80", "tensor", "100%", "4.00")


def test_a_package_that_is_not_installed_has_a_row_that_says_how(monkeypatch):
    for name, (package, _) in public.PUBLIC.items():
        monkeypatch.setitem(public.PUBLIC, name, public.Public(package, lambda: iter([__import__("not_installed")])))
        (row,) = counts([name], ["h200"])
        assert row.cells()[:3] == ["sm_90", name, f"missing: pip install {package}"]
        assert not any(row.cells()[3:]) and len(row.cells()) == len(HEADER)
        assert f"| {name} | missing: pip install {package} |" in markdown([row])


def test_a_module_whose_package_cannot_be_imported(tmp_path, monkeypatch):
    """As without a GPU, for which it asks. A package that is absent is an ImportError."""
    (tmp_path / "asks_for_a_gpu").mkdir()
    (tmp_path / "asks_for_a_gpu" / "__init__.py").write_text("raise AssertionError")
    (tmp_path / "asks_for_a_gpu" / "kernels.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    assert public._without_its_package("asks_for_a_gpu", "kernels").answer == 42
    with pytest.raises(ImportError, match="no package not_installed"):
        public._without_its_package("not_installed", "kernels")


ROW_BY_ROW = """
        /*0000*/                   LDG.E R1, [R2] ;
.L_x_1:
        /*0010*/                   FFMA R1, R1, R2, R3 ;
        /*0020*/                   SHFL.BFLY PT, R1, R1, 0x10, 0x1f ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   STG.E [R2], R1 ;
        /*0050*/                   EXIT ;
"""


def test_rows_of_a_loop_and_of_a_kernel_without_one():
    names = [
        [line.split()[0].split(".")[0] for line in row_instructions(code)]
        for code in (ROW_BY_ROW, ROW_BY_ROW.replace("@P1 BRA `(.L_x_1)", "NOP"))
    ]
    assert names == [["FFMA", "SHFL", "BRA"], ["LDG", "FFMA", "SHFL", "NOP", "STG", "EXIT"]]
