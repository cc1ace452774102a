"""The estimator's metrics."""

from prometheus_client import Counter, Gauge

BATCHES = Counter("wisp_estimator_batches", "Measured batches learned from", ["kind"])
MODELS = Counter("wisp_estimator_models", "Cost models published")
VERIFIERS = Gauge("wisp_estimator_verifiers", "Verifiers whose fits are remembered")
