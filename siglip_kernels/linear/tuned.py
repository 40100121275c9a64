"""Measured tiles, one table for each GPU by its full name.

{(class of rows, columns, depth, parts, gelu, bytes of an element): the fields of `configuration.Tile`}
A GPU that is not here, or a shape that its table lacks, is not tuned yet and gets `configuration.py`'s heuristic.
"""

TUNED: dict[str, dict[tuple[int, int, int, int, str, int], tuple[int, int, int, int, int, int, int, bool]]] = {}
