"""`wisp bench load`: SLO attainment and goodput under load, and the capacity of each way of serving."""

__all__ = ["arms", "campaign", "core", "plot", "point_options", "report"]
