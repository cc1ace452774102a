"""`wisp bench load`: SLO attainment and goodput under load, and the sessions that each way of serving can hold."""

__all__ = ["arms", "campaign", "core", "plot", "report"]
