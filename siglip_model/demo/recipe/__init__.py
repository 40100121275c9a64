"""Rebuilds and measures the demo checkpoint and its images; not part of the wheel."""
