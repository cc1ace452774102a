"""The `wisp` command: a stack of its own on this machine, or tools for one that runs elsewhere."""

__all__ = ["ask", "paint", "terminal"]
