"""Metrics of the scheduler."""

from prometheus_client import Counter, Gauge, Histogram

from shared.cost.model import predict_ms, shape_of
from shared.messages import CostModel, Result

WAITING = Gauge("wisp_num_requests_waiting", "Rounds pending for a batch")
WITHOUT_ROOM = Gauge(
    "wisp_scheduler_sessions_without_room", "Sessions that wait for room in a verifier's cache before they begin"
)
RUNS = Gauge("wisp_scheduler_runs", "Sessions that verifiers decode without rounds")
STAND_IN_SESSIONS = Gauge(
    "wisp_scheduler_stand_in_sessions", "Sessions served here without drafts, as no drafter has room for them", ["pool"]
)
GIVEN_TO_DRAFTERS = Counter(
    "wisp_scheduler_given_to_drafters", "Sessions served here that were given to a drafter", ["pool"]
)
VERIFIERS = Gauge("wisp_scheduler_verifiers", "Verifiers that are alive")
QUEUE_TIME = Histogram(
    "wisp_request_queue_time_seconds",
    "Time from a round's arrival to its batch",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
SLACK = Histogram(
    "wisp_scheduler_slack_seconds",
    "Time until the session's next token is due when a round's batch is sent; below 0 if it is late already",
    buckets=(-1, -0.3, -0.1, -0.03, 0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
INTERFERENCE = Histogram(
    "wisp_scheduler_interference_seconds",
    "Time of a round's batch beyond the predicted time of the round alone",
    buckets=(0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
)
PREDICTION_ERROR = Histogram(
    "wisp_scheduler_prediction_error_ratio",
    "Difference of a batch's predicted and measured times, as a share of the measured one",
    buckets=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5),
)
BATCHES = Counter("wisp_scheduler_batches", "Batches sent", ["verifier"])
DECISION_TIME = Histogram(
    "wisp_scheduler_decision_seconds",
    "Time of one decision about batches, including starting to send them",
    buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
)
BATCH_JOBS = Histogram("wisp_scheduler_batch_jobs", "Rounds in a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
TRIMMED = Counter("wisp_scheduler_draft_tokens_trimmed", "Draft tokens that were not worth verifying")
CHUNKS = Counter("wisp_scheduler_prefill_chunks", "Chunks of prompts sent by themselves")
ROUNDS_REFUSED = Counter(
    "wisp_scheduler_rounds_refused", "Refused rounds by device; empty for drafters in the cluster", ["device"]
)
PRICE = Gauge("wisp_scheduler_price_ms", "Time that verifying one more token costs the other rounds, in milliseconds")
UTILIZATION = Gauge("wisp_scheduler_utilization", "Share of the verifiers' time that is promised to sessions")
DEMAND = Gauge(
    "wisp_scheduler_demand", "Share of what the verifiers can compute in time that sessions and prompts need"
)
QUEUE_DELAY = Gauge(
    "wisp_scheduler_predicted_queue_delay_seconds",
    "Predicted time until a round that arrives now, behind all others, reaches the least busy verifier",
)
ROUNDS = Counter(
    "wisp_scheduler_rounds",
    "Rounds with a result, by whether it came before the session's next token was due: met, missed, or none without an "
    "SLO",
    ["deadline"],
)


def deadline(due_ms: float | None, now_ms: float) -> str:
    """Return the `deadline` label of a round whose result arrives now."""
    if due_ms is None:
        return "none"
    return "met" if now_ms <= due_ms else "missed"


def interference_ms(result: Result, model: CostModel) -> float:
    """Return the time of a result's batch beyond that of its round alone, as a cost model predicts it; at least 0.

    Raises ValueError if nothing was computed for the result.
    """
    if not result.new_tokens:
        raise ValueError("a result without new tokens has no time of its own")
    alone = shape_of([(result.new_tokens, result.base_len + result.trimmed_to, 1 + result.trimmed_to)])
    return max(0.0, result.verify_ms - predict_ms(model, alone))


def prediction_error(result: Result) -> float | None:
    """Return the error of the predicted time of a result's batch, as a share of its time; None if one is unknown."""
    if not result.predicted_ms or not result.verify_ms:
        return None
    return abs(result.predicted_ms - result.verify_ms) / result.verify_ms
