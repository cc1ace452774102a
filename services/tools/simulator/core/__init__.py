"""The simulated fleet and its parts. Pure: virtual time only, no I/O."""

__all__ = ["scenario"]
