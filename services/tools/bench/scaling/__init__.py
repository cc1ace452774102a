"""`wisp bench scaling`: throughput by number of verifiers, and the time that a new verifier takes to serve."""

__all__ = ["core"]
