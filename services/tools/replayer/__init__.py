"""The replayer: reads recorded messages; shows, re-executes, asks what if, and injects them elsewhere."""

__all__ = [
    "arrivals",
    "choice",
    "concern",
    "figures",
    "files",
    "inject",
    "life",
    "recording",
    "reexecute",
    "requests",
    "stream",
    "timeline",
    "trace",
    "whatif",
    "work",
]
