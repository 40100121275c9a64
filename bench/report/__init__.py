"""Rows, tables and plots of the results."""
