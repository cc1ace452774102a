"""Admission, service classes, options, completions and stream cursors. Pure: no I/O, no clock."""

__all__: list[str] = []
