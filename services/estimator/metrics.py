"""What an estimator counts."""

from prometheus_client import Counter, Gauge

BATCHES = Counter("wisp_estimator_batches", "Measured batches that were learned from", ["kind"])
MODELS = Counter("wisp_estimator_models", "Cost models published")
VERIFIERS = Gauge("wisp_estimator_verifiers", "Verifiers heard of since the start")
