"""The scheduler: pools the rounds that wait, decides which verifier checks which of them together, and when."""

__all__ = ["core", "settings"]
