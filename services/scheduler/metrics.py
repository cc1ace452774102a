"""What a scheduler counts."""

from prometheus_client import Counter, Gauge, Histogram

WAITING = Gauge("wisp_num_requests_waiting", "Rounds that wait for a batch")
VERIFIERS = Gauge("wisp_scheduler_verifiers", "Verifiers that are alive")
QUEUE_TIME = Histogram(
    "wisp_request_queue_time_seconds",
    "Time from a round's arrival to its batch",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
BATCHES = Counter("wisp_scheduler_batches", "Batches sent", ["verifier"])
