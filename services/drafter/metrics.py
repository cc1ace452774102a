"""The drafter's metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from services.drafter.control import DraftRound
from services.drafter.core.draft import Draft
from services.drafter.core.session import wasted_tokens

if TYPE_CHECKING:
    from services.drafter.learning.reports import LearningReport

SESSIONS = Gauge("wisp_drafter_sessions", "Sessions being served")
DRAFT_TIME = Histogram(
    "wisp_draft_seconds", "Time to make one draft", buckets=(0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
)
WASTED_TIME = Counter(
    "wisp_draft_wasted_seconds",
    "Time to draft tokens past the first rejected one; its share of `wisp_draft_seconds_sum` is the wasted drafting "
    "time (WDT)",
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
LEARNING_TOKENS = Counter("wisp_draft_learning_tokens", "Tokens of sessions handed to the draft's learning")
LEARNING_DROPPED = Counter("wisp_draft_learning_dropped", "Sessions not learned from, as too many were pending")
LEARNING_COMPARISONS = Counter(
    "wisp_draft_learning_comparisons", "Comparisons of learning weights, by outcome", ["outcome"]
)
LEARNING_CPU = Counter("wisp_draft_learning_cpu_seconds", "CPU time of the draft's learning")
LEARNED_VERSION = Gauge("wisp_draft_learned_version", "Changes of the draft's weights by learning")
LEARNED_ACCEPTANCE = Gauge(
    "wisp_draft_learned_acceptance", "Acceptance of first draft tokens on held-back texts, by weights", ["weights"]
)
AHEAD = Counter("wisp_drafts_ahead", "Rounds for whose outcomes drafts were prepared in time", ["outcome"])


def count(round_: DraftRound, verified: int, accepted: int, draft: Draft, draft_ms: float) -> None:
    """Count a settled round. draft_ms: time that its draft took."""
    STEPS.inc(sum(draft.steps.values()))
    if drafted := len(draft.tokens):
        WASTED_TIME.inc(draft_ms / 1000 * wasted_tokens(drafted, verified, accepted) / drafted)
    if round_.kept:
        DRAFTS.inc()
    for i, token in enumerate(round_.kept_tokens[:verified]):
        TOKENS_VERIFIED.labels(token.source).inc()
        if i < accepted:
            TOKENS_ACCEPTED.labels(token.source).inc()


def count_learning(report: LearningReport, cpu_s: float) -> None:
    """Count a comparison of the learning draft. cpu_s: CPU time since the last one."""
    LEARNING_COMPARISONS.labels(report.outcome.replace(" ", "_")).inc()
    LEARNING_CPU.inc(cpu_s)
    LEARNED_VERSION.set(report.version)
    LEARNED_ACCEPTANCE.labels("current").set(report.acceptance)
    LEARNED_ACCEPTANCE.labels("shipped").set(report.shipped_acceptance)
