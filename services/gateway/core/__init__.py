"""Admission, API keys, service classes and stream cursors. Pure: no I/O, no clock."""

__all__ = ["admission", "keys"]
