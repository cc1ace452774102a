"""Continuous batching. Pure: no I/O, no clock."""

__all__ = ["batching"]
