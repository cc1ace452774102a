"""Sessions, timelines, batches, traffic and performance, computed from recorded messages. Pure: no I/O, no clock."""

__all__ = [
    "batches",
    "injection",
    "performance",
    "recording",
    "redaction",
    "selection",
    "sessions",
    "timeline",
    "timeline_records",
    "trace",
    "traffic",
    "what_if",
]
