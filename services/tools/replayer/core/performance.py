"""What a policy made of its requests, recorded or in virtual time. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.tools.replayer.core.sessions import Life
from shared.messages import Slo, Status


@dataclass
class Served:
    """What one request got. Times in milliseconds since 1970."""

    session: str
    slo: Slo | None
    service_class: str
    start_ms: float
    complete: bool = False
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When tokens came, and how many."""
    waits_ms: list[float] = field(default_factory=list)
    """How long each of its rounds waited for a batch."""
    drafted: int = 0
    verified: int = 0
    accepted: int = 0

    def job(self, queue_ms: float, drafted: int, verified: int, accepted: int) -> None:
        """A round was verified."""
        self.waits_ms.append(queue_ms)
        self.drafted += drafted
        self.verified += verified
        self.accepted += accepted

    def got(self, tokens: int, at_ms: float) -> None:
        """Tokens came."""
        if tokens:
            self.arrivals.append((at_ms, tokens))

    @property
    def tokens(self) -> int:
        """Tokens that it got."""
        return sum(tokens for _, tokens in self.arrivals)

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token."""
        return self.arrivals[0][0] - self.start_ms if self.arrivals else None

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first."""
        if self.tokens < 2:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.tokens - 1)

    @property
    def attained(self) -> bool:
        """Whether it was served whole and within its SLO."""
        if not self.complete or self.slo is None:
            return self.complete
        return (self.ttft_ms or 0.0) <= self.slo.ttft_ms and (self.tpot_ms or 0.0) <= self.slo.tpot_ms


@dataclass(frozen=True)
class Figures:
    """A policy's figures. Times in milliseconds."""

    requests: int
    complete: int
    promised: int
    """Requests with an SLO."""
    attained: int
    """Of these."""
    attained_by_class: dict[str, tuple[int, int]]
    """(attained, promised)."""
    sessions: dict[str, bool]
    """Whether each request with an SLO attained it."""
    tokens: int
    span_ms: float
    """From the first request to the last token."""
    throughput: float
    """Tokens per second."""
    goodput: float
    """Tokens per second of requests that attained their SLO, or were served whole without one."""
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


def figures(served: Sequence[Served], batches: Sequence[int]) -> Figures:
    """Sum up. batches: jobs of each."""
    promised = [one for one in served if one.slo is not None]
    classes: dict[str, tuple[int, int]] = {}
    for one in promised:
        attained, count = classes.get(one.service_class, (0, 0))
        classes[one.service_class] = attained + one.attained, count + 1
    begun_ms = min((one.start_ms for one in served), default=0.0)
    ended_ms = max((one.arrivals[-1][0] for one in served if one.arrivals), default=begun_ms)
    span_s = max(1e-9, (ended_ms - begun_ms) / 1000)
    ttft = [one.ttft_ms for one in served if one.ttft_ms is not None]
    tpot = [one.tpot_ms for one in served if one.tpot_ms is not None]
    waits = [wait for one in served for wait in one.waits_ms]
    tokens = sum(one.tokens for one in served)
    return Figures(
        requests=len(served),
        complete=sum(one.complete for one in served),
        promised=len(promised),
        attained=sum(one.attained for one in promised),
        attained_by_class=dict(sorted(classes.items())),
        sessions={one.session: one.attained for one in promised},
        tokens=tokens,
        span_ms=ended_ms - begun_ms,
        throughput=tokens / span_s,
        goodput=sum(one.tokens for one in served if one.attained) / span_s,
        ttft_p50_ms=quantile(ttft, 0.5),
        ttft_p95_ms=quantile(ttft, 0.95),
        tpot_p50_ms=quantile(tpot, 0.5),
        tpot_p95_ms=quantile(tpot, 0.95),
        wait_mean_ms=sum(waits) / max(1, len(waits)),
        wait_p95_ms=quantile(waits, 0.95),
        rounds=len(waits),
        batches=len(batches),
        jobs_per_batch=sum(batches) / max(1, len(batches)),
        drafted=sum(one.drafted for one in served),
        verified=sum(one.verified for one in served),
        accepted=sum(one.accepted for one in served),
    )


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that this share of them does not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def recorded(lives: Iterable[Life]) -> Figures:
    """What these sessions really got."""
    served = []
    batches: dict[str, int] = {}
    for life in lives:
        one = Served(life.session, life.slo, life.service_class, life.start_ms or 0.0, complete=life.whole)
        for number in sorted(life.rounds):
            round_ = life.rounds[number]
            for sent in round_.jobs:
                batches[sent.batch] = len(sent.mates) + 1
            result = round_.result
            if result is None or round_.result_ms is None or result.status is not Status.COMMITTED:
                continue
            if round_.jobs:
                job = round_.jobs[-1].job
                one.job(job.queue_ms, job.drafted, result.trimmed_to, result.accepted)
            one.got(len(result.tokens), round_.result_ms)
        served.append(one)
    return figures(served, list(batches.values()))
