"""The cost of a tile outside its main loop, counted from machine code."""

import pytest

from bench.compiled.sass import measure
from bench.compiled.tile_cost import epilogues, main_loops

PERSISTENT = """
.L_x_0:
        /*0000*/                   FADD R1, R1, R2 ;
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R2 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/               @P2 BRA `(.L_x_3) ;
        /*0070*/                   ISETP.GE.AND P3, PT, R4, R5, PT ;
        /*0080*/                   MUFU.EX2 R1, R2 ;
        /*0090*/                   STG.E [R2], R1 ;
        /*00a0*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*00b0*/               @P4 BRA `(.L_x_4) ;
        /*00c0*/                   MUFU.EX2 R1, R2 ;
        /*00d0*/                   STG.E [R2], R1 ;
.L_x_4:
        /*00e0*/              @!P5 BRA `(.L_x_0) ;
        /*00f0*/                   EXIT ;
"""


def test_the_shortest_path_with_all_the_work():
    """Neither the skipped tile, nor the one at the edge, nor a repeated wait."""
    (path,) = epilogues(PERSISTENT)
    assert [line.split()[0].split(".")[0] for line in path] == [
        "BRA", "BRA", "MUFU", "STG", "BRA", "FADD", "HGMMA", "SYNCS", "BRA",
    ]  # fmt: skip
    clocks = measure("launch", "kernel", path).clocks
    assert (clocks["tensor"], clocks["mufu"], clocks["lsu"], clocks["issue"]) == (128, 8, 8, 9)


ONE_LOOP = """
.L_x_0:
        /*0000*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   MUFU.EX2 R1, R2 ;
        /*0030*/                   UTMASTG.2D [UR8], [UR6] ;
.L_x_1:
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


@pytest.mark.parametrize("branch", ["@!P0 BRA `(.L_x_1)", "BRA.U !UP0, `(.L_x_1)"])
def test_one_loop_of_tiles_and_blocks(branch):
    """The branch around the epilogue may have a uniform predicate among its operands."""
    code = ONE_LOOP.replace("@!P0 BRA `(.L_x_1)", branch)
    (path,) = epilogues(code)
    assert [line.split()[0] for line in path] == ["MUFU.EX2", "UTMASTG.2D"]
    (loop,) = main_loops(code)
    assert [line.split()[0].split(".")[0] for line in loop] == ["HGMMA", "BRA", "IADD3", "BRA"]


def test_a_main_loop_of_its_own_is_all_of_it():
    (loop,) = main_loops(PERSISTENT)
    assert [line.split()[0].split(".")[0] for line in loop] == ["HGMMA", "BRA"]


def test_a_kernel_of_one_tile_ends():
    (path,) = epilogues(PERSISTENT.replace("@!P5 BRA `(.L_x_0)", "NOP"))
    assert [line.split()[0].split(".")[0] for line in path] == ["BRA", "BRA", "MUFU", "STG", "NOP", "EXIT"]
