"""Measured configurations, one table per GPU by its full name. Written by `python -m bench tune attention`.

{(kernel, bytes per element, columns of a head's tile, class of query length, class of key length):
     the fields of `config.Tile`}
A GPU or shape without an entry has not been tuned and gets the heuristic of `config.py`.
"""

TUNED: dict[str, dict[tuple[str, int, int, int, int], tuple[int, int, int, int, int | None]]] = {}
