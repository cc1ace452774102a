"""Annotates verifier pods so that Kubernetes removes those that hold the least KV first when it scales in."""

__all__ = ["settings"]
