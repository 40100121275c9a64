"""Measured tiles, one table for each GPU by its full name.

{(class of rows, then the other fields of `config.Shape`): the fields of `config.Tile`}
A GPU that is not here, or a shape that its table lacks, is not tuned yet and gets `config.py`'s heuristic.
"""

Key = tuple[int, int, int, int, int, int, str, bool, bool]
TUNED: dict[str, dict[Key, tuple[int, int, int, int, int, int, int, bool]]] = {}
