"""Measured tiles, one table for each GPU by its full name. Written by `python -m bench tune sigmoid_loss`.

{(kernel, bytes of an element, width of the embeddings): the fields of `config.Tile`}
A GPU that is not here, or a width that its table lacks, is not tuned yet and gets `config.py`'s choice.
"""

TUNED: dict[str, dict[tuple[str, int, int], tuple[int, int, int, int, int]]] = {}
