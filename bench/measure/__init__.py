"""Timing, accuracy and memory, isolated in processes of their own on a GPU."""
