"""The draft model that reads the target's hidden states."""

__all__ = ["card", "engine", "model", "target", "weights"]
