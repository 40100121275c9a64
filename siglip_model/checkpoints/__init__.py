"""Checkpoint files: finding, reading, checking, writing and replacing them atomically."""
