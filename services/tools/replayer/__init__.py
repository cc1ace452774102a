"""The replayer: reads recorded messages, shows and recomputes sessions, tries other policies, and injects requests."""

__all__ = ["core", "files", "inject", "journal", "reexecute", "times"]
