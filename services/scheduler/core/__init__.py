"""Pool, batch policies, placement, pacing and price. Pure: no I/O, no clock."""

__all__ = ["batching", "dispatch", "policies"]
