"""A remote client outside the cluster: the API on its loopback, and a drafter for its own requests."""

__all__ = ["settings"]
