"""The drafter's session and its timeout. Pure: no I/O, no clock."""

__all__ = ["profile", "session"]
