"""A drafter's sessions, drafts by lookup, hidden-state rows and hardware profiles. Pure: no I/O, no clock."""

__all__ = ["observed", "profile", "session", "synthetic"]
