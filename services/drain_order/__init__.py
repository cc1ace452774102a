"""Tells Kubernetes which verifier pod to take first when it scales in."""

__all__ = ["settings"]
