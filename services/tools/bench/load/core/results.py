"""What a run found, as it is kept; capacities and tables made of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from services.tools.bench.load.core.measures import GeneratorLag, Measures, Quantiles, Window
from services.tools.bench.load.core.search import Capacity, PooledPoint, capacity, pooled
from shared.messages import CostModel

Row = list[Any]
RIVALS = ("centralized", "sled")
"""What capacities and goodput are compared with: the arms that the WISP paper compares with."""


class MeasuredPoint(BaseModel):
    """One point: an arm at a number of sessions."""

    model_config = ConfigDict(frozen=True)

    arm: str
    sessions: int
    repeat: int
    measures: Measures
    lag: GeneratorLag
    costs: list[CostModel] = []
    """The verifiers' cost models at its end."""


class LoadResults(BaseModel):
    """Everything that was measured so far."""

    window: Window
    points: list[MeasuredPoint] = []
    aims: list[float] = []
    """Shares for which capacities were searched."""

    @property
    def arms(self) -> list[str]:
        """Arms in the order in which they were measured."""
        return list(dict.fromkeys(point.arm for point in self.points))

    def tried(self, arm: str) -> list[PooledPoint]:
        """An arm's points, repeats taken together, fewest sessions first."""
        return pooled(
            (point.sessions, point.measures.requests, point.measures.attained)
            for point in self.points
            if point.arm == arm
        )

    def goodput(self, arm: str) -> list[tuple[int, float]]:
        """Sessions and tokens per second of requests that attained, the mean of repeats."""
        found: dict[int, list[float]] = {}
        for point in self.points:
            if point.arm == arm:
                found.setdefault(point.sessions, []).append(point.measures.goodput)
        return [(sessions, sum(values) / len(values)) for sessions, values in sorted(found.items())]

    def most_goodput(self, arm: str) -> tuple[int, float]:
        """The number of sessions at which an arm's goodput was highest, and that goodput."""
        return max(self.goodput(arm), key=lambda one: one[1])

    def ratios(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Each arm against its rivals, by what is compared: `goodput`, its highest, and the capacity of each aim.

        None where the rival has none.
        """
        capacities = self.capacities()
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        for arm in self.arms:
            found[arm] = {"goodput": {}, **{f"capacity {aim:.0%}": {} for aim in self.aims}}
            for rival in (rival for rival in RIVALS if rival in self.arms):
                found[arm]["goodput"][rival] = _ratio(self.most_goodput(arm)[1], self.most_goodput(rival)[1])
                for ours, theirs in zip(capacities[arm], capacities[rival], strict=True):
                    found[arm][f"capacity {ours.aim:.0%}"][rival] = _ratio(ours.sessions, theirs.sessions)
        return found

    def capacities(self) -> dict[str, list[Capacity]]:
        """What is known of each aim, by arm."""
        return {arm: [capacity(self.tried(arm), aim) for aim in self.aims] for arm in self.arms}


def promise_table(points: Sequence[MeasuredPoint]) -> tuple[list[str], list[Row]]:
    """Promises kept, and tokens per second, of each point."""
    classes = list(dict.fromkeys(name for point in points for name in point.measures.classes))
    columns = ["arm", "n", "requests", "attained %", *(f"{name} %" for name in classes)]
    columns += ["refused", "failed", "goodput", "tok/s", "late ms"]
    rows: list[Row] = []
    for point in points:
        found = point.measures
        of_class = [found.classes.get(name) for name in classes]
        rows.append(
            [
                point.arm,
                point.sessions,
                found.requests,
                _percent(found.attainment),
                *(of and _percent(of.attainment) for of in of_class),
                found.refused,
                found.errors + found.cut,
                found.goodput,
                found.throughput,
                point.lag.worst_ms,
            ]
        )
    return columns, rows


def speed_table(points: Sequence[MeasuredPoint]) -> tuple[list[str], list[Row]]:
    """TTFT and TPOT of each point, by class."""
    columns = ["arm", "n", "class", "requests"]
    columns += [f"{name} {share}" for name in ("TTFT", "TPOT") for share in ("p50", "p90", "p99")]
    rows = [
        [point.arm, point.sessions, name, of.requests, *_quantiles(of.ttft_ms), *_quantiles(of.tpot_ms)]
        for point in points
        for name, of in point.measures.classes.items()
    ]
    return columns, rows


def draft_table(points: Sequence[MeasuredPoint]) -> tuple[list[str], list[Row]]:
    """Drafts and the batches that they were verified in, of each point that has them."""
    columns = ["arm", "n", "tok/ round", "drafted", "trimmed", "accept", "WDT", "interf. ms", "p90"]
    columns += ["jobs/ batch", "tok/ batch", "batch ms"]
    rows: list[Row] = []
    for point in points:
        drafts, batches, between = point.measures.drafting, point.measures.batches, point.measures.interference
        if drafts is None and batches is None:
            continue
        rows.append(
            [
                point.arm,
                point.sessions,
                drafts and drafts.tokens_per_round,
                drafts and drafts.drafted,
                drafts and drafts.trimmed,
                drafts and drafts.acceptance,
                drafts and drafts.wdt_share,
                between and between.mean_ms,
                between and between.p90_ms,
                batches and batches.jobs,
                batches and batches.tokens,
                batches and batches.ms,
            ]
        )
    return columns, rows


def capacity_table(results: LoadResults) -> tuple[list[str], list[Row]]:
    """The capacity of each arm, and its ratio to those that it is compared with."""
    found, ratios = results.capacities(), results.ratios()
    rivals = [arm for arm in RIVALS if arm in found]
    columns = ["arm", "attain %", "sessions", "fails at", "attained %", "95 % interval"]
    columns += [f"x {rival}" for rival in rivals]
    rows: list[Row] = []
    for arm, capacities in found.items():
        for one in capacities:
            between = "" if one.low is None or one.high is None else f"{one.low:.1%} to {one.high:.1%}"
            row: Row = [arm, f"{one.aim:.0%}", one.sessions, one.failing, _percent(one.attainment), between]
            row += [ratios[arm][f"capacity {one.aim:.0%}"][rival] for rival in rivals]
            rows.append(row)
    return columns, rows


def goodput_table(results: LoadResults) -> tuple[list[str], list[Row]]:
    """The highest goodput of each arm, and its ratio to those that it is compared with."""
    ratios = results.ratios()
    rivals = [arm for arm in RIVALS if arm in ratios]
    rows: list[Row] = []
    for arm in results.arms:
        sessions, goodput = results.most_goodput(arm)
        rows.append([arm, goodput, sessions, *(ratios[arm]["goodput"][rival] for rival in rivals)])
    return ["arm", "goodput", "n", *(f"x {rival}" for rival in rivals)], rows


def notes(results: LoadResults, tolerance: float | None = None) -> list[str]:
    """What a reader of the tables has to know."""
    window = results.window
    told = [
        f"counted are requests that were due in {window.measure_s:g} s after {window.warm_up_s:g} s of warming up; "
        "n are the sessions; goodput is tokens/s of requests that attained; TTFT and TPOT are in ms; accept is the "
        "share of verified draft tokens, WDT that of drafting time past the first rejection; interf. is a round's time "
        "in its batch beyond its time alone, mean and p90; late is the generator itself (p99)"
    ]
    if results.aims:
        told.append(
            "capacity is the most sessions at which the share of requests attained, below the fewest at which it did "
            f"not{f'; resolution {tolerance:.0%} of it, or 1 session' if tolerance else ''}; the interval (Wilson) is "
            "of the attainment measured there"
        )
    told += [
        f"THE GENERATOR WAS LATE: {point.arm} at {point.sessions} sessions, requests by "
        f"{point.lag.send_p99_ms:.0f} ms and its event loop by {point.lag.loop_p99_ms:.0f} ms (p99); these figures "
        "are worse than the server was"
        for point in results.points
        if point.lag.bottleneck
    ]
    told += [
        f"{point.arm} at {point.sessions} sessions: "
        + ", ".join(f"{count} x {reason}" for reason, count in point.measures.reasons.items())
        for point in results.points
        if point.measures.reasons
    ]
    return told


def _ratio(ours: float, theirs: float) -> float | None:
    return ours / theirs if theirs else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _quantiles(found: Quantiles | None) -> Row:
    return [None] * 3 if found is None else [found.p50, found.p90, found.p99]
