"""Performance of a batch policy: speed, SLO attainment and draft use, of a recording or of a run in virtual time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.tools.replayer.core.sessions import RecordedSession
from shared.messages import Slo, Status
from shared.slo import is_within


@dataclass
class ServedRequest:
    """Service of one request. Times in milliseconds since 1970."""

    session_id: str
    slo: Slo | None
    service_class: str
    start_ms: float
    complete: bool = False
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Arrival times of tokens, each with their number."""
    waits_ms: list[float] = field(default_factory=list)
    """Time that each round was pending at the scheduler."""
    drafted: int = 0
    verified: int = 0
    accepted: int = 0

    def add_round(self, queue_ms: float, drafted: int, verified: int, accepted: int) -> None:
        """Count a verified round."""
        self.waits_ms.append(queue_ms)
        self.drafted += drafted
        self.verified += verified
        self.accepted += accepted

    def add_tokens(self, tokens: int, at_ms: float) -> None:
        """Count tokens that arrived at a time."""
        if tokens:
            self.arrivals.append((at_ms, tokens))

    @property
    def tokens(self) -> int:
        """Number of tokens that arrived."""
        return sum(tokens for _, tokens in self.arrivals)

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token."""
        return self.arrivals[0][0] - self.start_ms if self.arrivals else None

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first arrival."""
        if self.tokens < 2:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.tokens - 1)

    @property
    def attained(self) -> bool:
        """True if the request is complete and attained its SLO, if it has one."""
        return self.complete and is_within(self.slo, self.ttft_ms or 0.0, self.tpot_ms)


@dataclass(frozen=True)
class Performance:
    """A policy's figures over a set of requests. The fields are the keys of `wisp replay --policy --json`."""

    requests: int
    complete: int
    promised: int
    """Requests with an SLO."""
    attained: int
    """Requests that attained their SLO."""
    attained_by_class: dict[str, tuple[int, int]]
    """(attained, promised) of each service class."""
    sessions: dict[str, bool]
    """True if each request with an SLO attained it."""
    tokens: int
    span_ms: float
    """From the first request to the last token."""
    throughput: float
    """Tokens per second."""
    goodput: float
    """Tokens per second of requests that attained their SLO, or completed without one."""
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tpot_p50_ms: float | None
    tpot_p95_ms: float | None
    wait_mean_ms: float
    wait_p95_ms: float | None
    rounds: int
    batches: int
    jobs_per_batch: float
    drafted: int
    verified: int
    accepted: int


def performance(served: Sequence[ServedRequest], batch_sizes: Sequence[int]) -> Performance:
    """Sum up requests. batch_sizes: number of jobs of each batch."""
    promised = [request for request in served if request.slo is not None]
    classes: dict[str, tuple[int, int]] = {}
    for request in promised:
        attained, count = classes.get(request.service_class, (0, 0))
        classes[request.service_class] = attained + request.attained, count + 1
    begun_ms = min((request.start_ms for request in served), default=0.0)
    ended_ms = max((request.arrivals[-1][0] for request in served if request.arrivals), default=begun_ms)
    span_s = max(1e-9, (ended_ms - begun_ms) / 1000)
    ttft = [request.ttft_ms for request in served if request.ttft_ms is not None]
    tpot = [request.tpot_ms for request in served if request.tpot_ms is not None]
    waits = [wait for request in served for wait in request.waits_ms]
    tokens = sum(request.tokens for request in served)
    return Performance(
        requests=len(served),
        complete=sum(request.complete for request in served),
        promised=len(promised),
        attained=sum(request.attained for request in promised),
        attained_by_class=dict(sorted(classes.items())),
        sessions={request.session_id: request.attained for request in promised},
        tokens=tokens,
        span_ms=ended_ms - begun_ms,
        throughput=tokens / span_s,
        goodput=sum(request.tokens for request in served if request.attained) / span_s,
        ttft_p50_ms=quantile(ttft, 0.5),
        ttft_p95_ms=quantile(ttft, 0.95),
        tpot_p50_ms=quantile(tpot, 0.5),
        tpot_p95_ms=quantile(tpot, 0.95),
        wait_mean_ms=sum(waits) / max(1, len(waits)),
        wait_p95_ms=quantile(waits, 0.95),
        rounds=len(waits),
        batches=len(batch_sizes),
        jobs_per_batch=sum(batch_sizes) / max(1, len(batch_sizes)),
        drafted=sum(request.drafted for request in served),
        verified=sum(request.verified for request in served),
        accepted=sum(request.accepted for request in served),
    )


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the value at this share of the sorted values; None without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def recorded_performance(sessions: Iterable[RecordedSession]) -> Performance:
    """Sum up sessions as they were recorded."""
    served = []
    batch_sizes: dict[str, int] = {}
    for session in sessions:
        request = ServedRequest(
            session.session_id, session.slo, session.service_class, session.start_ms or 0.0, complete=session.complete
        )
        for number in sorted(session.rounds):
            round_ = session.rounds[number]
            for job in round_.jobs:
                batch_sizes[job.batch_id] = len(job.mates) + 1
            result = round_.result
            if result is None or round_.result_ms is None or result.status is not Status.COMMITTED:
                continue
            if round_.jobs:
                last = round_.jobs[-1].job
                request.add_round(last.queue_ms, last.drafted, result.trimmed_to, result.accepted)
            request.add_tokens(len(result.tokens), round_.result_ms)
        for run in session.runs:
            for report, at_ms in zip(run.reports, run.sent_ms, strict=True):
                if at_ms is not None and report.status is Status.COMMITTED:
                    request.add_tokens(len(report.tokens), at_ms)
        request.arrivals.sort()
        served.append(request)
    return performance(served, list(batch_sizes.values()))
