"""Gluon's copies by the Tensor Memory Accelerator (TMA), by their names since Triton 3.8.

Triton 3.6 and 3.7 know only the older names, which 3.9 refuses.
"""

from triton.experimental.gluon.language.nvidia.hopper import tma

async_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
async_store = getattr(tma, "async_store", tma.async_copy_shared_to_global)
