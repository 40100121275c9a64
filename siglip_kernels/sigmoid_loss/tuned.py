"""Measured tiles, one table per GPU by its full name. Written by `python -m bench tune sigmoid_loss`.

{("logit_grad" or "product", bytes per element, width of the embeddings): the fields of `config.Tile`}
A GPU or width without an entry has not been tuned and gets the heuristic of `config.py`.
"""

TUNED: dict[str, dict[tuple[str, int, int], tuple[int, int, int, int, int]]] = {}
