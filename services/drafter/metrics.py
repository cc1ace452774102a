"""What a drafter counts."""

from prometheus_client import Counter, Gauge, Histogram

SESSIONS = Gauge("wisp_drafter_sessions", "Sessions being served")
DRAFT_TIME = Histogram(
    "wisp_draft_seconds", "Time to make one draft", buckets=(0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
)
ROUND_TIME = Histogram(
    "wisp_round_seconds", "Time from a round's sending to its result", buckets=(0.01, 0.03, 0.1, 0.2, 0.5, 1, 3, 10)
)
ROUNDS_RESENT = Counter("wisp_rounds_resent", "Rounds sent again because their result was late")
