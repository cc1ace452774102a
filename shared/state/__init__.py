"""Redis: every key and script."""

__all__ = ["commits", "kv", "quota", "registry", "sessions", "store"]
