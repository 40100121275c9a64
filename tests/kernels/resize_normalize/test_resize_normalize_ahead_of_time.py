"""The resize's kernel, compiled for GPUs that are not there: no spills."""

from bench.compiled.ahead_of_time import rows_in_a_subprocess
from bench.compiled.launches import published


def test_nothing_spills_or_fails(extent, gpus):
    only = published("resize_normalize") if extent == "published" else ""
    rows = rows_in_a_subprocess("resize_normalize", *gpus, only=only)
    assert {row.kernel for row in rows} == {"resize_normalize_kernel"} and {row.gpu for row in rows} == set(gpus)
    assert not [str(row) for row in rows if row.problems()]
