"""The `wisp` command: runs a stack on this machine, and has tools for stacks that run elsewhere."""

__all__ = ["ask", "paint", "program", "shared_options", "terminal"]
