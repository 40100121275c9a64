"""The instructions of a kernel per row, counted from machine code."""

from bench.compiled.row_cost import length_of_loop

STRAIGHT = """
        /*0000*/                   LDG.E R1, [R2] ;
        /*0010*/                   STG.E [R2], R1 ;
        /*0020*/                   EXIT ;
"""
LOOPS = """
        /*0000*/                   LDG.E R1, [R2] ;
.L_x_0:
        /*0010*/                   FADD R1, R1, R2 ;
.L_x_1:
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   STG.E [R2], R1 ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


def test_the_longest_loop_or_all_the_code():
    assert length_of_loop(STRAIGHT) == 3
    assert length_of_loop(LOOPS) == 5
