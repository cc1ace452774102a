"""The drafter: takes requests, guesses their next tokens, and sees every session through to its end."""

__all__ = ["control", "core", "drafting", "emulation", "hidden", "service", "settings", "sources"]
