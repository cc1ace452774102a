"""The drafter: takes requests, guesses their next tokens, and sees every session through to its end."""

__all__ = ["control", "control_files", "core", "drafting", "hidden", "link", "service", "settings", "sources"]
