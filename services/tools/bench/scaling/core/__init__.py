"""Pure: the rule by which Kubernetes starts another verifier."""

__all__ = ["autoscaling"]
