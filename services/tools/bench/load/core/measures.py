"""The measures of a point, from the records of its requests.

Requests count that were due in the window, whenever they ended. Tokens per second count the tokens that arrived in the
window, of any request. Both are unbiased, as the load stays the same before, during and after the window.

- **attainment**: share of the counted requests that attained their SLO; refused, failed and cut ones did not.
- **goodput**, **throughput**: output tokens per second, of requests that attained and of all.
- **acceptance**: accepted / verified draft tokens. **trimmed**: drafted and not verified.
- **WDT share**: drafting time past the first rejection / drafting time. A round with a accepted of d drafted tokens
  wasted (d - a - 1) / d of its drafting time.
- **interference**: time of a round's batch minus the time of the round alone, by the verifier's cost model at the end
  of the point. The first round of a session, which computes the prompt, does not count. Values below 0 are kept, so
  that noise averages out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from services.drafter.core.session import wasted_tokens
from services.tools.bench.load.core.record import Ending, RequestRecord
from shared.cost.model import predict_ms, shape_of
from shared.messages import CostModel, Measurement

LAG_LIMIT_MS = 50.0
"""A generator whose 99th percentile of lag is above this was the bottleneck."""


class _Measure(BaseModel):
    model_config = ConfigDict(frozen=True)


class Window(_Measure):
    """The phases of a point, in seconds."""

    warm_up_s: float
    measure_s: float
    drain_s: float
    """Longest wait for requests of the window after its end."""

    @property
    def end_s(self) -> float:
        """End of the window, since the start of the point."""
        return self.warm_up_s + self.measure_s

    def counts(self, start_s: float) -> bool:
        """Return whether a request counts that was due at `start_s`."""
        return self.warm_up_s <= start_s < self.end_s


class GeneratorLag(_Measure):
    """The lag of the generator itself in milliseconds, and its CPU time per second."""

    send_p50_ms: float
    send_p99_ms: float
    loop_p50_ms: float
    loop_p99_ms: float
    loop_max_ms: float
    cpu_share: float

    @property
    def worst_ms(self) -> float:
        """The larger of the two 99th percentiles."""
        return max(self.send_p99_ms, self.loop_p99_ms)

    @property
    def bottleneck(self) -> bool:
        """True if the generator was too slow to measure the server."""
        return self.worst_ms > LAG_LIMIT_MS


class Quantiles(_Measure):
    """Quantiles of a time, in milliseconds."""

    p50: float
    p90: float
    p99: float


class ClassMeasures(_Measure):
    """The counted requests of one class."""

    requests: int
    attained: int
    refused: int
    ttft_ms: Quantiles | None
    tpot_ms: Quantiles | None

    @property
    def attainment(self) -> float | None:
        """Share of the requests that attained their SLO."""
        return self.attained / self.requests if self.requests else None


class DraftMeasures(_Measure):
    """Drafts of the counted requests."""

    rounds: int
    tokens_per_round: float
    drafted: int
    verified: int
    accepted: int
    trimmed: int
    acceptance: float | None
    draft_ms: float
    wdt_share: float | None


class BatchMeasures(_Measure):
    """Batches that the verifiers measured during the point: means, and the 90th percentile."""

    count: int
    jobs: float
    tokens: float
    ms: float
    ms_p90: float


class InterferenceMeasures(_Measure):
    """Interference of rounds, in milliseconds."""

    rounds: int
    mean_ms: float
    p90_ms: float


class Measures(_Measure):
    """The measures of one point."""

    requests: int
    complete: int
    attained: int
    refused: int
    errors: int
    cut: int
    tokens: int
    goodput: float
    throughput: float
    ttft_ms: Quantiles | None
    tpot_ms: Quantiles | None
    classes: dict[str, ClassMeasures]
    drafting: DraftMeasures | None
    """None without traces."""
    interference: InterferenceMeasures | None
    """None without a cost model."""
    batches: BatchMeasures | None
    reasons: dict[str, int]
    """Number of refused and failed requests by reason."""

    @property
    def attainment(self) -> float | None:
        """Share of the counted requests that attained their SLO."""
        return self.attained / self.requests if self.requests else None


def measure(
    records: Sequence[RequestRecord],
    window: Window,
    costs: Sequence[CostModel] = (),
    batches: Sequence[Measurement] = (),
) -> Measures:
    """Return the measures of a point.

    costs: the verifiers' cost models; batches: the batches that they measured.
    """
    counted = [record for record in records if window.counts(record.start_s)]
    attained = [record for record in records if record.attained]
    return Measures(
        requests=len(counted),
        complete=_count(counted, Ending.COMPLETE),
        attained=sum(record.attained for record in counted),
        refused=_count(counted, Ending.REFUSED),
        errors=_count(counted, Ending.ERROR),
        cut=_count(counted, Ending.CUT),
        tokens=sum(record.tokens for record in counted),
        goodput=_rate(attained, window),
        throughput=_rate(records, window),
        ttft_ms=quantiles(record.ttft_ms for record in counted),
        tpot_ms=quantiles(record.tpot_ms for record in counted),
        classes={
            name: _of_class([record for record in counted if record.service_class == name])
            for name in sorted({record.service_class for record in counted})
        },
        drafting=_drafting(counted),
        interference=_interference(counted, costs),
        batches=_batches(batches),
        reasons=_reasons(counted),
    )


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile, linear between two values (Hyndman and Fan's type 7)."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def quantiles(values: Iterable[float | None]) -> Quantiles | None:
    """Return median, 90th and 99th percentile of the values that are not None; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Quantiles(p50=quantile(known, 0.5), p90=quantile(known, 0.9), p99=quantile(known, 0.99))


def lag_of(sent_ms: Sequence[float], loop_ms: Sequence[float], cpu_share: float) -> GeneratorLag:
    """Return the generator's lag, from the lags of its requests and of a timer in its event loop."""
    sent, loop = sent_ms or [0.0], loop_ms or [0.0]
    return GeneratorLag(
        send_p50_ms=quantile(sent, 0.5),
        send_p99_ms=quantile(sent, 0.99),
        loop_p50_ms=quantile(loop, 0.5),
        loop_p99_ms=quantile(loop, 0.99),
        loop_max_ms=max(loop),
        cpu_share=cpu_share,
    )


def _count(records: Iterable[RequestRecord], ending: Ending) -> int:
    return sum(record.ending is ending for record in records)


def _rate(records: Iterable[RequestRecord], window: Window) -> float:
    return sum(record.tokens_between(window.warm_up_s, window.end_s) for record in records) / window.measure_s


def _of_class(records: Sequence[RequestRecord]) -> ClassMeasures:
    return ClassMeasures(
        requests=len(records),
        attained=sum(record.attained for record in records),
        refused=_count(records, Ending.REFUSED),
        ttft_ms=quantiles(record.ttft_ms for record in records),
        tpot_ms=quantiles(record.tpot_ms for record in records),
    )


def _drafting(records: Sequence[RequestRecord]) -> DraftMeasures | None:
    rounds = [one for record in records for one in record.rounds if not one.get("run")]
    if not rounds:
        return None
    drafted, verified, accepted = (sum(one[name] for one in rounds) for name in ("drafted", "verified", "accepted"))
    draft_ms = sum(one["draft_ms"] for one in rounds if one["drafted"])
    wasted_ms = sum(
        one["draft_ms"] * wasted_tokens(one["drafted"], one["verified"], one["accepted"]) / one["drafted"]
        for one in rounds
        if one["drafted"]
    )
    return DraftMeasures(
        rounds=len(rounds),
        tokens_per_round=sum(one["tokens"] for one in rounds) / len(rounds),
        drafted=drafted,
        verified=verified,
        accepted=accepted,
        trimmed=drafted - verified,
        acceptance=accepted / verified if verified else None,
        draft_ms=draft_ms,
        wdt_share=wasted_ms / draft_ms if draft_ms else None,
    )


def _interference(records: Sequence[RequestRecord], costs: Sequence[CostModel]) -> InterferenceMeasures | None:
    if not costs:
        return None
    found = [
        one["verify_ms"] - _alone_ms(costs, record.prompt_tokens + one["start"], one["verified"])
        for record in records
        for one in record.rounds
        if one["start"] and one["verify_ms"] and not one.get("run")
    ]
    if not found:
        return None
    return InterferenceMeasures(rounds=len(found), mean_ms=fmean(found), p90_ms=quantile(found, 0.9))


def _alone_ms(costs: Sequence[CostModel], length: int, verified: int) -> float:
    """Return the time of a round alone, with `length` tokens before it of which the last is not cached.

    It is the mean over all verifiers, since a record does not name the verifier of a round.
    """
    shape = shape_of([(1 + verified, length + verified, 1 + verified)])
    return fmean(predict_ms(model, shape) for model in costs)


def _batches(batches: Sequence[Measurement]) -> BatchMeasures | None:
    if not batches:
        return None
    return BatchMeasures(
        count=len(batches),
        jobs=fmean(batch.shape.jobs for batch in batches),
        tokens=fmean(batch.shape.new_tokens for batch in batches),
        ms=fmean(batch.measured_ms for batch in batches),
        ms_p90=quantile([batch.measured_ms for batch in batches], 0.9),
    )


def _reasons(records: Iterable[RequestRecord]) -> dict[str, int]:
    found: dict[str, int] = {}
    for record in records:
        if record.reason:
            kind = record.reason.partition(":")[0]
            found[kind] = found.get(kind, 0) + 1
    return found
