"""What drafters and gateways are told: prices, waits, how much of the verifiers' time is promised. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.scheduler.core.fleet import Fleet
from services.scheduler.core.pool import FIRST_ROUNDS, Known, VerifierState
from services.scheduler.core.round_queue import added_ms
from shared import cost
from shared.messages import Batch, ClassLoad, CostModel, Load, Result, Status
from shared.slo import batch_period_ms

SMOOTHING = 0.1
WINDOW_MS = 10_000.0
"""How far back the share of time that prompts take is looked at."""
PREFILL_TOKENS = 256
"""Length of the chunk whose time per token prompts are expected to take."""


@dataclass
class Recent:
    """Moving averages over rounds and batches."""

    tokens_per_round: float = 1.0
    tokens_spread: float = 0.0
    """How far a session's own mean is from that: mean deviation."""
    round_tokens: float = 2.0
    """Tokens computed for a round."""
    length: float = 256.0
    """Length of its session."""
    jobs: float = 1.0
    """Rounds in a batch."""
    away_ms: float | None = None
    """Between a session's rounds."""
    queue_ms: float = 0.0
    queue_of: dict[str, float] = field(default_factory=dict)
    """The same for each service class."""
    prompt_ms: float = 0.0
    """Predicted time of the prompts of the last `WINDOW_MS`, fading."""
    _faded_ms: float = 0.0

    def sent(self, batch: Batch) -> None:
        """Learn from a batch that goes out."""
        rounds = [job for job in batch.jobs if job.prefill_to is None]
        self.jobs += SMOOTHING * (max(1, len(rounds)) - self.jobs)
        for job in batch.jobs:
            self.queue_ms += SMOOTHING * (job.queue_ms - self.queue_ms)
            known = self.queue_of.setdefault(job.service_class, job.queue_ms)
            self.queue_of[job.service_class] = known + SMOOTHING * (job.queue_ms - known)

    def resulted(self, result: Result, prompt: int, prefill_ms: float, now_ms: float) -> None:
        """Learn from a result. prompt: tokens of it that belong to a prompt."""
        self.fade(now_ms)
        self.prompt_ms += prompt * prefill_ms
        if result.status is Status.COMMITTED and not prompt:
            for name, value in (
                ("tokens_per_round", max(1, len(result.tokens))),
                ("round_tokens", result.new_tokens),
                ("length", result.base_len),
            ):
                setattr(self, name, getattr(self, name) + SMOOTHING * (value - getattr(self, name)))

    def ended(self, session: Known) -> None:
        """Learn from a session that has ended how much sessions differ."""
        if session.rounds >= FIRST_ROUNDS:
            spread = abs(session.tokens / session.rounds - self.tokens_per_round)
            self.tokens_spread += SMOOTHING * (spread - self.tokens_spread)

    def away(self, away_ms: float | None) -> None:
        """Learn how long a session was away; None if that is not known."""
        if away_ms is not None:
            self.away_ms = away_ms if self.away_ms is None else self.away_ms + SMOOTHING * (away_ms - self.away_ms)

    def fade(self, now_ms: float) -> None:
        """Forget old prompts."""
        self.prompt_ms *= math.exp(-(now_ms - self._faded_ms) / WINDOW_MS)
        self._faded_ms = now_ms


def price_ms(verifiers: Iterable[VerifierState], recent: Recent) -> float:
    """What verifying one more token costs the others: every other round of the batch ends that much later."""
    times = [cost.token_ms(v.model) for v in verifiers]
    return max(0.0, recent.jobs - 1.0) * sum(times) / len(times) if times else 0.0


def load(
    scheduler: str, policy: str, price: float, draft_cap: int, fleet: Fleet, recent: Recent, now_ms: float
) -> Load:
    """The message to drafters and gateways; `Load` says what its figures mean."""
    usable = [v for v in fleet.verifiers.values() if v.usable]
    recent.fade(now_ms)
    told = Load(
        scheduler=scheduler,
        policy=policy,
        price_ms=price,
        queue_ms=recent.queue_ms,
        pending=fleet.waiting,
        draft_cap=draft_cap,
        verifiers=len(usable),
        tokens_per_round=max(1.0, recent.tokens_per_round - recent.tokens_spread),
        away_ms=recent.away_ms or 0.0,
        classes=_classes(fleet, recent, now_ms),
    )
    if not usable:
        return told
    rounds: dict[str, list[tuple[float, float]]] = {v.name: [] for v in usable}
    for session in fleet.known.values():
        if session.tpot_ms is not None and session.verifier in rounds:
            away_ms = told.away_ms if session.away_ms is None else session.away_ms
            tokens = session.tokens_per_round(recent.tokens_per_round)
            rounds[session.verifier].append((session.tpot_ms * tokens, away_ms))
    round_tokens = max(1, round(recent.round_tokens))
    fixed, own, prefill, used, backlog = [], [], [], [], []
    shortest: list[float] = []
    for verifier in usable:
        model = verifier.model
        fixed.append(cost.fixed_ms(model))
        own.append(added_ms(model, round_tokens, round(recent.length), round_tokens))
        # A promise that even a lone session's rounds would break is served as well as may be, and holds up nobody.
        alone = fixed[-1] + own[-1]
        needed = [(period, away) for period, away in rounds[verifier.name] if period >= alone]
        batches = min((batch_period_ms(period, away, alone) for period, away in needed), default=None)
        shortest += [batches] if batches else []
        prefill.append(prefill_ms(model))
        used.append(sum(own[-1] / period for period, _ in needed) + (fixed[-1] / batches if batches else 0.0))
        backlog.append(verifier.remaining_ms(now_ms) + fleet.queues[verifier.name].work_ms)
    count = len(usable)
    return told.model_copy(
        update={
            "utilization": (sum(used) + recent.prompt_ms / WINDOW_MS) / count,
            "fixed_ms": sum(fixed) / count,
            "period_ms": min(shortest, default=None),
            "round_ms": sum(own) / count,
            "prefill_ms": sum(prefill) / count,
            "backlog_ms": min(backlog),
        }
    )


def prefill_ms(model: CostModel) -> float:
    """Predicted time per token of a prompt."""
    return added_ms(model, PREFILL_TOKENS, PREFILL_TOKENS, 0) / PREFILL_TOKENS


def _classes(fleet: Fleet, recent: Recent, now_ms: float) -> list[ClassLoad]:
    sessions: dict[str, int] = {}
    for session in fleet.known.values():
        sessions[session.service_class] = sessions.get(session.service_class, 0) + 1
    waiting: dict[str, int] = {}
    slack: dict[str, float] = {}
    for pending in fleet.pending():
        name = pending.verify.service_class
        waiting[name] = waiting.get(name, 0) + 1
        if pending.due_ms is not None:
            slack[name] = min(slack.get(name, math.inf), pending.due_ms - now_ms)
    return [
        ClassLoad(
            service_class=name,
            sessions=sessions.get(name, 0),
            waiting=waiting.get(name, 0),
            queue_ms=recent.queue_of.get(name, 0.0),
            slack_ms=slack.get(name),
        )
        for name in sorted({*sessions, *waiting})
    ]
