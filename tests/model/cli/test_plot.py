"""`--plot`: images beside bars as long as their scores."""

import json

import numpy as np
import pytest
from command_line import LABELS
from PIL import Image
from tiny_checkpoint import random_image

from siglip_model.plot import ROWS_AT_MOST, PlotRow, format_score, plot_predictions


@pytest.mark.parametrize("suffix", [".png", ".svg", ".jpg"])
def test_plot_shows_images_beside_bars(siglip, images, tmp_path, suffix):
    (images / "1.png").write_text("no image")
    picture = tmp_path / f"bars{suffix}"
    result = siglip("classify", images, "--labels", *LABELS, "--plot", picture, "--json")
    assert result.exit_code == 1 and picture.stat().st_size > 5000
    assert len(json.loads(result.stdout)) == 5
    if suffix == ".png":
        with Image.open(picture) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        height, width, _ = pixels.shape
        assert height > width  # four rows
        assert len(np.unique(pixels[:, : width // 3].reshape(-1, 3), axis=0)) > 1000  # the images
        blue = (pixels == (0x2F, 0x6F, 0xDB)).all(axis=-1)
        assert blue[:, : width // 3].sum() == 0
        assert blue[:, width // 3 :].any(axis=1).sum() > 4 * 10  # a best bar in each row


def test_the_bars_are_as_long_as_the_scores(tmp_path):
    lengths = []
    for score in (0.9, 0.45):
        path = tmp_path / f"{score}.png"
        row = PlotRow(random_image(0), "x", [{"score": score, "label": "a $label$"}, {"score": 0.91, "label": "{}"}])
        plot_predictions([row], path)
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        lengths.append((pixels == (0x2F, 0x6F, 0xDB)).all(axis=-1).sum(axis=1).max())
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.02)


def test_characters_without_a_font_warn_once(tmp_path):
    row = PlotRow(random_image(0), "x", [{"score": 0.5, "label": "\U0010fffd \U0010fffc"}])
    with pytest.warns(UserWarning, match="no installed font has") as caught:
        plot_predictions([row], tmp_path / "x.png")
    assert ["no installed font has" in str(warning.message) for warning in caught].count(True) == 1


def test_invalid_arguments_of_plot(tmp_path):
    with pytest.raises(ValueError, match=f"0 images; supported: 1 to {ROWS_AT_MOST}"):
        plot_predictions([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="ends in no suffix"):
        plot_predictions([PlotRow(random_image(0), "x", [])], tmp_path / "x")


def test_scores_as_text():
    texts = [format_score(score) for score in (0.0, 1.0, 0.8731, 0.0123, 0.00213, 0.00004)]
    assert texts == ["0.000", "1.000", "0.873", "0.012", "0.0021", "4e-05"]
