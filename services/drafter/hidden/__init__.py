"""A draft model that reads the target's hidden states: its files, its layers and its engine."""

__all__ = ["card", "engine", "forward", "model", "target", "target_parts", "weights"]
