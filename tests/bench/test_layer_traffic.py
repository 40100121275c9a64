"""The traffic of an encoder layer, calculated from what its operators launch."""

import json
from collections import Counter

import pytest
import torch

from bench import layer_traffic
from bench.cases.shapes import MODELS
from bench.layer_traffic import recording, total, transfers

pytest.importorskip("triton")


def tensor(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def moved(recorder: layer_traffic.Recorder) -> list[tuple[str, int, int]]:
    return [(one.name, one.read, one.written) for one in recorder.transfers]


def test_operations_of_pytorch_read_their_inputs_and_write_their_results_once():
    x, row = tensor(10, 20), tensor(20)
    with recording() as recorder:
        _ = x @ x.T  # the same storage as two matrices
        _ = x + row.expand(10, 20)
        x.add_(row)
        _ = torch.empty_like(x).view(20, 10).unbind(1)
        _ = x.new_zeros(5)
    assert moved(recorder) == [("mm", 2 * 400, 200), ("add", 440, 400), ("add_", 440, 400), ("new_zeros", 0, 10)]


def test_kernels_write_what_nothing_was_written_to():
    from siglip_kernels.layer_norm.kernels import layer_norm_backward, layer_norm_forward

    x, parameter = tensor(64, 48), tensor(48)
    with recording() as recorder:
        y, mean, rstd = layer_norm_forward(x, parameter, parameter, 1e-6)
        layer_norm_backward(y, x, parameter, mean, rstd)
    matrix, statistics = 64 * 48 * 2, 2 * 64 * 4
    partials = recorder.transfers[2].read
    assert partials > 0 and partials % (2 * 48 * 4) == 0
    assert moved(recorder) == [
        ("layer_norm_forward_kernel", matrix + 96, matrix + statistics),
        ("layer_norm_backward_kernel", 2 * matrix + 96 + statistics, matrix + partials),
        ("layer_norm_parameter_gradients_kernel", partials, 2 * 96),
    ]


def test_parts_of_one_buffer_are_written_one_by_one():
    from siglip_kernels.gemm.kernels import gemm

    x, weight = tensor(64, 48), tensor(48, 48)
    with recording() as recorder:
        packed = gemm(x, [weight, weight, weight], [None] * 3)[0]
        _ = packed.sum(0)
    matrix = 64 * 48 * 2
    assert moved(recorder)[-2:] == [("gemm_kernel", matrix + 48 * 48 * 2, 3 * matrix), ("sum", 3 * matrix, 3 * 96)]


def test_a_layer_grows_with_the_batch_and_names_its_operators():
    tower = MODELS["so400m-384"].vision
    one, two = (transfers(tower, batch) for batch in (16, 32))
    for direction in ("forward", "backward"):
        assert 1.9 < total(two, direction) / total(one, direction) < 2.0  # weights do not grow
    operators = Counter(transfer.operator for transfer in two)
    assert operators["pre_norm_mlp"] == 3 and operators["pre_norm_mlp_backward"] > 3


def test_training_a_layer_of_so400m_stays_within_its_traffic():
    """Each gradient of a half's result is read by two GEMMs and once more, where it is added to that of x."""
    found = transfers(MODELS["so400m-384"].vision, 64)
    assert total(found, "forward") <= 3.2e9
    assert total(found, "backward") <= 7.0e9
    assert {one.name for one in found if one.operator == "autograd"} == {"cat"}  # of weights
    marked = [one for one in found if one.perhaps]
    assert [one.name for one in marked] == ["attention_backward_delta_kernel"]
    assert marked[0].read + marked[0].written < 0.01e9 < marked[0].perhaps < 0.6e9


def test_the_command_prints_the_rows_and_their_sums(monkeypatch, capsys):
    command = ["layer_traffic", "--model", "base-224", "--batch", "8"]
    monkeypatch.setattr("sys.argv", [*command, "--json"])
    assert layer_traffic.main() == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    monkeypatch.setattr("sys.argv", command)
    assert layer_traffic.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 3
    backward = sum(row["read"] + row["written"] for row in rows if row["direction"] == "backward")
    assert lines[-1].split() == ["backward", "total", f"{backward / 1e9:.3f}"]
