"""Admission, service classes, completions and stream cursors. Pure: no I/O, no clock."""

__all__: list[str] = []
