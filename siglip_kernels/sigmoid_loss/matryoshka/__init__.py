"""The sigmoid losses of the prefixes of embeddings, together in the matrix products of the widest.

api.py has the operator and the public function, arguments.py their checks. blocks.py is the mathematics and the walk
over blocks of pairs, which an engine executes: torch_engine.py, or triton_engine.py with kernels.py. distributed.py
takes that walk over the texts of all ranks.
"""

from siglip_kernels.sigmoid_loss.matryoshka.api import matryoshka_sigmoid_loss

__all__ = ["matryoshka_sigmoid_loss"]
