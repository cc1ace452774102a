"""Benchmarks. Each module or package except `support` is one; `wisp bench NAME` runs it.

Each prints tables and writes `.wisp/results/<name>.json`.
"""

__all__ = ["load", "scaling", "support"]
