"""Times of rounds and draft steps, as one drafter measures them.

A round takes, besides drafting, `hops + queue + verify(k)` for k verified draft tokens. Results report the queue time
of their round, and the scheduler the queue time of all. The scheduler's `Load` has the verifiers' cost models evaluated
as a curve over k; without it (an earlier scheduler) the curve is a line. The curve is corrected by the verifier's
measured times, with fading memory: verify(k) = curve(0) (b + s x(k)), where x(k) is the curve's growth from 0 to k as a
share of curve(0). The times are those of whole batches, in which other sessions' tokens are noise; therefore s leans on
b, at which the measured times grow like the curve, and is never negative.

Every measurement is first limited to twice the expected value: a stalled machine changes little, and a lasting change
is still followed within some tens of rounds. Short measurements are not limited, since nothing makes a measurement too
short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from shared.messages import Load

PRIOR_VERIFY_MS = 50.0
PRIOR_HOPS_MS = 5.0
PRIOR_STEP_MS = 0.0
"""Step time of a source without measurements, so that it is tried. Copied tokens are never measured and keep it."""
PRIOR_SLOPE = 0.04
"""Time per verified token, as a share of the time of a round without any (SmolLM2-135M on two cores)."""
PRIOR_WEIGHT = 20.0
CURVE_WEIGHT = 100.0
"""Weights of the growth of a prior line and of a cost model's curve, in units of Σ (k - mean k)²: 20 is the weight of
five rounds of lengths 0 and 4."""
LEAST_GROWTH = 0.002
"""A curve grows by at least this share per token, so that a growth that it lacks can be learned."""
FIRST_STEPS = 3
"""Of this many first measurements of a draft step, the shortest counts: the first calls of a model are slow."""
TYPICAL_DRAFT = 4
RATE = 0.1
PROBE_RATE = 0.5
"""Weight of a probe that was faster than expected."""
FORGETTING = 0.97
OUTLIER = 2.0
SLACK_MS = 1.0
"""Measurements may exceed `OUTLIER` times the expected value by this, so that an expected value of 0 can grow."""
SPARE_TOKENS = 4
"""A round that computed this many tokens more than its own was computing a prompt."""
SPARE_COMPUTED = 16
"""Committed tokens that a draft step computes along with its own for little more than its own time."""
LEAST_MS = 0.1
LONGEST_MS = 1e9
"""Longer measurements are broken and ignored, like negative ones and NaN; sums of those up to it stay finite."""


class RoundTimes:
    """Estimates from measured rounds and drafts, and the scheduler's latest `Load`."""

    def __init__(self) -> None:
        self.price_ms = 0.0
        """Cost to other sessions of verifying one more token, in milliseconds of batch time (`Load`)."""
        self.draft_cap = 2**31
        self.runs_copy = False
        """True if verifiers use prompt lookup in runs (`Load`)."""
        self._run_ms: float | None = None
        self._queue = _MovingMean(0.0)
        self._hops = _MovingMean(PRIOR_HOPS_MS)
        self._verify = _VerifyFit()
        self._steps: dict[str, _MovingMean] = {}

    @property
    def base_ms(self) -> float:
        """Time of a round without draft tokens."""
        return max(LEAST_MS, self._hops.value + self._queue.value + self._verify.base_ms)

    @property
    def run_ms(self) -> float | None:
        """Time per token of a session that the verifier decodes in a run; None if it does not."""
        return None if self._run_ms is None else max(LEAST_MS, self._run_ms * self._verify.correction)

    @property
    def one_way_ms(self) -> float:
        """Time of a message to the scheduler: half of the time that a round spends on the way."""
        return self._hops.value / 2

    def added_ms(self, count: int) -> float:
        """Return the time that verifying `count` draft tokens adds to a round, their price included."""
        return self._verify.added_ms(count) + count * self.price_ms

    def step_ms(self, source: str) -> float:
        """Return the time in which this source drafts one token."""
        return self._steps[source].value if source in self._steps else PRIOR_STEP_MS

    def apply_load(self, load: Load) -> None:
        """Take over the scheduler's price, draft cap, queue delay and predicted verification times."""
        self.price_ms = load.price_ms
        self.draft_cap = load.draft_cap
        self._run_ms, self.runs_copy = load.run_ms, load.runs_copy
        self._queue.learn(load.queue_ms)
        self._verify.follow(load.verify_ms)

    def learn_draft(self, source: str, steps: int, ms: float, computed: int = 0) -> None:
        """Learn from `steps` draft steps for one session in `ms`, which includes other sessions in the same calls.

        computed: committed tokens that were computed first; a draft that computed a prompt is left out.
        """
        if steps > 0 and computed <= SPARE_COMPUTED:
            self._steps.setdefault(source, _MovingMean(PRIOR_STEP_MS, shortest_of=FIRST_STEPS)).learn(ms / steps)

    def learn_probe(self, source: str, steps: int, ms: float, computed: int = 0) -> None:
        """Learn from a draft that was made while a round was in flight, if it was faster than expected.

        The verifier may have computed on the same cores, so a slow one shows nothing. Since probes are rare, a fast one
        counts much.
        """
        if source not in self._steps:
            self.learn_draft(source, steps, ms, computed)
        elif steps > 0 and computed <= SPARE_COMPUTED and 0 <= ms / steps < (step := self._steps[source]).value:
            step.value += PROBE_RATE * (ms / steps - step.value)

    def learn_round(
        self, draft_length: int, round_ms: float, verify_ms: float, queue_ms: float, new_tokens: int
    ) -> None:
        """Learn from a round that was sent once.

        draft_length: verified draft tokens. round_ms: from sending to the result. new_tokens: tokens that the verifier
        computed for it; a round that computed a prompt is left out.
        """
        if new_tokens > draft_length + 1 + SPARE_TOKENS:
            return
        self._queue.learn(queue_ms)
        self._hops.learn(max(0.0, round_ms - queue_ms - verify_ms))
        self._verify.learn(draft_length, verify_ms)


def _limited(measured_ms: float, expected_ms: float) -> float:
    return min(measured_ms, expected_ms * OUTLIER + SLACK_MS)


@dataclass
class _MovingMean:
    """Exponential moving average; the plain mean while there are few measurements."""

    value: float
    count: int = 0
    shortest_of: int = 0
    """Of this many first measurements the shortest counts."""

    def learn(self, measured_ms: float) -> None:
        if not 0 <= measured_ms <= LONGEST_MS:
            return
        if self.count:
            measured_ms = _limited(measured_ms, self.value)
        if 0 < self.count < self.shortest_of:
            measured_ms = self.value = min(measured_ms, self.value)
        self.count += 1
        self.value += max(RATE, 1 / self.count) * (measured_ms - self.value)


class _VerifyFit:
    """verify(k) = curve(0) (b + s x(k)), b and s by least squares with fading sums, s shrunk to b."""

    def __init__(self) -> None:
        self._take((PRIOR_VERIFY_MS, PRIOR_VERIFY_MS * (1 + PRIOR_SLOPE)))
        self._weight = PRIOR_WEIGHT
        self._restart()

    def _take(self, curve: Sequence[float]) -> None:
        self._curve = curve
        growth = [max(0.0, ms / curve[0] - 1) for ms in curve]
        self._last_growth = growth[-1]
        self._shares = [max(share, LEAST_GROWTH * count) for count, share in enumerate(growth)]

    def _restart(self) -> None:
        self._base, self._growth = 1.0, 1.0
        self._n = self._x = self._xx = self._y = self._xy = 0.0

    @property
    def correction(self) -> float:
        """Measured time as a share of the curve's."""
        return self._base

    @property
    def base_ms(self) -> float:
        """Time without draft tokens."""
        return self._curve[0] * self._base

    def added_ms(self, count: int) -> float:
        """Return the time that `count` draft tokens add."""
        return self._curve[0] * self._growth * self._share(count)

    def _share(self, count: int) -> float:
        """Return x: the curve's growth to `count` tokens, beyond its end as steep as on average."""
        last = len(self._shares) - 1
        if count <= last:
            return self._shares[count]
        return max(self._last_growth * (count / last), LEAST_GROWTH * count)

    def follow(self, curve: Sequence[float]) -> None:
        """Take a cost model's curve: predicted times for 0, 1, 2, … draft tokens. An empty one changes nothing."""
        if len(curve) < 2 or not curve[0] >= LEAST_MS or not max(curve) <= LONGEST_MS:
            return
        if self._weight != CURVE_WEIGHT:
            self._weight = CURVE_WEIGHT
            self._restart()
        self._take(list(accumulate(curve, max)))

    def learn(self, count: int, ms: float) -> None:
        """Learn from a measured time."""
        if count < 0 or not 0 <= ms <= LONGEST_MS:
            return
        if self._n:
            ms = _limited(ms, self.base_ms + self.added_ms(count))
        x, y = self._share(count), ms / self._curve[0]
        self._n = FORGETTING * self._n + 1
        self._x = FORGETTING * self._x + x
        self._xx = FORGETTING * self._xx + x * x
        self._y = FORGETTING * self._y + y
        self._xy = FORGETTING * self._xy + x * y
        mean_x, mean_y = self._x / self._n, self._y / self._n
        weight = self._weight * (self._share(TYPICAL_DRAFT) / TYPICAL_DRAFT) ** 2
        variance, covariance = max(0.0, self._xx - self._x * mean_x), self._xy - self._x * mean_y
        prior = mean_y / (1 + mean_x)
        self._growth = max(0.0, (covariance + weight * prior) / (variance + weight))
        self._base = max(0.0, mean_y - self._growth * mean_x)
