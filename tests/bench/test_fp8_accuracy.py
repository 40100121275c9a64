"""The noise of operations in fp8 beside torchao's: a table of all cases, and a verdict."""

import pytest
import torch
import typer

from bench import fp8_accuracy
from bench.cases.fp8 import DEFINITIONS
from bench.cases.operations import OPERATIONS, Contender, Setting
from bench.environment import device
from bench.fp8_accuracy import INPUTS, Noise, draw, measure, shapes
from siglip_kernels import reference
from siglip_kernels.device import interpreting

RUNS = pytest.mark.skipif(device() == "cpu" and not interpreting(), reason="needs a GPU or the interpreter")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fp8_accuracy, "TOWERS", {"tiny": (48, 80, 2)})


def setting(operation: str) -> Setting:
    return Setting(OPERATIONS[operation], shapes("tiny", 16)[operation], torch.bfloat16, device(), "fwd")


@RUNS
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("operation", list(DEFINITIONS))
def test_the_kernels_have_the_noise_of_torchaos_formula(operation, kind):
    found = measure(setting(operation), kind, ("triton", "scaled_mm", "bf16"))
    ours, formula, bf16 = found.decibels.values()
    assert 24 < ours < bf16 - 5 and abs(ours - formula) < 1.5  # few elements: one more or less of noise in several


def test_torchao_has_the_noise_of_its_formula():
    pytest.importorskip("torchao")
    found = measure(setting("fp8_pre_norm_attention"), "outlier", ("torchao:float8", "scaled_mm")).decibels
    assert found["torchao:float8"] == pytest.approx(found["scaled_mm"], abs=1)


def test_what_is_added_is_no_signal(monkeypatch):
    """A contender whose products are a tenth too large has 20 dB, whatever the residual is."""

    def wrong(x, eps, **weights):
        return x + 1.1 * (reference.pre_norm_mlp(x=x, eps=eps, **weights) - x)

    of = setting("fp8_pre_norm_mlp")
    monkeypatch.setattr(fp8_accuracy, "_prepare", lambda *_: Contender(wrong))
    assert measure(of, "normal", ("triton",)).decibels["triton"] == pytest.approx(20, abs=0.1)
    found = measure(of, "outlier", ("triton",)).decibels["triton"]
    assert found == pytest.approx(20, abs=0.1)


def test_inputs():
    of = setting("fp8_mlp")
    usual, outlier, saturating = (draw(of, kind).tensors for kind in INPUTS)
    assert torch.equal(outlier["x"][:, 7], usual["x"][:, 7] * 1000) and torch.equal(
        outlier["x"][:, 8], usual["x"][:, 8]
    )
    torch.testing.assert_close(saturating["x"][2], 100 * usual["fc1_weight"][1])
    assert not torch.equal(saturating["x"][1], 100 * usual["fc1_weight"][0]) and "residual" not in usual


@pytest.mark.parametrize(("torchao", "status"), [(25.4, 0), (25.6, 1), ("not measured: pip install torchao", 0)])
def test_the_command(torchao, status, monkeypatch, tmp_path):
    found = {"triton": 25.0, "torchao:float8": torchao, "scaled_mm": 25.2, "bf16": 50.0}
    noise = Noise("fp8_mlp", "tiny", "normal", found)
    monkeypatch.setattr(fp8_accuracy, "rows", lambda: iter([noise]))
    with pytest.raises(typer.Exit) as left:
        fp8_accuracy.main(tmp_path / "found.md")
    assert left.value.exit_code == status
    page = (tmp_path / "found.md").read_text()
    shown = torchao if isinstance(torchao, str) else f"{torchao:.2f}"
    assert f"| fp8_mlp | tiny | normal | 25.00 | {shown} | 25.20 | 50.00 |" in page and ", commit " in page
