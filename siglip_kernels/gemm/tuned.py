"""Measured tiles, one table per GPU, by its full name.

{(class of rows, then the other fields of `tiles.Shape`): the fields of `tiles.Tile`}
GPUs and shapes without an entry use the heuristic in `config.py`.
"""

Key = tuple[int, int, int, int, int, int, str, bool, bool]
TUNED: dict[str, dict[Key, tuple[int, int, int, int, int, int, int, bool, int]]] = {}
