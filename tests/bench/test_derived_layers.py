"""What rotary positions and LayerScale add to the traffic of a layer."""

from bench.cases.shapes import MODELS
from bench.derived_layers import main, products, traffic


def test_a_scale_that_is_folded_moves_weights_only():
    tower, batch = MODELS["base-224"].vision, 8
    found = {variant: traffic(variant, tower, batch) for variant in ("fused", "rotary", "parts", "scaled", "folded")}
    x = batch * tower.tokens * tower.width * 2
    table = tower.tokens * tower.width // tower.heads * 2
    # q and k, read and written; their gradients likewise.
    for rotary, parts in zip(found["rotary"], found["parts"], strict=True):
        assert rotary - parts == 4 * x + 2 * table
    fused, folded, scaled = (sum(found[variant]) for variant in ("fused", "folded", "scaled"))
    weights = tower.width * (tower.width + tower.hidden) * 2
    assert 0 < folded - fused < 10 * weights
    assert scaled - fused > 12 * x


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["derived_layers", "--model", "base-224", "--batch", "8"])
    assert main() == 0
    shown = capsys.readouterr().out
    tflop = products(MODELS["base-224"].vision, 8) / 1e12
    assert f"{tflop:.2f} TFLOP" in shown and "| folded |" in shown


def test_products():
    """2 · tokens · (4 width² + 2 width · hidden) of the projections, 4 · tokens² · width of attention."""
    tower = MODELS["so400m-384"].vision
    assert products(tower, 1) == 2 * 729 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * 729**2 * 1152
