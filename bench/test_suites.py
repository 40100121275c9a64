"""The suites under pytest-benchmark, whose `--benchmark-compare` finds regressions.

    pytest bench/ --benchmark-autosave
    pytest bench/ --benchmark-compare --benchmark-compare-fail=median:10%

On a GPU the shapes of a quick run; on a CPU small ones, without Triton. A contender with wrong results fails.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.cases import shapes
from bench.cases.operations import DTYPES, OPERATIONS, Setting
from bench.cases.suites import SUITES
from bench.environment import device
from bench.measure.accuracy import Judge
from bench.measure.measure import free, step_of
from bench.measure.run import Request, label
from bench.peers import Missing, Peer, Unsupported, peers_of

ON_A_CPU = {
    "attention": ("attention", shapes.AttentionShape("base-224-b1", 1, 196, 12, 64)),
    "linear": ("linear", shapes.LinearShape("base-224-out-b1", 196, 768, 768, True)),
    "mlp": ("mlp", shapes.MLPShape("base-224-b1", 196, 768, 3072)),
    "layer_norm": ("layer_norm", shapes.NormShape("base-224-b1", 196, 768)),
    "pool": ("attention_pool", shapes.PoolShape("base-224-b1", 1, 196, 768, 12)),
    "patch": ("patch_embed", shapes.PatchShape("base-224-b1", 1, 224, 16, 768)),
    "loss": ("sigmoid_loss", shapes.LossShape("n1024-d256", 1024, 256)),
    "losses": ("siglip_plus_loss", shapes.LossShape("n512x2-d256", 512, 256, captions=2)),
    "model": ("vision_tower", shapes.ModelShape("base-224-b1-l1", "base-224", 1, 1)),
    "train": ("training_step", shapes.TrainShape("base-224-b2-l1", "base-224", 2, 1)),
}


def _settings() -> list[tuple[str, Setting]]:
    if device() == "cuda":
        return list(dict.fromkeys(Request(list(SUITES), quick=True).settings()))  # once each
    return [
        (suite, Setting(OPERATIONS[operation], shape, DTYPES["fp32"], "cpu", direction))
        for suite, (operation, shape) in ON_A_CPU.items()
        for direction in OPERATIONS[operation].directions
    ]


CASES = [
    pytest.param(suite, setting, entry, id=f"{label(suite, setting)} {entry.name}".replace(" ", "-"))
    for suite, setting in _settings()
    for entry in peers_of(setting.operation.name).values()
    if not entry.slow and entry.runs_on(setting.device)
]


@pytest.mark.parametrize(("suite", "setting", "entry"), CASES)
def test_speed(benchmark: Callable, suite: str, setting: Setting, entry: Peer) -> None:
    try:
        inputs = setting.inputs()
        contender = entry.prepare(setting)
        verdict = Judge(setting, inputs).judge(entry, contender)
        assert not verdict.problem, verdict.problem
        step = step_of(contender, inputs, setting)
        step()
    except (Missing, Unsupported, NotImplementedError, torch.OutOfMemoryError) as error:
        pytest.skip(str(error))

    def wait_for_step() -> None:
        step()
        if setting.device == "cuda":
            torch.cuda.synchronize()

    wait_for_step()
    benchmark.group = label(suite, setting)  # type: ignore[attr-defined]
    benchmark.extra_info["error_vs_fp64"] = verdict.error  # type: ignore[attr-defined]
    benchmark(wait_for_step)
    free()
