"""Redis: every key and script."""

__all__ = ["kv", "quota", "store"]
