"""The drafter's metrics."""

from prometheus_client import Counter, Gauge, Histogram

from services.drafter.control import DraftRound
from services.drafter.core.draft import Draft

SESSIONS = Gauge("wisp_drafter_sessions", "Sessions being served")
DRAFT_TIME = Histogram(
    "wisp_draft_seconds", "Time to make one draft", buckets=(0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
)
ROUND_TIME = Histogram(
    "wisp_round_seconds", "Time from sending a round to its result", buckets=(0.01, 0.03, 0.1, 0.2, 0.5, 1, 3, 10)
)
ROUNDS_RESENT = Counter("wisp_rounds_resent", "Rounds sent again because their result was late")
TOKENS_VERIFIED = Counter("wisp_draft_tokens_verified", "Draft tokens that were verified", ["source"])
TOKENS_ACCEPTED = Counter("wisp_draft_tokens_accepted", "Draft tokens that were accepted", ["source"])
DRAFTS = Counter("wisp_drafts", "Rounds sent with draft tokens")
DEVICE_LATE = Counter("wisp_device_late_seconds", "Time by which drafts took longer here than on the emulated hardware")
STEPS = Counter("wisp_draft_steps", "Steps of the draft model")
AHEAD = Counter("wisp_drafts_ahead", "Drafts made while a round was in flight", ["outcome"])


def count(round_: DraftRound, verified: int, accepted: int, draft: Draft) -> None:
    """Count a settled round."""
    STEPS.inc(sum(draft.steps.values()))
    if round_.kept:
        DRAFTS.inc()
    for i, token in enumerate(round_.kept_tokens[:verified]):
        TOKENS_VERIFIED.labels(token.source).inc()
        if i < accepted:
            TOKENS_ACCEPTED.labels(token.source).inc()
