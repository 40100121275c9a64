"""Measured configurations, one table for each GPU by its full name. Written by `python -m bench tune attention`.

{(kernel, bytes of an element, columns of a head's tile, class of query length, class of key length):
     the fields of `config.Tile`}
A GPU that is not here, or a shape that its table lacks, is not tuned yet and gets `config.py`'s heuristic.
"""

TUNED: dict[str, dict[tuple[str, int, int, int, int], tuple[int, int, int, int, int | None]]] = {}
