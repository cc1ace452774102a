"""Benchmarks: each module or package but `support` is one, run as `wisp bench NAME`.

Each prints tables and writes `.wisp/results/<name>.json`.
"""

__all__ = ["load", "scaling", "support"]
