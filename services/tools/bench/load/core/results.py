"""The results of a campaign, as written to the result file, and the capacities and tables made of them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from services.tools.bench.load.core.measures import GeneratorLag, Measures, Quantiles, Window
from services.tools.bench.load.core.search import Capacity, PooledPoint, capacity, pooled
from shared.messages import CostModel

Row = list[Any]
RIVALS = ("centralized", "sled")
"""Arms that capacities and goodput are compared with, as in the WISP paper."""
MOST_LATE = 0.02
"""Above this share of late time, a point does not show the behaviour of the emulated hardware."""


class MeasuredPoint(BaseModel):
    """One point: an arm at a number of sessions."""

    model_config = ConfigDict(frozen=True)

    arm: str
    sessions: int
    repeat: int
    measures: Measures
    lag: GeneratorLag
    costs: list[CostModel] = []
    """The verifiers' cost models at the end of the point."""
    scalings: list[tuple[float, int, str]] = []
    """Changes of the number of verifiers by the autoscaling rule: time in seconds, number, deciding metric."""
    late_share: float | None = None
    """Late time of emulated hardware / emulated time; None if nothing was emulated, or time was virtual."""

    @property
    def follows(self) -> bool:
        """True if this machine was fast enough to keep the emulated times."""
        return self.late_share is None or self.late_share <= MOST_LATE


class LoadResults(BaseModel):
    """All points so far."""

    window: Window
    points: list[MeasuredPoint] = []
    aims: list[float] = []
    """Shares of requests for which capacities were searched."""

    @property
    def arms(self) -> list[str]:
        """Arms in the order of their measurement."""
        return list(dict.fromkeys(point.arm for point in self.points))

    @property
    def by_arm(self) -> list[MeasuredPoint]:
        """The points of one arm after the other, and of each by sessions and repeat."""
        arms = self.arms
        return sorted(self.points, key=lambda point: (arms.index(point.arm), point.sessions, point.repeat))

    def tried(self, arm: str) -> list[PooledPoint]:
        """Return an arm's points with repeats pooled, fewest sessions first."""
        return pooled(
            (point.sessions, point.measures.requests, point.measures.attained)
            for point in self.points
            if point.arm == arm
        )

    def goodput(self, arm: str) -> list[tuple[int, float]]:
        """Return sessions and goodput of an arm, the mean of repeats, fewest sessions first."""
        found: dict[int, list[float]] = {}
        for point in self.points:
            if point.arm == arm:
                found.setdefault(point.sessions, []).append(point.measures.goodput)
        return [(sessions, sum(values) / len(values)) for sessions, values in sorted(found.items())]

    def most_goodput(self, arm: str) -> tuple[int, float]:
        """Return the number of sessions with the highest goodput of an arm, and that goodput."""
        return max(self.goodput(arm), key=lambda one: one[1])

    def ratios(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Return the ratios of each arm to its rivals: of the highest goodput, and of the capacity for each aim.

        A ratio to 0 is None.
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
        """Return the capacity for each aim, by arm."""
        return {arm: [capacity(self.tried(arm), aim) for aim in self.aims] for arm in self.arms}


def promise_table(points: Sequence[MeasuredPoint]) -> tuple[list[str], list[Row]]:
    """Return columns and rows: attainment and tokens per second of each point."""
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
    """Return columns and rows: TTFT and TPOT of each point, by class."""
    columns = ["arm", "n", "class", "requests"]
    columns += [f"{name} {share}" for name in ("TTFT", "TPOT") for share in ("p50", "p90", "p99")]
    rows = [
        [point.arm, point.sessions, name, of.requests, *_quantiles(of.ttft_ms), *_quantiles(of.tpot_ms)]
        for point in points
        for name, of in point.measures.classes.items()
    ]
    return columns, rows


def draft_table(points: Sequence[MeasuredPoint]) -> tuple[list[str], list[Row]]:
    """Return columns and rows: drafts and batches of each point that has them."""
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
    """Return columns and rows: the capacity of each arm, and its ratio to that of each rival."""
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
    """Return columns and rows: the highest goodput of each arm, and its ratio to that of each rival."""
    ratios = results.ratios()
    rivals = [arm for arm in RIVALS if arm in ratios]
    rows: list[Row] = []
    for arm in results.arms:
        sessions, goodput = results.most_goodput(arm)
        rows.append([arm, goodput, sessions, *(ratios[arm]["goodput"][rival] for rival in rivals)])
    return ["arm", "goodput", "n", *(f"x {rival}" for rival in rivals)], rows


def paired_table(results: LoadResults) -> tuple[list[str], list[Row]]:
    """Return columns and rows: an arm's tokens/s and goodput over those of a rival, the median of the repeats.

    Each ratio compares two points with the same requests that were measured shortly after each other.
    """
    found = {(point.arm, point.sessions, point.repeat): point.measures for point in results.points}
    pairs: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for (arm, sessions, repeat), ours in found.items():
        for rival in RIVALS:
            theirs = found.get((rival, sessions, repeat))
            if rival != arm and theirs is not None and theirs.throughput and theirs.goodput:
                pair = ours.throughput / theirs.throughput, ours.goodput / theirs.goodput
                pairs.setdefault((arm, sessions, rival), []).append(pair)
    rows: list[Row] = []
    for (arm, sessions, rival), ratios in sorted(pairs.items(), key=lambda one: (results.arms.index(one[0][0]), one)):
        tokens, goodput = (sorted(values) for values in zip(*ratios, strict=True))
        rows.append([arm, rival, sessions, len(ratios), median(tokens), median(goodput), tokens[0], tokens[-1]])
    return ["arm", "rival", "n", "repeats", "tok/s", "goodput", "least tok/s", "most tok/s"], rows


def notes(results: LoadResults, tolerance: float | None = None) -> list[str]:
    """Return sentences that explain the tables, and name late generators and failed requests."""
    window = results.window
    sentences = [
        f"requests count that were due in the {window.measure_s:g} s after {window.warm_up_s:g} s of warm-up; "
        "n is the number of sessions; failed requests ended in an error or had no whole answer by the end of the "
        "drain; goodput is tokens/s of requests that attained; TTFT and TPOT are in ms; accept "
        "is the accepted share of verified draft tokens, WDT the share of drafting time past the first rejection; "
        "interf. is a round's time in its batch minus its time alone, mean and p90; late is the generator's p99 lag"
    ]
    if results.aims:
        sentences.append(
            "capacity is the most sessions at which that share of requests attained, below the fewest at which it did "
            f"not{f'; resolution {tolerance:.0%} of it, or 1 session' if tolerance else ''}; the interval (Wilson) is "
            "that of the attainment at the capacity"
        )
    sentences += [
        f"THE GENERATOR WAS LATE: {point.arm} at {point.sessions} sessions, requests by "
        f"{point.lag.send_p99_ms:.0f} ms and its event loop by {point.lag.loop_p99_ms:.0f} ms (p99); these figures "
        "are worse than the server's"
        for point in results.points
        if point.lag.bottleneck
    ]
    sentences += [
        f"THE EMULATION WAS LATE: {point.arm} at {point.sessions} sessions, by {point.late_share:.1%} of its time "
        f"(at most {MOST_LATE:.0%} would do); these figures are this machine's, not the emulated hardware's"
        for point in results.points
        if point.late_share is not None and not point.follows
    ]
    if shares := [point.late_share for point in results.points if point.late_share is not None and point.follows]:
        sentences.append(f"in {len(shares)} points the emulation was late by at most {max(shares):.1%} of its time")
    sentences += [
        f"{point.arm} at {point.sessions} sessions: "
        + ", ".join(f"{count} x {reason}" for reason, count in point.measures.reasons.items())
        for point in results.points
        if point.measures.reasons
    ]
    return sentences


def _ratio(ours: float, theirs: float) -> float | None:
    return ours / theirs if theirs else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _quantiles(found: Quantiles | None) -> Row:
    return [None] * 3 if found is None else [found.p50, found.p90, found.p99]
