"""The estimator: learns from measured batches how long each verifier takes, and tells the schedulers."""

__all__ = ["settings"]
