"""`siglip search --plot`: a contact sheet of the images that were found, one group per query."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from siglip_model.embed.sources import named_image
from siglip_model.images.files import DOWNLOAD_SECONDS, EncodedImage, UnreadableImageError, decode_image, load_image
from siglip_model.plot import DOTS_PER_INCH, FAINT, INK, fonts, format_score, save, shortened, thumbnail

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from siglip_model.retrieval.searcher import Found, Hit

COLUMNS = 5
CELL_INCHES, TITLE_INCHES = 1.9, 0.45
IMAGES_AT_MOST = 100  # 20 rows; the renderer's limit is 65,536 pixels


def draw_sheet(results: Sequence[Found], path: str | os.PathLike[str], column: str | None = None) -> int:
    """Writes the images of each query in rows under it, best first, to `path` (.png, .pdf, .svg ... by suffix).

    column: of images within .parquet files; may be omitted where only one column has images.
    Returns how many were drawn: the first IMAGES_AT_MOST. An image that cannot be opened is a box with its error.
    """
    import matplotlib
    from matplotlib.figure import Figure

    groups: list[tuple[Found, list[Hit]]] = []
    left = IMAGES_AT_MOST
    for found in results:
        if left == 0:
            break
        groups.append((found, found.hits[:left]))
        left -= len(groups[-1][1])
    heights = [max(1, -(-len(hits) // COLUMNS)) * CELL_INCHES + TITLE_INCHES for _, hits in groups]
    with matplotlib.rc_context({"font.family": fonts(), "text.parse_math": False, "svg.fonttype": "path"}):
        figure = Figure(
            figsize=(COLUMNS * CELL_INCHES, sum(heights)), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained"
        )
        parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for (found, hits), part in zip(groups, parts, strict=True):
            title = found.query if found.kind == "text" else f"like {os.path.basename(str(found.query))}"
            part.suptitle(shortened(title, 90), color=INK, fontsize=12, fontweight="bold")
            columns = min(COLUMNS, len(hits))
            grid = part.add_gridspec(max(1, -(-len(hits) // COLUMNS)), 2 * COLUMNS)
            for number, hit in enumerate(hits):
                row, place = divmod(number, COLUMNS)
                left_edge = COLUMNS - columns + 2 * place  # in half columns: one row of few is centred
                _draw_hit(part.add_subplot(grid[row, left_edge : left_edge + 2]), hit, column)
        save(figure, path)
    return IMAGES_AT_MOST - left


def _draw_hit(axes: Axes, hit: Hit, column: str | None) -> None:
    picture: Any
    axes.set_axis_off()
    try:
        source = named_image(hit.name, column)
        if isinstance(source, EncodedImage):
            picture = thumbnail(decode_image(source.content, source.name))
        else:
            picture = thumbnail(load_image(source, DOWNLOAD_SECONDS))
    except UnreadableImageError as error:
        axes.text(0.5, 0.5, _wrapped(str(error)), ha="center", va="center", color=FAINT, fontsize=6)
    else:
        axes.imshow(picture)
    number = f"cosine {hit.cosine:.3f}" if hit.score is None else format_score(hit.score)
    axes.set_title(f"{number}\n{shortened(os.path.basename(hit.name), 24)}", color=INK, fontsize=8)


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(shortened(text, 140), 26))
