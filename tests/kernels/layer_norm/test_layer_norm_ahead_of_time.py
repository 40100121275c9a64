"""Layer normalisation's kernels, compiled for GPUs that are not there: no spills, wide accesses, few variants."""

import pytest

from bench.compiled.ahead_of_time import GPUS, Row, rows_in_a_subprocess

PUBLISHED = "^bf16 46656 x (1152|9001)$|^fp32 46656 x 8192 residual$"  # the last needs the most shared memory


@pytest.fixture(scope="module")
def rows(extent: str, gpus: tuple[str, ...]) -> list[Row]:
    return rows_in_a_subprocess("layer_norm", *gpus, only=PUBLISHED if extent == "published" else "")


def test_nothing_spills_or_fails(rows, gpus):
    kernels = {
        "layer_norm_forward_kernel",
        "layer_norm_backward_kernel",
        "layer_norm_parameter_gradients_kernel",
        "wide_statistics_kernel",
        "wide_sums_kernel",
    }
    assert {(row.kernel, row.gpu) for row in rows} == {(kernel, gpu) for kernel in kernels for gpu in gpus}
    assert not [str(row) for row in rows if row.problems()]


def test_rows_are_read_and_written_many_bytes_at_a_time(rows):
    models = [row for row in rows if row.launch.split()[3] in ("768", "1024", "1152", "72", "4304", "8192", "20000")]
    for row in models:
        if row.kernel == "layer_norm_forward_kernel":
            assert "ld 16" in row.accesses and "st 16" in row.accesses and "st 2" not in row.accesses, str(row)
        if row.kernel == "layer_norm_backward_kernel":
            # A row in chunks: 8 bytes per thread of half precision, and 256 bytes of a row per warp.
            width = "8" if row.launch.split()[3] in ("768", "1024", "1152") and "fp32" not in row.launch[:4] else "16"
            # Of 99 KiB of shared memory, a row of these and of its residual's gradient would fill 96.
            no_room = row.launch == "fp32 46656 x 8192 residual" and GPUS[row.gpu].shared_memory < 100 * 1024
            load = "ld" if no_room else "cp.async"
            assert f"{load} {width}" in row.accesses and f"st {width}" in row.accesses, str(row)
            assert not {"cp.async 2", "ld 2", "st 2"} & set(row.accesses), str(row)


_COUNTED = """
from bench.compiled.launches import launches_of
from bench.compiled.row_cost import row_costs
for cost in row_costs(launches_of("layer_norm", "^bf16 46656 x 1152( residual)?$")):
    print(cost.kernel, cost.instructions)
"""


def test_instructions_leave_the_memory_its_time(run_python):
    """An H200 moves a row of the backward in as long as it issues 1,500 instructions, and one of the forward 1,000."""
    done = run_python(_COUNTED)
    counted = [line.split() for line in done.stdout.splitlines()]
    assert [kernel for kernel, _ in counted] == ["layer_norm_forward_kernel", "layer_norm_backward_kernel"] * 2, done
    for kernel, instructions in counted:
        assert 300 < float(instructions) <= (1440 if "backward" in kernel else 600)


_EVERY_SIZE = """
import torch
from bench.compiled.ahead_of_time import GPUS, compiling_for
from siglip_kernels.layer_norm.kernels import layer_norm_backward, layer_norm_forward
compiled = set()
def record(name, kernel):
    assert not isinstance(kernel, Exception), kernel
    compiled.add(kernel.hash)
for rows in (46_656, 30_000, 30_001, 2**21):
    x = torch.empty(rows, 72, dtype=torch.bfloat16, device="meta")
    with compiling_for(GPUS["h200"], record):
        _, mean, rstd = layer_norm_forward(x, x[0], x[0], 1e-6)
        layer_norm_backward(x, x, x[0], mean, rstd)
print(len(compiled))
"""


def test_one_compilation_for_many_numbers_of_rows(run_python):
    done = run_python(_EVERY_SIZE)
    assert done.stdout == "3\n", done.stdout + done.stderr
