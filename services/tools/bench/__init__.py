"""Benchmarks: each prints a table and writes `.wisp/results/<name>.json`."""

__all__ = ["chaos"]
