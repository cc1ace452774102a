"""The estimator: fits each verifier's cost model to its measured batches, and publishes it to the schedulers."""

__all__ = ["settings"]
