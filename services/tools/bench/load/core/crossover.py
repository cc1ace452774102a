"""Time per token by number of streams, with drafts allowed, none and forced; and where forced drafts stop paying."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from services.tools.bench.load.core.record import RequestRecord

ALLOWED, PLAIN, FORCED = "allowed", "none", "forced"
WAYS = (ALLOWED, PLAIN, FORCED)
AIM = 0.03
"""Allowed drafts should take at most this share longer than the better of the other two."""

Curves = Mapping[str, Mapping[int, float]]
"""Milliseconds per token by way and number of streams."""


def ms_per_token(records: Sequence[RequestRecord]) -> float:
    """Return the median time per token of streams that ran at once, in the span in which all of them ran.

    The span begins with the last first token and ends with the first last one. Streams that never ran together count
    with their whole time after the first token.
    """
    begin = max(one.start_s * 1000 + one.arrivals[0][0] for one in records)
    end = min(one.start_s * 1000 + one.arrivals[-1][0] for one in records)
    found = [_within(one, begin, end) for one in records]
    together = [ms for ms in found if ms is not None]
    return median(together or [one.tpot_ms or 0.0 for one in records])


def _within(record: RequestRecord, begin_ms: float, end_ms: float) -> float | None:
    """Return a stream's time per token between its first and its last arrival in a span; None with too few."""
    inside = [
        (ms, count)
        for ms, count in ((record.start_s * 1000 + at, count) for at, count in record.arrivals)
        if begin_ms <= ms <= end_ms
    ]
    tokens = sum(count for _, count in inside[1:])
    return (inside[-1][0] - inside[0][0]) / tokens if tokens else None


def crossover(curves: Curves) -> float | None:
    """Return the number of streams from which on plain decoding is at least as fast as forced drafts.

    It is interpolated on logarithmic axes: 1 if drafts never pay, None if they always do.
    """
    plain, forced = curves[PLAIN], curves[FORCED]
    counts = sorted(set(plain) & set(forced))
    # Logarithm of the ratio: below 0 where drafts are faster.
    ratios = [math.log(forced[n] / plain[n]) for n in counts]
    last = max((i for i, ratio in enumerate(ratios) if ratio < 0), default=None)
    if last is None:
        return 1.0
    if last == len(counts) - 1:
        return None
    share = -ratios[last] / (ratios[last + 1] - ratios[last])
    low, high = math.log(counts[last]), math.log(counts[last + 1])
    return math.exp(low + share * (high - low))


def columns_and_rows(curves: Curves) -> tuple[list[str], list[list[Any]]]:
    """Return the table: a row for each number of streams."""
    columns = ["streams", *(f"{way} ms" for way in WAYS), "better of the two, ms", "allowed / better"]
    rows: list[list[Any]] = []
    for n in sorted(curves[PLAIN]):
        times = [curves[way].get(n) for way in WAYS]
        others = [ms for ms in times[1:] if ms is not None]
        better = min(others)
        rows.append([n, *times, better, None if times[0] is None else times[0] / better])
    return columns, rows


def verdicts(curves: Curves) -> list[str]:
    """Return the crossover, and how close allowed drafts come to the better way, as sentences."""
    found = crossover(curves)
    if found is None:
        first = f"forced drafts are faster than plain decoding up to {max(curves[PLAIN])} streams"
    elif found <= 1:
        first = "forced drafts are never faster than plain decoding"
    else:
        first = f"forced drafts are faster than plain decoding below {found:.1f} streams"
    _, rows = columns_and_rows(curves)
    worst = max(rows, key=lambda row: row[-1] or 0.0)
    verdict = "met" if worst[-1] is not None and worst[-1] <= 1 + AIM else "missed"
    return [
        first,
        f"aim: allowed drafts within {AIM:.0%} of the better way at each number; {verdict} "
        f"(at most {worst[-1]:.2f} times, with {worst[0]})",
    ]
