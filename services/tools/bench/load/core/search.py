"""The search for a capacity: the most sessions at which a share of requests attains its SLO.

The search assumes that attainment falls with the number of sessions. Where it does not, the smallest number that fails
decides: the capacity is the largest number below it that holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

AIMS = (0.95, 0.9, 0.99)
"""Shares of requests, in the order of the searches."""
Z = 1.96
"""Quantile of the normal distribution for a 95 % interval."""


class PooledPoint(BaseModel):
    """All measurements at one number of sessions."""

    model_config = ConfigDict(frozen=True)

    sessions: int
    requests: int
    attained: int

    @property
    def attainment(self) -> float:
        """Share of requests that attained; 0 without requests, since nothing was served."""
        return self.attained / self.requests if self.requests else 0.0


class Capacity(BaseModel):
    """The capacity for one aim. A number of sessions holds if its attainment is at least the aim."""

    model_config = ConfigDict(frozen=True)

    aim: float
    sessions: int
    """The most that hold; 0 if none do."""
    failing: int | None
    """The fewest that fail, above the capacity; None if none do."""
    requests: int = 0
    attainment: float | None = None
    low: float | None = None
    """Lower end of Wilson's 95 % interval of the attainment at `sessions`; `high` is the upper one."""
    high: float | None = None


def pooled(points: Iterable[tuple[int, int, int]]) -> list[PooledPoint]:
    """Pool points (sessions, requests, attained) by number of sessions, fewest first."""
    found: dict[int, tuple[int, int]] = {}
    for sessions, requests, attained in points:
        before = found.get(sessions, (0, 0))
        found[sessions] = (before[0] + requests, before[1] + attained)
    return [PooledPoint(sessions=n, requests=r, attained=a) for n, (r, a) in sorted(found.items())]


def next_sessions(tried: Sequence[PooledPoint], aim: float, *, first: int, most: int, tolerance: float) -> int | None:
    """Return the number of sessions to measure next; None when the capacity is known.

    It doubles from `first` until a number fails, then halves the gap until that is at most 1 session or `tolerance` of
    the number that holds.
    """
    if not tried:
        return min(first, most)
    holds, fails = _bracket(tried, aim)
    if fails is None:
        return None if holds >= most else min(2 * holds, most)
    if holds == 0:
        return fails // 2 or None
    return None if fails - holds <= max(1, tolerance * holds) else (holds + fails) // 2


def capacity(tried: Sequence[PooledPoint], aim: float) -> Capacity:
    """Return the capacity from the measured points."""
    holds, fails = _bracket(tried, aim)
    at = next((one for one in tried if one.sessions == holds), None)
    if at is None:
        return Capacity(aim=aim, sessions=0, failing=fails)
    low, high = interval(at.attained, at.requests)
    return Capacity(
        aim=aim, sessions=holds, failing=fails, requests=at.requests, attainment=at.attainment, low=low, high=high
    )


def interval(hits: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the share of `hits` in `count`."""
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, Z * Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # At 0 and 1, one end equals the share, up to rounding.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def most_points(first: int, most: int, tolerance: float) -> int:
    """Return the approximate number of points of a search for the first aim if the capacity is `most`."""
    doubling = math.ceil(math.log2(max(1.0, most / first))) + 1
    return doubling + math.ceil(math.log2(max(1.0, 0.5 / tolerance)))


def _bracket(tried: Sequence[PooledPoint], aim: float) -> tuple[int, int | None]:
    """Return the most sessions that hold, and the fewest that fail."""
    fails = min((one.sessions for one in tried if one.attainment < aim), default=None)
    holds = [one.sessions for one in tried if one.attainment >= aim and (fails is None or one.sessions < fails)]
    return max(holds, default=0), fails
