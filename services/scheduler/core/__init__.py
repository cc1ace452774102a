"""Pure: the pool of rounds, batch policies, placement, pacing, the load report and the checks on remote devices."""

__all__ = ["batching", "dispatch", "policies"]
