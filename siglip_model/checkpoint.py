"""Checkpoints: files to tensors and back."""

from siglip_model.atomic import atomic_write
from siglip_model.hub import resolve_file

__all__ = ["atomic_write", "resolve_file"]
