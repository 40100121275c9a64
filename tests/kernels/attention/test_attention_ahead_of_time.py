"""Attention's kernels compiled without a GPU: spills, matrix instructions, widths of loads, variants."""

import re
from collections import Counter

import pytest

from bench.compiled.ahead_of_time import Row, rows_in_a_subprocess
from bench.compiled.launch import GPUS
from siglip_kernels.attention import config

KERNELS = {
    "attention_forward_kernel",
    "attention_backward_delta_kernel",
    "attention_backward_queries_kernel",
    "attention_backward_keys_kernel",
    "attention_short_forward_kernel",
    "attention_short_backward_kernel",
}
MATRIX_INSTRUCTION = {"a100": "mma", "rtx4090": "mma", "h200": "wgmma", "b200": "tcgen05", "rtx5090": "mma"}
PUBLISHED = r"^bf16 S=((729|64) D=72|1024 D=72 packed) \w+$"  # long and short, without lengths, and packed sequences
# Without twins, which `python -m bench compile` has as well: head dims 80 and 88 take the tiles and registers of 72 and
# 96 when packed, and long packed sequences in fp32 those of sequences that are not packed.
EVERY = "^(?!.* D=(80|88) packed|fp32 S=1024 D=(64|96|128) packed).*S="
# An RTX 4090 has the code of an A100, but for the tiles of these launches.
ON_ADA = r"^bf16 S=((729|1024) D=(64|72|80) |64 D=72 \w+$)"


@pytest.fixture(
    scope="module",
    params=["published", *(pytest.param(gpu, marks=pytest.mark.thorough) for gpu in MATRIX_INSTRUCTION)],
)
def compiled(request: pytest.FixtureRequest) -> str:
    """What is compiled together: "published", one model's launches for several GPUs, or every launch for this GPU."""
    return request.param


@pytest.fixture(scope="module")
def gpus(compiled: str) -> tuple[str, ...]:
    return ("a100", "h200", "b200", "rtx5090") if compiled == "published" else (compiled,)


@pytest.fixture(scope="module")
def rows(compiled: str, gpus: tuple[str, ...]) -> list[Row]:
    only = {"published": PUBLISHED, "rtx4090": ON_ADA}.get(compiled, EVERY)
    return rows_in_a_subprocess("attention", *gpus, only=only)


def test_every_configuration_compiles_without_a_spill(rows, gpus):
    assert {(row.kernel, row.gpu) for row in rows} == {(kernel, gpu) for kernel in KERNELS for gpu in gpus}
    assert not [str(row) for row in rows if row.problems()]


@pytest.mark.parametrize(("version", "queries"), [((3, 6), 64), ((3, 7), 128)])
def test_gradients_of_keys_of_64_columns_do_not_spill_with_triton_3_6(monkeypatch, version, queries):
    """Which spilled 296 bytes per thread on Hopper: `.ci/versions torch-2.11` compiles it."""
    monkeypatch.setattr(config, "_triton_version", lambda: version)
    assert config._heuristic("backward_keys", GPUS["h200"], 2, 64).queries == queries


@pytest.mark.thorough
@pytest.mark.parametrize("gpu", ["h200", "rtx5090"])
def test_what_tuning_may_choose_does_not_spill(gpu):
    rows = rows_in_a_subprocess("attention", gpu, only="candidate D=72")
    assert {row.kernel for row in rows} == {kernel for kernel in KERNELS if "short" not in kernel}
    assert not [str(row) for row in rows if row.problems()]


_TOO_LARGE = """
import torch
from bench.compiled.ahead_of_time import Launch, compile_launches
from bench.compiled.launches.attention import _forward
from siglip_kernels.attention import config
config.tile = lambda *shape: config.Tile(128, 128, 4, {stages}, {registers})
(row,) = compile_launches(iter([Launch("too large", _forward(729, 72, torch.bfloat16, False))]), "{gpu}")
print(row.problems())
"""


@pytest.mark.parametrize(
    ("tile", "problem"),
    [
        (dict(gpu="h200", stages=2, registers=168), "B of stack"),
        (dict(gpu="rtx4090", stages=4, registers=None), "B of shared memory"),
    ],
    ids=["a spill", "shared memory"],
)
def test_a_tile_too_large_is_a_problem(tile, problem, run_python):
    done = run_python(_TOO_LARGE.format(**tile))
    assert problem in done.stdout, done.stderr


def test_half_precision_uses_the_matrix_instructions_of_its_gpu(rows, gpus):
    half = [row for row in rows if row.launch[:4] in ("bf16", "fp16")]
    assert {row.gpu for row in half} == set(gpus)
    for row in half:
        instruction = MATRIX_INSTRUCTION[row.gpu]
        # Newer instructions take 64 rows or more, which a short sequence has in the backward of 96 columns.
        fits = not {"S=16", "S=32"} & set(row.launch.split()) or "S=32 D=96 packed backward" in row.launch
        assert row.matrix and all(name.startswith(instruction if fits else "mma") for name in row.matrix), str(row)


def columns(row: Row) -> set[int]:
    """The widths of wgmma's products: the n of m64n80k16."""
    return {int(name.split("n", 1)[1].split("k")[0]) for name in row.matrix}


def test_head_dim_72_costs_80_columns(rows, gpus):
    """Products are as wide as the tile's keys or queries, or 64 + 16 columns: five steps of 16 along the head, not six
    or eight. A tile with the mask precedes the loop of the first three kernels.
    """
    if "h200" not in gpus:
        pytest.skip("counts products of wgmma")
    for kernel, tokens, products_along_it, products_across_it in (
        ("attention_forward_kernel", 128, 2 * 1, 2 * 1),
        ("attention_backward_delta_kernel", 64, 2 * 2, 0),
        ("attention_backward_queries_kernel", 128, 2 * 2, 2 * 1),
        ("attention_backward_keys_kernel", 64, 2, 2),
        ("attention_short_forward_kernel", 64, 1, 1),
        ("attention_short_backward_kernel", 64, 2, 3),
    ):
        (row, *_) = [
            row
            for row in rows
            if row.gpu == "h200" and row.kernel == kernel and "bf16 " in row.launch and "D=72" in row.launch
        ]
        steps_across = tokens // 16 * products_across_it
        expected = Counter({"wgmma m64n64k16": steps_across, "wgmma m64n16k16": steps_across})
        expected[f"wgmma m64n{tokens}k16"] += 5 * products_along_it
        assert row.matrix == +expected, str(row)


TILES = {f"attention_{name}_kernel": name for name in ("forward", "backward_queries", "backward_keys")}


def blocks_of_the_loop(row: Row) -> tuple[int, int]:
    """Bytes per thread of the two blocks of columns of a tile that the loop loads; (16, 16) for short sequences.

    A block of fewer than 16 bytes per thread cannot be loaded by 16: head dim 96 has a tail of 32 rows of 32 columns
    for 256 threads.
    """
    if row.kernel not in TILES:
        return 16, 16
    tokens, head_dim = (int(n) for n in re.search(r"S=(\d+) D=(\d+)", row.launch).groups())
    element_bytes = 4 if row.launch[:4] in ("fp32", "tf32") else 2
    kernel, gpu = TILES[row.kernel], GPUS[row.gpu]
    tile = config.tile(kernel, gpu, element_bytes, head_dim, tokens, tokens, " packed " in row.launch)
    rows = tile.queries if kernel == "backward_keys" else tile.keys
    main, tail = (rows * width * element_bytes // (32 * tile.warps) for width in config.split_head_dim(head_dim))
    return main, tail


def test_accesses_are_as_wide_as_the_alignment_allows(rows):
    """Elements are never loaded one by one; what is narrower than 8 bytes is a statistic, a length or an fp32 tail.

    The kernel that makes delta exact has more statistics than others: it looks for rows among those of many tiles.
    """
    for row in rows:
        widths = {int(access.split()[1]) for access in row.accesses}
        assert 16 in widths and 2 not in widths and 1 not in widths, str(row)
        main, tail = blocks_of_the_loop(row)
        short = "_short_" in row.kernel or re.search(r"S=(16|32|64) .* packed", row.launch)  # no loop
        if not short and row.launch[:4] == "bf16":
            assert row.accesses["cp.async 16"] >= 2 * 2 * main // 16, str(row)  # two tiles, before the loop and in it
        too_small = {access for access in row.accesses if int(access.split()[1]) == tail < 16}
        narrow = sum(
            count for access, count in row.accesses.items() if int(access.split()[1]) < 16 and access not in too_small
        )
        wide = sum(count for access, count in row.accesses.items() if int(access.split()[1]) == 16)
        usual = "_delta_" not in row.kernel and "lengths" not in row.launch and "packed" not in row.launch
        if usual and "fp32" not in row.launch and "tf32" not in row.launch:
            assert wide >= 2 * narrow, str(row)


_VARIANTS = """
import torch
from bench.compiled.ahead_of_time import GPUS, compiling_for
from siglip_kernels.attention.forward import attention_forward
compiled = set()
def record(name, kernel):
    assert not isinstance(kernel, Exception), kernel
    compiled.add(kernel.hash)
with compiling_for(GPUS["h200"], record):
    for batch, tokens, heads, row in ((1, 729, 16, 72), (1, 576, 1, 72), (64, 1000, 16, {row}), (2, 1024, 16, {row})):
        packed = torch.empty(batch, tokens, 3, heads, row, dtype=torch.bfloat16, device="meta")
        attention_forward(*packed[..., :72].unbind(2), None, 72**-0.5, False)
print(len(compiled))
"""


@pytest.mark.parametrize(("row", "variants"), [(72, 1), (75, 2)])
def test_one_compilation_for_every_shape_that_aligns(run_python, row, variants):
    """Batch, length, heads and strides do not recompile a kernel; strides that do not divide by 8 are a variant."""
    done = run_python(_VARIANTS.format(row=row))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == variants
