"""The load report for drafters and gateways: prices, waits, and the promised share of the verifiers' time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.scheduler.core.batching import hidden_tokens
from services.scheduler.core.demand import SessionNeed, demand, room_tokens_per_ms, session_need
from services.scheduler.core.fleet import VerifierFleet
from services.scheduler.core.pool import FIRST_ROUNDS, ActiveSession, VerifierState
from services.scheduler.core.round_queue import added_ms
from shared import cost
from shared.messages import Batch, ClassLoad, CostModel, Load, Result, Status
from shared.slo import StepNeed, step_need

SMOOTHING = 0.1
WINDOW_MS = 10_000.0
"""Window over which the share of time that prompts take is measured, and after which a wait of rounds is forgotten."""
LONGEST_CURVE = 64
"""Most draft tokens for which the time of verification is reported."""
PREFILL_TOKENS = 256
"""Length of the chunk from which the time per prompt token is predicted."""


@dataclass
class RecentWait:
    """A moving average of the rounds' waits. It is forgotten when no round was sent for `WINDOW_MS`."""

    first_share: float = 1.0
    """Share of the first wait in the average: `SMOOTHING` where one long wait alone should change little."""
    _mean_ms: float = 0.0
    _sent_ms: float = -math.inf

    def learn(self, wait_ms: float, now_ms: float) -> None:
        """Update from a round that is sent."""
        share = SMOOTHING if self._is_recent(now_ms) else self.first_share
        before_ms = self.ms(now_ms)
        self._mean_ms = before_ms + share * (wait_ms - before_ms)
        self._sent_ms = now_ms

    def ms(self, now_ms: float) -> float:
        """Return the average; 0 without a recent round."""
        return self._mean_ms if self._is_recent(now_ms) else 0.0

    def _is_recent(self, now_ms: float) -> bool:
        return now_ms - self._sent_ms <= WINDOW_MS


@dataclass
class LoadAverages:
    """Moving averages over rounds and batches."""

    tokens_per_round: float = 1.0
    tokens_spread: float = 0.0
    """Mean deviation of the sessions' own averages from `tokens_per_round`."""
    round_tokens: float = 2.0
    """Tokens computed for a round."""
    length: float = 256.0
    """Length of a round's session."""
    jobs: float = 1.0
    """Rounds in a batch."""
    away_ms: float | None = None
    """Time between a session's rounds."""
    queue: RecentWait = field(default_factory=lambda: RecentWait(first_share=SMOOTHING))
    """Time from a round's arrival to its batch, of rounds after a session's first."""
    queue_of: dict[str, RecentWait] = field(default_factory=dict)
    """Time from the arrival of any round to its batch, for each service class."""
    prompt_ms: float = 0.0
    """Predicted time of the prompts of the last `WINDOW_MS`, decaying exponentially."""
    prompt_tokens: float = 0.0
    """Tokens of these prompts."""
    _decayed_ms: float = 0.0

    def on_batch(self, batch: Batch, now_ms: float) -> None:
        """Update from a batch that is sent."""
        rounds = [job for job in batch.jobs if job.prefill_to is None]
        self.jobs += SMOOTHING * (max(1, len(rounds)) - self.jobs)
        for job in batch.jobs:
            # The first round of a session waits for its prompt, and says nothing of the rounds after it.
            if job.prefill_to is None and job.round > 0:
                self.queue.learn(job.queue_ms, now_ms)
            self.queue_of.setdefault(job.service_class, RecentWait()).learn(job.queue_ms, now_ms)

    def on_result(self, result: Result, prompt: int, prefill_ms: float, now_ms: float) -> None:
        """Update from a result. prompt: tokens computed for it that belong to a prompt."""
        self.decay(now_ms)
        self.prompt_ms += prompt * prefill_ms
        self.prompt_tokens += prompt
        if result.status is Status.COMMITTED and not prompt:
            for name, value in (
                ("tokens_per_round", max(1, len(result.tokens))),
                ("round_tokens", result.new_tokens),
                ("length", result.base_len),
            ):
                setattr(self, name, getattr(self, name) + SMOOTHING * (value - getattr(self, name)))

    def on_run(self, result: Result) -> None:
        """Update from tokens that were decoded in a run: each of its steps counts as a round."""
        for name, value in (
            ("tokens_per_round", max(1.0, len(result.tokens) / result.run_steps)),
            ("round_tokens", 1.0 + result.trimmed_to / result.run_steps),
            ("length", result.base_len),
        ):
            setattr(self, name, getattr(self, name) + SMOOTHING * (value - getattr(self, name)))

    def on_end(self, session: ActiveSession) -> None:
        """Update `tokens_spread` from a session that has ended."""
        if session.rounds >= FIRST_ROUNDS:
            spread = abs(session.tokens / session.rounds - self.tokens_per_round)
            self.tokens_spread += SMOOTHING * (spread - self.tokens_spread)

    def on_return(self, away_ms: float | None) -> None:
        """Update from the time that a session was away; None is ignored."""
        if away_ms is not None:
            self.away_ms = away_ms if self.away_ms is None else self.away_ms + SMOOTHING * (away_ms - self.away_ms)

    def decay(self, now_ms: float) -> None:
        """Let old prompts count less."""
        kept = math.exp(-(now_ms - self._decayed_ms) / WINDOW_MS)
        self.prompt_ms *= kept
        self.prompt_tokens *= kept
        self._decayed_ms = now_ms

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per millisecond."""
        return self.prompt_tokens / WINDOW_MS


def price_ms(verifiers: Iterable[VerifierState], averages: LoadAverages) -> float:
    """Return what verifying one more token costs: the step's other rounds and runs end that much later."""
    new = averages.jobs * averages.round_tokens
    costs = [
        (max(0.0, averages.jobs - 1.0) + len(v.runs)) * cost.token_ms(v.model, new + len(v.runs)) for v in verifiers
    ]
    return sum(costs) / len(costs) if costs else 0.0


def load_message(
    fleet: VerifierFleet,
    averages: LoadAverages,
    now_ms: float,
    *,
    scheduler_id: str,
    policy: str,
    first_come: bool,
    price: float,
    draft_cap: int,
    mix: bool,
    runs: bool,
    copies: bool,
) -> Load:
    """Return the message to drafters and gateways. `Load` defines its figures."""
    usable = [v for v in fleet.verifiers.values() if v.usable]
    averages.decay(now_ms)
    message = Load(
        scheduler=scheduler_id,
        policy=policy,
        first_come=first_come,
        price_ms=price,
        queue_ms=averages.queue.ms(now_ms),
        pending=fleet.pending_count,
        without_room=len(fleet.waiting),
        draft_cap=draft_cap,
        mixed_arithmetic=mix,
        verifiers=len(usable),
        tokens_per_round=max(1.0, averages.tokens_per_round - averages.tokens_spread),
        away_ms=averages.away_ms or 0.0,
        classes=_classes(fleet, averages, now_ms),
    )
    if not usable:
        return message
    curve = verify_curve(usable, averages, draft_cap)
    figures: dict[str, object] = {
        **_verifier_figures(usable, fleet, averages, now_ms, runs=runs),
        **_demand_figures(usable, fleet, averages, runs=runs),
        "verify_ms": curve,
        "run_ms": curve[0] if runs else None,
        "runs_copy": runs and copies,
    }
    return message.model_copy(update=figures)


def verify_curve(verifiers: Sequence[VerifierState], averages: LoadAverages, draft_cap: int) -> list[float]:
    """Return the predicted times of steps in which one round verifies 0, 1, 2, … draft tokens.

    The step holds the verifier's runs and the usual number of other rounds, each with the usual number of tokens.
    """
    length, others = round(averages.length), max(0, round(averages.jobs) - 1)
    other = max(1, round(averages.round_tokens))
    curve = [0.0] * (min(draft_cap, LONGEST_CURVE) + 1)
    for verifier in verifiers:
        shape = verifier.runs.shape.copy()
        for _ in range(others):
            shape.add(other, length, other)
        for draft in range(len(curve)):
            job = draft + 1, length + draft, draft + 1
            shape.add(*job)
            curve[draft] += cost.predict_ms(verifier.model, shape) / len(verifiers)
            shape.remove(*job)
    return curve


def _verifier_figures(
    usable: list[VerifierState], fleet: VerifierFleet, averages: LoadAverages, now_ms: float, *, runs: bool
) -> dict[str, float | None]:
    """Return the fields of `Load` that are averages over the usable verifiers."""
    round_tokens, length = max(1, round(averages.round_tokens)), round(averages.length)
    fixed, own, own_of_runs, prefill, used, backlog = [], [], [], [], [], []
    shortest: list[float] = []
    for verifier in usable:
        model = verifier.model
        fixed.append(cost.fixed_ms(model))
        own.append(added_ms(model, round_tokens, length, round_tokens))
        own_of_runs.append(added_ms(model, 1, length, 1))
        run_ms = own_of_runs[-1] if runs else None
        needed = _needs(verifier.sessions.values(), averages, fixed[-1], own[-1], run_ms)
        batches = min((need.period_ms for need in needed), default=None)
        shortest += [batches] if batches else []
        prefill.append(prefill_ms(model))
        used.append(sum(need.share for need in needed) + (fixed[-1] / batches if batches else 0.0))
        backlog.append(verifier.remaining_ms(now_ms) + fleet.queues[verifier.verifier_id].work_ms)
    count = len(usable)
    held_back = sum(pending.verify.base_len for pending in fleet.waiting.values())
    return {
        "utilization": (sum(used) + averages.prompt_ms / WINDOW_MS) / count,
        "fixed_ms": sum(fixed) / count,
        "period_ms": min(shortest, default=None),
        "round_ms": sum(own) / count,
        "run_own_ms": sum(own_of_runs) / count if runs else None,
        "prefill_ms": sum(prefill) / count,
        "backlog_ms": min(backlog) + held_back * sum(prefill) / count**2,
    }


def _needs(
    sessions: Iterable[ActiveSession], averages: LoadAverages, fixed_ms: float, round_ms: float, run_ms: float | None
) -> list[StepNeed]:
    """Return what a verifier's sessions with an SLO need of its steps.

    An SLO that the verifier would miss even with its session alone is served as well as possible and counts for
    nothing.
    """
    needs = (
        step_need(
            session.tpot_ms,
            fixed_ms=fixed_ms,
            round_ms=round_ms,
            run_ms=run_ms,
            tokens_per_round=session.tokens_per_round(averages.tokens_per_round),
            away_ms=(averages.away_ms or 0.0) if session.away_ms is None else session.away_ms,
        )
        for session in sessions
        if session.tpot_ms is not None
    )
    return [need for need in needs if need is not None]


def _demand_figures(
    usable: list[VerifierState], fleet: VerifierFleet, averages: LoadAverages, *, runs: bool
) -> dict[str, float | None]:
    """Return the mean demand on the usable verifiers and their mean room, as fields of `Load`."""
    by_id = {v.verifier_id: v for v in usable}
    needs: dict[str, list[SessionNeed]] = {verifier_id: [] for verifier_id in by_id}
    for session in fleet.sessions.values():
        if session.tpot_ms is None or session.verifier_id not in by_id:
            continue
        need = session_need(
            by_id[session.verifier_id].model,
            session.tpot_ms,
            runs=runs,
            round_tokens=max(1.0, averages.round_tokens),
            tokens_per_round=session.tokens_per_round(averages.tokens_per_round),
            away_ms=(averages.away_ms or 0.0) if session.away_ms is None else session.away_ms,
        )
        if need is not None:
            needs[session.verifier_id].append(need)
    prompts = averages.prompt_ms / WINDOW_MS / len(usable)
    hides = all(hidden_tokens(v.model) for v in usable)
    return {
        "demand": sum(demand(v.model, needs[v.verifier_id], prompts) for v in usable) / len(usable),
        "room_tokens_per_ms": sum(room_tokens_per_ms(v.model, needs[v.verifier_id]) for v in usable) / len(usable)
        if hides
        else None,
    }


def prefill_ms(model: CostModel) -> float:
    """Return the predicted time per token of a prompt."""
    return added_ms(model, PREFILL_TOKENS, PREFILL_TOKENS, 0) / PREFILL_TOKENS


def _classes(fleet: VerifierFleet, averages: LoadAverages, now_ms: float) -> list[ClassLoad]:
    sessions: dict[str, int] = {}
    for session in fleet.sessions.values():
        sessions[session.service_class] = sessions.get(session.service_class, 0) + 1
    waiting: dict[str, int] = {}
    slack: dict[str, float] = {}
    for pending in fleet.pending_rounds():
        name = pending.verify.service_class
        waiting[name] = waiting.get(name, 0) + 1
        if pending.due_ms is not None:
            slack[name] = min(slack.get(name, math.inf), pending.due_ms - now_ms)
    return [
        ClassLoad(
            service_class=name,
            sessions=sessions.get(name, 0),
            waiting=waiting.get(name, 0),
            queue_ms=averages.queue_of[name].ms(now_ms) if name in averages.queue_of else 0.0,
            slack_ms=slack.get(name),
        )
        for name in sorted({*sessions, *waiting})
    ]
