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
    """Return the time per token of streams that ran at once, in the span in which all of them ran.

    This is the sum of the streams' times divided by the sum of their tokens, so that what a draft costs the other
    streams counts against what it brings to its own. The span begins with the last first token and ends with the first
    last one. Streams that never ran together count with their whole time after the first token.
    """
    found = _together(records)
    return sum(ms for ms, _ in found) / max(1, sum(tokens for _, tokens in found))


def median_ms_per_token(records: Sequence[RequestRecord]) -> float:
    """Return the median stream's time per token in the same span.

    It misses what a draft brings where it makes one stream much faster and the others a little slower.
    """
    return median(ms / tokens for ms, tokens in _together(records))


def _together(records: Sequence[RequestRecord]) -> list[tuple[float, int]]:
    """Return the milliseconds and tokens of each stream in the span in which all ran."""
    begin = max(one.start_s * 1000 + one.arrivals[0][0] for one in records)
    end = min(one.start_s * 1000 + one.arrivals[-1][0] for one in records)
    found = [_within(one, begin, end) for one in records]
    return [one for one in found if one[1]] or [_within(one, -math.inf, math.inf) for one in records]


def _within(record: RequestRecord, begin_ms: float, end_ms: float) -> tuple[float, int]:
    """Return the time between a stream's first and last arrival in a span, and the tokens after the first arrival."""
    inside = [
        (ms, count)
        for ms, count in ((record.start_s * 1000 + at, count) for at, count in record.arrivals)
        if begin_ms <= ms <= end_ms
    ]
    return (inside[-1][0] - inside[0][0], sum(count for _, count in inside[1:])) if inside else (0.0, 0)


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


def columns_and_rows(curves: Curves, medians: Curves) -> tuple[list[str], list[list[Any]]]:
    """Return the table: a row for each number of streams. medians: of the median stream."""
    columns = ["streams", *(f"{way} ms" for way in WAYS), "allowed / better", "median stream, allowed / better"]
    rows: list[list[Any]] = [
        [n, *(curves[way].get(n) for way in WAYS), _to_better(curves, n), _to_better(medians, n)]
        for n in sorted(curves[PLAIN])
    ]
    return columns, rows


def _to_better(curves: Curves, n: int) -> float | None:
    """Return the time of allowed drafts divided by that of the better other way."""
    allowed = curves[ALLOWED].get(n)
    better = min(ms for way in (PLAIN, FORCED) if (ms := curves[way].get(n)) is not None)
    return None if allowed is None else allowed / better


def verdicts(curves: Curves, medians: Curves) -> list[str]:
    """Return the crossover, and how close allowed drafts come to the better way, as sentences."""
    found = crossover(curves)
    if found is None:
        first = f"forced drafts are faster than plain decoding up to {max(curves[PLAIN])} streams"
    elif found <= 1:
        first = "forced drafts are never faster than plain decoding"
    else:
        first = f"forced drafts are faster than plain decoding below {found:.1f} streams"
    aim = f"aim: allowed drafts within {AIM:.0%} of the better way at each number"
    return [first, f"{aim}; all streams together: {_verdict(curves)}; the median stream: {_verdict(medians)}"]


def _verdict(curves: Curves) -> str:
    worst, n = max((_to_better(curves, n) or 0.0, n) for n in curves[PLAIN])
    return f"{'met' if 0 < worst <= 1 + AIM else 'missed'} (at most {worst:.2f} times, with {n})"
