"""The state of a running suite, derived from its messages.

All times are milliseconds of one monotonic clock, which the caller reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from services.tools.cli.core.suite_snapshot import (
    BatchView,
    ClassView,
    EndView,
    JobView,
    PoolView,
    Rates,
    SchedulerView,
    SuiteSnapshot,
    VerifierView,
)
from shared.messages import (
    DRAFTER_BEAT_S,
    SILENT_MS,
    Batch,
    CostModel,
    DrafterHeartbeat,
    Ended,
    Heartbeat,
    Load,
    Message,
    Result,
    Status,
)

SHORT_MS = 10_000.0
LONG_MS = 60_000.0
LOST_RUN_MS = 5000.0
"""A run without a report for this long is over."""
DRAFTER_SILENT_MS = 3000 * DRAFTER_BEAT_S
BATCHES_SHOWN = 5
REFUSED = "refused"
ABORTED = "abort"


@dataclass
class _Sent:
    """A batch and the figures of its results."""

    at_ms: float
    batch: Batch
    verifier: str | None = None
    measured_ms: float | None = None
    runs: int = 0
    """Sessions in runs beside it when its first result came."""


@dataclass(frozen=True)
class _Committed:
    """A committed round, or a report of a run."""

    at_ms: float
    key: tuple[str, int]
    verifier: str
    run: bool
    tokens: int
    verified: int
    accepted: int


@dataclass
class _Verifier:
    at_ms: float
    heartbeat: Heartbeat


@dataclass(frozen=True)
class _WatchedRun:
    """A session in a run, with the state of its latest result."""

    at_ms: float
    verifier: str


class _BusyTimes:
    """Times at which a verifier was in a step, without overlaps. Results of one step report the same time."""

    def __init__(self) -> None:
        self._spans: deque[tuple[float, float]] = deque()

    def add(self, from_ms: float, to_ms: float) -> None:
        """Add a step. Steps come nearly in order of their ends."""
        while self._spans and self._spans[-1][1] >= from_ms:
            before_ms, end_ms = self._spans.pop()
            from_ms, to_ms = min(from_ms, before_ms), max(to_ms, end_ms)
        self._spans.append((from_ms, to_ms))

    def forget(self, oldest_ms: float) -> None:
        """Forget steps that ended before this time."""
        while self._spans and self._spans[0][1] < oldest_ms:
            self._spans.popleft()

    def since(self, from_ms: float) -> float:
        """Return the time in steps after `from_ms`."""
        return sum(max(0.0, to_ms - max(start_ms, from_ms)) for start_ms, to_ms in self._spans)


@dataclass
class SuiteWatch:
    """The messages of the last minute, and snapshots of the state that follows from them."""

    started_ms: float
    _verifiers: dict[str, _Verifier] = field(default_factory=dict)
    _models: dict[str, CostModel] = field(default_factory=dict)
    _drafters: dict[str, tuple[float, DrafterHeartbeat]] = field(default_factory=dict)
    _load: tuple[float, Load] | None = None
    _batches: dict[str, _Sent] = field(default_factory=dict)
    """By batch id, oldest first."""
    _rounds: deque[_Committed] = field(default_factory=deque)
    _counted: set[tuple[str, int]] = field(default_factory=set)
    """Session and round of each of `_rounds`, because a round that was sent twice has several results."""
    _ended: deque[tuple[float, Ended]] = field(default_factory=deque)
    _runs: dict[str, _WatchedRun] = field(default_factory=dict)
    """Sessions in runs."""
    _busy: dict[str, _BusyTimes] = field(default_factory=dict)
    """By verifier."""

    def feed(self, message: Message, now_ms: float) -> None:
        """Add a message; ignore kinds that the state does not depend on."""
        self._forget(now_ms)
        match message:
            case Heartbeat():
                self._verifiers[message.verifier] = _Verifier(now_ms, message)
            case DrafterHeartbeat():
                self._drafters[message.drafter] = now_ms, message
            case CostModel():
                self._models[message.verifier] = message
            case Load():
                self._load = now_ms, message
            case Batch():
                self._batches[message.batch] = _Sent(now_ms, message)
            case Result():
                self._result(message, now_ms)
            case Ended():
                self._ended.append((now_ms, message))
                self._runs.pop(message.session, None)

    def _result(self, result: Result, now_ms: float) -> None:
        if (sent := self._batches.get(result.batch)) is not None:
            if sent.verifier is None:
                sent.runs = sum(run.verifier == result.verifier for run in self._runs.values())
            sent.verifier, sent.measured_ms = result.verifier, result.verify_ms
        self._busy.setdefault(result.verifier, _BusyTimes()).add(now_ms - result.verify_ms, now_ms)
        if result.run_left:
            self._runs[result.session] = _WatchedRun(now_ms, result.verifier)
        else:
            self._runs.pop(result.session, None)
        key = result.session, result.round
        if result.status is Status.COMMITTED and key not in self._counted:
            self._counted.add(key)
            self._rounds.append(
                _Committed(
                    now_ms,
                    key,
                    result.verifier,
                    result.run,
                    len(result.tokens),
                    # As in the metrics, copies of runs are no drafts.
                    0 if result.run else result.trimmed_to,
                    0 if result.run else result.accepted,
                )
            )

    def _forget(self, now_ms: float) -> None:
        oldest = now_ms - LONG_MS
        while self._rounds and self._rounds[0].at_ms < oldest:
            self._counted.discard(self._rounds.popleft().key)
        while self._ended and self._ended[0][0] < oldest:
            self._ended.popleft()
        while self._batches and (first := next(iter(self._batches.items())))[1].at_ms < oldest:
            del self._batches[first[0]]
        for name in [name for name, known in self._verifiers.items() if known.at_ms < oldest]:
            del self._verifiers[name]
            self._busy.pop(name, None)
        for busy in self._busy.values():
            busy.forget(oldest)
        for session in [session for session, run in self._runs.items() if run.at_ms < now_ms - LOST_RUN_MS]:
            del self._runs[session]
        for name in [name for name, (at_ms, _) in self._drafters.items() if at_ms < oldest]:
            del self._drafters[name]
        if self._load is not None and self._load[0] < oldest:
            self._load = None

    def snapshot(self, now_ms: float) -> SuiteSnapshot:
        """Return the current state."""
        self._forget(now_ms)
        verified = sum(one.verified for one in self._rounds)
        accepted = sum(one.accepted for one in self._rounds)
        throughput = self._rates(((one.at_ms, one.tokens) for one in self._rounds), now_ms)
        return SuiteSnapshot(
            observed_ms=now_ms - self.started_ms,
            scheduler=self._scheduler(now_ms),
            verifiers=[self._verifier(name, now_ms) for name in sorted(self._verifiers)],
            pools=self._pools(now_ms),
            classes=self._classes(),
            throughput=throughput,
            goodput=self._goodput(throughput, now_ms),
            run_tokens=sum(one.tokens for one in self._rounds if one.run),
            verified=verified,
            accepted=accepted,
            acceptance=accepted / verified if verified else None,
            ends=self._ends(),
            batches=[_shown(sent, now_ms) for sent in list(self._batches.values())[: -BATCHES_SHOWN - 1 : -1]],
        )

    def _span_s(self, window_ms: float, now_ms: float) -> float:
        """Observed seconds of a window."""
        return max(1.0, min(window_ms, now_ms - self.started_ms)) / 1000

    def _rates(self, counts: Iterable[tuple[float, int]], now_ms: float) -> Rates:
        known = list(counts)
        recent = sum(count for at_ms, count in known if at_ms > now_ms - SHORT_MS)
        return Rates(
            short=recent / self._span_s(SHORT_MS, now_ms),
            long=sum(count for _, count in known) / self._span_s(LONG_MS, now_ms),
        )

    def _goodput(self, throughput: Rates, now_ms: float) -> Rates:
        """Return goodput: throughput times the share of good tokens among the sessions that ended in a window."""
        long = _good_share(ended for _, ended in self._ended)
        short = _good_share(ended for at_ms, ended in self._ended if at_ms > now_ms - SHORT_MS)
        if short is None:
            short = long
        return Rates(short=throughput.short * (short or 0.0), long=throughput.long * (long or 0.0))

    def _scheduler(self, now_ms: float) -> SchedulerView | None:
        if self._load is None:
            return None
        at_ms, load = self._load
        return SchedulerView(
            name=load.scheduler,
            silent_ms=now_ms - at_ms,
            alive=now_ms - at_ms <= SILENT_MS,
            policy=load.policy,
            verifiers=load.verifiers,
            utilization=load.utilization,
            price_ms=load.price_ms,
            pending=load.pending,
            queue_ms=load.queue_ms,
            backlog_ms=load.backlog_ms,
            draft_cap=load.draft_cap,
            tokens_per_round=load.tokens_per_round,
        )

    def _verifier(self, name: str, now_ms: float) -> VerifierView:
        known, model = self._verifiers[name], self._models.get(name)
        heartbeat = known.heartbeat
        done = [sent for sent in self._batches.values() if sent.verifier == name and sent.measured_ms is not None]
        recent = [sent for sent in done if sent.at_ms > now_ms - SHORT_MS]
        ratios = [
            sent.measured_ms / sent.batch.predicted_ms for sent in done if sent.measured_ms and sent.batch.predicted_ms
        ]
        total = heartbeat.total_tokens
        in_runs = sum(
            one.tokens for one in self._rounds if one.run and one.verifier == name and one.at_ms > now_ms - SHORT_MS
        )
        jobs = sum(len(sent.batch.jobs) for sent in recent) + in_runs
        span_s = self._span_s(SHORT_MS, now_ms)
        busy = self._busy.get(name, _BusyTimes())
        return VerifierView(
            name=name,
            alive=now_ms - known.at_ms <= SILENT_MS,
            silent_ms=now_ms - known.at_ms,
            draining=heartbeat.draining,
            arithmetic=heartbeat.arithmetic,
            cache_used=(total - heartbeat.free_tokens) / total if total else 0.0,
            cache_tokens=total,
            sessions=len(heartbeat.residency),
            runs=sum(run.verifier == name for run in self._runs.values()),
            busy=min(1.0, busy.since(now_ms - 1000 * span_s) / (1000 * span_s)),
            jobs_per_s=jobs / span_s,
            batch_jobs=sum(len(sent.batch.jobs) + sent.runs for sent in done) / len(done) if done else None,
            predicted_ms=done[-1].batch.predicted_ms if done else None,
            measured_ms=done[-1].measured_ms if done else None,
            ratio_p50=median(ratios) if ratios else None,
            samples=model.samples if model else None,
        )

    def _pools(self, now_ms: float) -> list[PoolView]:
        live = [beat for at_ms, beat in self._drafters.values() if now_ms - at_ms <= DRAFTER_SILENT_MS]
        return [_pool(pool, [beat for beat in live if beat.pool == pool]) for pool in sorted({b.pool for b in live})]

    def _classes(self) -> list[ClassView]:
        loads = {one.service_class: one for one in self._load[1].classes} if self._load else {}
        names = {*loads, *(ended.service_class for _, ended in self._ended)}
        views = []
        for name in sorted(names):
            load = loads.get(name)
            ended = [one for _, one in self._ended if one.service_class == name]
            own = [one for one in ended if one.reason not in (REFUSED, ABORTED)]
            promised = [one for one in own if one.slo is not None]
            attained = sum(one.attained for one in promised)
            views.append(
                ClassView(
                    service_class=name,
                    sessions=load.sessions if load else 0,
                    waiting=load.waiting if load else 0,
                    queue_ms=load.queue_ms if load else None,
                    slack_ms=load.slack_ms if load else None,
                    ended=len(own),
                    promised=len(promised),
                    attained=attained,
                    attainment=attained / len(promised) if promised else None,
                    refused=sum(one.reason == REFUSED for one in ended),
                )
            )
        return views

    def _ends(self) -> list[EndView]:
        counts: dict[tuple[str, str], int] = {}
        for _, ended in self._ended:
            key = ended.service_class, f"{ended.reason} {ended.code}".rstrip()
            counts[key] = counts.get(key, 0) + 1
        return [EndView(*key, count) for key, count in sorted(counts.items())]


def _pool(pool: str, beats: Sequence[DrafterHeartbeat]) -> PoolView:
    learned = [beat.learning for beat in beats if beat.learning is not None]
    return PoolView(
        pool=pool,
        drafters=sum(beat.drafts for beat in beats),
        sessions=sum(beat.sessions for beat in beats if beat.drafts),
        undrafted=sum(beat.sessions for beat in beats if not beat.drafts),
        learned=sum(one.version > 0 for one in learned),
        learned_acceptance=fmean(one.acceptance for one in learned) if learned else None,
        shipped_acceptance=fmean(one.shipped_acceptance for one in learned) if learned else None,
    )


def _good_share(ended: Iterable[Ended]) -> float | None:
    """Return the share of the sessions' tokens that belong to sessions that attained their SLO; None without tokens."""
    known = list(ended)
    tokens = sum(one.tokens for one in known)
    return sum(one.tokens for one in known if one.attained) / tokens if tokens else None


def _shown(sent: _Sent, now_ms: float) -> BatchView:
    batch = sent.batch
    return BatchView(
        batch=batch.batch,
        verifier=sent.verifier,
        age_ms=now_ms - sent.at_ms,
        policy=batch.policy,
        predicted_ms=batch.predicted_ms,
        measured_ms=sent.measured_ms,
        runs=sent.runs,
        jobs=[
            JobView(
                session=job.session,
                round=job.round,
                service_class=job.service_class,
                prefill_to=job.prefill_to,
                draft=len(job.draft),
                drafted=job.drafted,
                queue_ms=job.queue_ms,
                slack_ms=job.slack_ms,
                reason=job.reason,
            )
            for job in batch.jobs
        ],
        waiting=batch.waiting,
        left_out=[(one.session, one.reason) for one in batch.left_out],
    )
