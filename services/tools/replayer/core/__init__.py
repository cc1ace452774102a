"""What recordings show, computed from their messages."""

__all__ = [
    "batches",
    "concern",
    "injection",
    "performance",
    "recording",
    "redaction",
    "selection",
    "sessions",
    "timeline",
    "trace",
    "traffic",
    "what_if",
]
