"""`siglip search`: the best rows of embedding files for texts and images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siglip_model.cli import terminal
from siglip_model.cli.options import BackendOption, DeviceOption, JsonOption, device_named, errors_in_one_line

if TYPE_CHECKING:
    from siglip_model.retrieval.searcher import Searcher


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files, texts): words that end as embedding files or folders do, and the others."""
    from siglip_model.embed.file import SUFFIXES
    from siglip_model.embed.shards import is_manifest

    files = [word for word in words if word.endswith((*SUFFIXES, "/")) or is_manifest(word)]
    if not files:
        raise ValueError(
            f"no embedding file among {', '.join(map(repr, words[:3]))}; give one that ends in {', '.join(SUFFIXES)},"
            " or / for the files of a folder"
        )
    return files, [word for word in words if word not in files]


def search(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE|TEXT",
            help="Files of `siglip embed`, told by their suffix, or folders/ of them, and the texts to search for.",
            show_default=False,
        ),
    ],
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="IMAGE", help="Search for images like this one; may be repeated."),
    ] = None,
    top: Annotated[int, typer.Option(metavar="K", min=1, help="Results per query.")] = 10,
    template: Annotated[
        str, typer.Option("--template", metavar="TEXT", help="Sentence in which {} stands for the text.")
    ] = "{}",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the images found as a contact sheet.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            "--column", metavar="NAME", help="For --plot: the column of .parquet files that the images were read from."
        ),
    ] = None,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate", help="Use an index (usearch) beside each file, which is built where it is missing."
        ),
    ] = False,
    recall: Annotated[
        bool,
        typer.Option("--recall", help="Also search exactly, and print the share of its results that the index finds."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="FOLDER|HUB_ID", help="Checkpoint that made the files, if it is not where they name it."
        ),
    ] = None,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the rows of embedding files that match texts, or that are like an image.

    A line per result: rank, score as a bar and a number, cosine, and name. The score is the probability that text and
    image match; two images, or two texts, have a cosine alone. On a terminal the columns have a header. Every row is
    compared, unless --approximate is given.
    """
    with errors_in_one_line():
        from siglip_model.cli import sheet
        from siglip_model.plot import plot_problem
        from siglip_model.retrieval.searcher import Searcher

        files, texts = split_words(words)
        if not texts and not image:
            raise ValueError("there is no query; give a text after the files, or --image")
        if recall and not approximate:
            raise ValueError("--recall compares an index with exact search; give --approximate, too")
        if plot is not None and (problem := plot_problem(plot)):
            raise ValueError(f"--plot: {problem}")
        if column is not None and plot is None:
            raise ValueError("--column is for --plot, which is not given")
        with Searcher(files, model=model, backend=backend, device=device_named(device)) as searcher:
            if plot is not None and searcher.collection.settings["content"] != "images":
                raise ValueError(f"--plot draws images, and the rows of {files[0]} are texts")
            nearest = _index(searcher, recall) if approximate else None
            results = searcher.find(texts, image=image or [], top=top, template=template, nearest=nearest)
        if as_json:
            print(json.dumps([_described(found) for found in results], indent=2))
        else:
            for found in results:
                terminal.print_found(found.query, found.hits)
        if plot is not None:
            drawn = sheet.draw_sheet(results, plot, column)
            total = sum(len(found.hits) for found in results)
            terminal.say(f"wrote {plot}" + (f" with the first {drawn} of {total} images" if drawn < total else ""))


def _index(searcher: Searcher, recall: bool) -> Any:
    """Approximate search of a searcher's files. Also prints its recall where asked, and where an index was built."""
    from siglip_model.retrieval import approximate

    built: list[Path] = []

    def on_build(path: Path) -> None:
        terminal.say(f"building {path}")
        built.append(path)

    index = approximate.ApproximateIndex(searcher.collection, on_build)
    if not (recall or built):
        return index.nearest

    def measured(queries: Any, top: int) -> Any:
        found = index.nearest(queries, top)
        share = approximate.recall(found, searcher.collection.nearest(queries, top))
        terminal.say(f"recall@{top} of the index: {share:.3f} (of the exact results for these queries)")
        return found

    return measured


def _described(found: Any) -> dict[str, Any]:
    hits = [
        {"rank": rank, "name": hit.name, "cosine": hit.cosine} | ({} if hit.score is None else {"score": hit.score})
        for rank, hit in enumerate(found.hits, start=1)
    ]
    return {"query": found.query, "kind": found.kind, "results": hits}
