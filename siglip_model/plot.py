"""Plots images beside bars of their scores."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

THUMBNAIL = 640  # pixels of the longer side: enough for a page, and bounds memory for large photos
BEST, OTHERS, INK, FAINT = "#2f6fdb", "#b9cdf0", "#1f2733", "#8a94a3"
ROW_INCHES, WIDTH_INCHES, DOTS_PER_INCH = 3.0, 9.0, 144
ROWS_AT_MOST = 100  # 43,200 pixels high; the renderer's limit is 65,536
# Fallbacks, in this order, for matplotlib's default font, which has neither Chinese nor emoji
FURTHER_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
    "Malgun Gothic", "WenQuanYi Micro Hei", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari",
    "Noto Emoji",
)  # fmt: skip


@dataclass(frozen=True)
class PlotRow:
    """One image with its predictions ({"score", "label"}, best first), under a title."""

    image: Image.Image
    title: str
    predictions: Sequence[Mapping[str, Any]]


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy small enough to keep until the plot is drawn."""
    from PIL import ImageOps

    return image.copy() if max(image.size) <= THUMBNAIL else ImageOps.contain(image, (THUMBNAIL, THUMBNAIL))


def plot_predictions(rows: Sequence[PlotRow], path: str | os.PathLike[str]) -> None:
    """Writes one row per image, the image left of its bars, to `path` (.png, .pdf, .svg ... by suffix).

    All rows share one axis, from 0 to the first round number above the largest score (SigLIP's scores need not sum to
    1 and are often small). Raises ValueError for no rows, more than ROWS_AT_MOST rows or an unsupported suffix.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if not 1 <= len(rows) <= ROWS_AT_MOST:
        raise ValueError(f"plot_predictions: {len(rows)} images; supported: 1 to {ROWS_AT_MOST}")
    problem = plot_problem(path)
    if problem is not None:
        raise ValueError(f"plot_predictions: {problem}")
    largest = max((float(entry["score"]) for row in rows for entry in row.predictions), default=1.0)
    limit = next(step for step in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if largest <= step)
    heights = [max(ROW_INCHES, 0.42 * len(row.predictions) + 0.9) for row in rows]
    with matplotlib.rc_context({"font.family": fonts(), "text.parse_math": False, "svg.fonttype": "path"}):
        figure = Figure(
            figsize=(WIDTH_INCHES, sum(heights)), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained"
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.14, wspace=0.04)  # type: ignore[union-attr, call-arg]
        axes = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(1.0, 1.7), height_ratios=heights)
        for row, (picture, bars) in zip(rows, axes, strict=True):
            _draw_image(picture, row)
            _draw_bars(bars, row.predictions, limit)
        save(figure, path)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure, with one warning for all characters that cannot be drawn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path)
    if any("missing from font" in str(warning.message) for warning in caught):
        warnings.warn("the plot shows boxes for characters that no installed font has", stacklevel=3)


def plot_problem(path: str | os.PathLike[str]) -> str | None:
    """Why no plot can be written to `path`, found before any work is done; None if one can."""
    from matplotlib.backend_bases import FigureCanvasBase

    text = os.fspath(path)
    supported = sorted(FigureCanvasBase.get_supported_filetypes())
    suffix = os.path.splitext(text)[1].lower().removeprefix(".")
    if suffix not in supported:
        return f"{text} ends in {'.' + suffix if suffix else 'no suffix'}; supported: .{', .'.join(supported)}"
    folder = os.path.dirname(os.path.abspath(text))
    if not os.path.isdir(folder):
        return f"the folder {folder} does not exist; create it first"
    return None


def _draw_image(axes: Axes, row: PlotRow) -> None:
    axes.imshow(row.image, interpolation="lanczos" if max(row.image.size) > 200 else "nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_anchor("C")
    for spine in axes.spines.values():
        spine.set(color="#d9dee6", linewidth=0.8)
    axes.set_xlabel(shortened(row.title, 30), color=FAINT, fontsize=9, labelpad=6)


def _draw_bars(axes: Axes, predictions: Sequence[Mapping[str, Any]], limit: float) -> None:
    places = range(len(predictions))
    scores = [float(entry["score"]) for entry in predictions]
    colors = [BEST if place == 0 else OTHERS for place in places]
    axes.barh(places, [limit] * len(scores), color="#f3f5f8", height=0.62)  # the bar's background
    axes.barh(places, scores, color=colors, height=0.62)
    for place, score in zip(places, scores, strict=True):
        axes.annotate(
            format_score(score),
            (limit, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            color=INK if place == 0 else FAINT,
            fontsize=10.5,
            fontweight="bold" if place == 0 else "normal",
        )
    axes.set_xlim(0, limit)
    # Room for at least five bars, so that the bar of a single label does not fill the axes
    spare = max(0, 5 - len(predictions)) / 2
    axes.set_ylim(len(predictions) - 0.4 + spare, -0.6 - spare)
    axes.set_yticks(list(places), [_wrapped(str(entry["label"])) for entry in predictions], fontsize=10.5, color=INK)
    if predictions:
        axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_xticks([0, limit / 2, limit], [f"{tick:g}" for tick in (0, limit / 2, limit)], fontsize=8, color=FAINT)
    axes.tick_params(length=0, pad=6)
    for spine in axes.spines.values():
        spine.set_visible(False)


def format_score(score: float) -> str:
    """0.873, 0.0013, or 4e-05 for scores below 0.0001."""
    if score == 0 or score >= 0.01:
        return f"{score:.3f}"
    return f"{score:.4f}" if score >= 0.0001 else f"{score:.0e}"


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(shortened(label, 68), 34)) or " "


def shortened(text: str, length: int) -> str:
    text = text.encode(errors="replace").decode()  # names on disk need not be valid Unicode
    return text if len(text) <= length else f"{text[: length - 1]}…"


def fonts() -> list[str]:
    """matplotlib's default font, and the installed ones for what it lacks."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(font for font in FURTHER_FONTS if font in installed)]
