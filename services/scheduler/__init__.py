"""Scheduler: pools pending rounds and decides which verifier verifies which of them together, and when."""

__all__ = ["core", "settings", "stand_in"]
