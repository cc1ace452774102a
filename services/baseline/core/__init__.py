"""Continuous batching. Pure: no I/O, no clock."""
