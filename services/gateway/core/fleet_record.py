"""The recent past of a fleet, derived from its messages, for people who look at it.

Everything is bounded: the record keeps the last batches, and forgets what has been silent for a while. It holds no
tokens and no full session ids, with which a stream could be resumed: a session appears as the end of its id.

All times are milliseconds of one monotonic clock, which the caller reads.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shared.messages import (
    DRAFTER_BEAT_S,
    SILENT_MS,
    CostModel,
    DrafterHeartbeat,
    Ended,
    Heartbeat,
    Load,
    Message,
    Result,
    Status,
)

BATCHES_KEPT = 400
"""Finished batches that a new viewer gets."""
OPEN_KEPT = 1000
"""Batches whose results are coming in."""
JOBS_KEPT = 1024
"""Most sessions that a batch is shown with."""
RUNS_KEPT = 1000
"""Reports of runs that a new viewer gets."""
WINDOW_MS = 10_000.0
"""Rates cover this time, or the observed part of it."""
STEP_MS = 500.0
"""Rates move in steps of this length."""
TOGETHER_MS = 100.0
"""The results of a batch come within this time of each other."""
FORGET_MS = 30_000.0
"""Time after which a silent verifier, drafter or scheduler is no longer shown."""
DRAFTER_SILENT_MS = 3000 * DRAFTER_BEAT_S
NAMES_KEPT = 500
"""Most verifiers, drafters and classes; more are not shown."""
LABEL = 6
"""Characters of a session's id that are shown. An id has 24 random ones."""
TIME_DIGITS = 2

Fields = dict[str, Any]
Known = TypeVar("Known")


def label(session_id: str) -> str:
    """Return the name under which a session is shown: the end of its answer's id, and the completion's number."""
    answer, dot, index = session_id.partition(".")
    return answer[-LABEL:] + dot + index[:4]


@dataclass
class _SeenBatch:
    """A batch as its results show it."""

    first_ms: float
    """Arrival of the first result."""
    results: dict[str, Result] = field(default_factory=dict)
    """By session."""


@dataclass
class _FleetCounts:
    """Counts of one step of time."""

    from_ms: float
    tokens: int = 0
    run_tokens: int = 0
    verified: int = 0
    accepted: int = 0
    batches: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    attained: Counter[str] = field(default_factory=Counter)
    promised: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    busy_ms: dict[str, float] = field(default_factory=dict)


@dataclass
class FleetRecord:
    """The state of a fleet, and its finished batches in order."""

    started_ms: float
    finished: deque[tuple[int, Fields]] = field(default_factory=lambda: deque(maxlen=BATCHES_KEPT))
    """The last finished batches as the feed shows them, each with its number."""
    runs: deque[tuple[int, Fields]] = field(default_factory=lambda: deque(maxlen=RUNS_KEPT))
    """The last reports of runs, numbered like the batches."""
    number: int = 0
    """Number of the last finished batch or report of a run."""
    _open: dict[tuple[str, str], _SeenBatch] = field(default_factory=dict)
    """Batches whose results are coming in, by verifier and batch; the oldest first."""
    _verifiers: dict[str, tuple[float, Heartbeat]] = field(default_factory=dict)
    _drafters: dict[str, tuple[float, DrafterHeartbeat]] = field(default_factory=dict)
    _models: dict[str, CostModel] = field(default_factory=dict)
    _load: tuple[float, Load] | None = None
    _steps: deque[_FleetCounts] = field(default_factory=deque)
    _busy_until_ms: dict[str, float] = field(default_factory=dict)

    def add(self, message: Message, now_ms: float) -> None:
        """Add a message; kinds that the record does not need are ignored."""
        match message:
            case Result():
                self._result(message, now_ms)
            case Heartbeat():
                _keep(self._verifiers, message.verifier, (now_ms, message))
            case DrafterHeartbeat():
                _keep(self._drafters, message.drafter, (now_ms, message))
            case CostModel():
                _keep(self._models, message.verifier, message)
            case Load():
                self._load = now_ms, message
            case Ended():
                self._ended(message, now_ms)

    def _result(self, result: Result, now_ms: float) -> None:
        step = self._step(now_ms)
        self._count_busy(step, result, now_ms)
        if result.status is Status.COMMITTED:
            step.tokens += len(result.tokens)
            step.run_tokens += len(result.tokens) if result.run else 0
            # Copies of runs are no drafts of the fleet's drafters: as in the metrics, they are left out.
            step.verified += 0 if result.run else result.trimmed_to
            step.accepted += 0 if result.run else result.accepted
        if result.run:
            self.number += 1
            self.runs.append((self.number, self._run_fields(result, now_ms)))
            return
        key = result.verifier, result.batch
        if key not in self._open:
            if len(self._open) >= OPEN_KEPT:
                self._finish(next(iter(self._open)))
            self._open[key] = _SeenBatch(now_ms)
        if len(results := self._open[key].results) < JOBS_KEPT:
            results[result.session] = result

    def _count_busy(self, step: _FleetCounts, result: Result, now_ms: float) -> None:
        """Count the time of the verifier's step once, although each of its sessions reports it."""
        until = self._busy_until_ms.get(result.verifier, 0.0)
        busy_ms = max(0.0, now_ms - max(until, now_ms - result.verify_ms))
        step.busy_ms[result.verifier] = step.busy_ms.get(result.verifier, 0.0) + busy_ms
        if len(self._busy_until_ms) < NAMES_KEPT or result.verifier in self._busy_until_ms:
            self._busy_until_ms[result.verifier] = now_ms

    def _ended(self, ended: Ended, now_ms: float) -> None:
        step, name = self._step(now_ms), ended.service_class
        if ended.reason == "refused":
            step.refused[name] += 1
        elif ended.reason != "abort":
            step.ended[name] += 1
            step.promised[name] += ended.slo is not None
            step.attained[name] += ended.slo is not None and ended.attained

    def _step(self, now_ms: float) -> _FleetCounts:
        if not self._steps or now_ms - self._steps[-1].from_ms >= STEP_MS:
            self._steps.append(_FleetCounts(now_ms))
            while self._steps[0].from_ms < now_ms - WINDOW_MS:
                self._steps.popleft()
        return self._steps[-1]

    def _finish(self, key: tuple[str, str]) -> None:
        seen = self._open.pop(key)
        self.number += 1
        self._step(seen.first_ms).batches += 1
        self.finished.append((self.number, _batch_fields(seen, self.started_ms)))

    def settle(self, now_ms: float) -> None:
        """Finish the batches whose results have come, and forget what has been silent for long."""
        for key in [key for key, seen in self._open.items() if now_ms - seen.first_ms >= TOGETHER_MS]:
            self._finish(key)
        for known in (self._verifiers, self._drafters):
            for name in [name for name, (at_ms, _) in known.items() if now_ms - at_ms > FORGET_MS]:
                del known[name]
        if self._load is not None and now_ms - self._load[0] > FORGET_MS:
            self._load = None
        while self._steps and self._steps[0].from_ms < now_ms - WINDOW_MS:
            self._steps.popleft()

    def news(self, after: int) -> list[Fields]:
        """Return the finished batches and reports of runs with a number above `after`, in order."""
        found = [*_after(self.finished, after), *_after(self.runs, after)]
        return [fields for _, fields in sorted(found, key=lambda pair: pair[0])]

    def state(self, now_ms: float) -> Fields:
        """Return the present state."""
        span_s = max(1.0, min(WINDOW_MS, now_ms - self.started_ms)) / 1000
        verified = sum(step.verified for step in self._steps)
        accepted = sum(step.accepted for step in self._steps)
        return {
            "now_ms": _ms(now_ms - self.started_ms),
            "tokens_per_s": round(sum(step.tokens for step in self._steps) / span_s, 1),
            "run_tokens_per_s": round(sum(step.run_tokens for step in self._steps) / span_s, 1),
            "batches_per_s": round(sum(step.batches for step in self._steps) / span_s, 1),
            "verified": verified,
            "accepted": accepted,
            "scheduler": self._scheduler(now_ms),
            "verifiers": [self._verifier(name, now_ms, span_s) for name in sorted(self._verifiers)],
            "drafters": [self._drafter(name, now_ms) for name in sorted(self._drafters)],
            "classes": self._classes(),
        }

    def _scheduler(self, now_ms: float) -> Fields | None:
        if self._load is None:
            return None
        at_ms, load = self._load
        return {
            "name": load.scheduler,
            "alive": now_ms - at_ms <= SILENT_MS,
            "policy": load.policy,
            "utilization": round(load.utilization, 3),
            "price_ms": round(load.price_ms, 3),
            "pending": load.pending,
            "queue_ms": _ms(load.queue_ms),
            "backlog_ms": _ms(load.backlog_ms),
            "without_drafters": list(load.without_drafters),
        }

    def _verifier(self, name: str, now_ms: float, span_s: float) -> Fields:
        at_ms, beat = self._verifiers[name]
        busy_ms = sum(step.busy_ms.get(name, 0.0) for step in self._steps)
        total, model = beat.total_tokens, self._models.get(name)
        return {
            "name": name,
            "alive": now_ms - at_ms <= SILENT_MS,
            "draining": beat.draining,
            "cache_used": round((total - beat.free_tokens) / total, 3) if total else 0.0,
            "cache_tokens": total,
            "sessions": len(beat.residency),
            "busy": round(min(1.0, busy_ms / (1000 * span_s)), 3),
            "ratio_p50": round(model.ratio_p50, 3) if model else None,
            "arithmetic": beat.arithmetic,
        }

    def _drafter(self, name: str, now_ms: float) -> Fields:
        at_ms, beat = self._drafters[name]
        return {
            "name": name,
            "pool": beat.pool,
            "alive": now_ms - at_ms <= DRAFTER_SILENT_MS,
            "sessions": beat.sessions,
            "max_sessions": beat.max_sessions,
            "drafts": beat.drafts,
        }

    def _classes(self) -> list[Fields]:
        loads = {one.service_class: one for one in self._load[1].classes} if self._load else {}
        names = {*loads, *(name for step in self._steps for name in (*step.ended, *step.refused))}
        found = []
        for name in sorted(names)[:NAMES_KEPT]:
            load = loads.get(name)
            found.append(
                {
                    "name": name,
                    "sessions": load.sessions if load else 0,
                    "waiting": load.waiting if load else 0,
                    "queue_ms": _ms(load.queue_ms) if load else None,
                    "slack_ms": _ms(load.slack_ms) if load and load.slack_ms is not None else None,
                    "ended": sum(step.ended[name] for step in self._steps),
                    "promised": sum(step.promised[name] for step in self._steps),
                    "attained": sum(step.attained[name] for step in self._steps),
                    "refused": sum(step.refused[name] for step in self._steps),
                }
            )
        return found

    def _run_fields(self, result: Result, now_ms: float) -> Fields:
        return {
            "kind": "run",
            "verifier": result.verifier,
            "done_ms": _ms(now_ms - self.started_ms),
            "session": label(result.session),
            "round": result.round,
            "tokens": len(result.tokens),
            "verify_ms": _ms(result.verify_ms),
            "finish": result.finish.value if result.finish else None,
        }


def _batch_fields(seen: _SeenBatch, started_ms: float) -> Fields:
    first = next(iter(seen.results.values()))
    return {
        "kind": "batch",
        "id": first.batch,
        "verifier": first.verifier,
        "done_ms": _ms(seen.first_ms - started_ms),
        "predicted_ms": _ms(first.predicted_ms) or None,
        "measured_ms": _ms(first.verify_ms),
        "jobs": [_job_fields(result) for result in seen.results.values()],
    }


def _job_fields(result: Result) -> Fields:
    committed = result.status is Status.COMMITTED
    return {
        "session": label(result.session),
        "round": result.round,
        "status": result.status.value,
        "drafted": result.drafted,
        "verified": result.trimmed_to,
        "accepted": result.accepted_drafts if committed else 0,
        "tokens": len(result.tokens) if committed else 0,
        "computed": result.new_tokens,
        "draft_ms": _ms(result.draft_ms),
        "queue_ms": _ms(result.queue_ms),
        "finish": result.finish.value if result.finish else None,
    }


def _after(known: deque[tuple[int, Fields]], after: int) -> Iterable[tuple[int, Fields]]:
    found = []
    for pair in reversed(known):
        if pair[0] <= after:
            break
        found.append(pair)
    return reversed(found)


def _keep(known: dict[str, Known], name: str, value: Known) -> None:
    """Note the latest message of a name, unless there are too many names."""
    if name in known or len(known) < NAMES_KEPT:
        known[name] = value


def _ms(value: float) -> float:
    return round(value, TIME_DIGITS)
