"""The replayer: reads recorded messages; shows, re-executes, asks what if, and injects them elsewhere."""

__all__ = ["core", "files", "inject", "journal", "reexecute"]
