"""Times of rounds and draft steps, as one drafter measures them.

A round takes, besides drafting, `hops + queue + verify(k)` for k verified draft tokens, with verify(k) = b + s k.
Results report the queue time of their round, and the scheduler the queue time of all. The line is fitted to the
verifier's times with fading memory. These are times of whole batches, in which other sessions' tokens are noise;
therefore the slope leans on a prior share of b (one session, SmolLM2-135M on two cores: 54 ms, and 2.2 ms per token),
and is never negative.

Every measurement is first limited to twice the expected value: a stalled machine changes little, and a lasting change
is still followed within some tens of rounds. Short measurements are not limited, since nothing makes a measurement too
short.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.messages import Load

PRIOR_VERIFY_MS = 50.0
PRIOR_HOPS_MS = 5.0
PRIOR_STEP_MS = 0.0
"""Of a source without measurements, so that it gets tried. Copied tokens are never measured and keep this value."""
PRIOR_SLOPE = 0.04
"""Time per verified token, as a share of the time of a round without any."""
PRIOR_WEIGHT = 20.0
"""In units of Σ (k - mean k)²: the weight of five rounds of lengths 0 and 4."""
RATE = 0.1
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
        self._queue = _MovingMean(0.0)
        self._hops = _MovingMean(PRIOR_HOPS_MS)
        self._verify = _LineFit()
        self._steps: dict[str, _MovingMean] = {}

    @property
    def base_ms(self) -> float:
        """Time of a round without draft tokens."""
        return max(LEAST_MS, self._hops.value + self._queue.value + self._verify.base_ms)

    @property
    def one_way_ms(self) -> float:
        """Time of a message to the scheduler: half of the time that a round spends on the way."""
        return self._hops.value / 2

    @property
    def token_ms(self) -> float:
        """Time that one more verified token adds to a round, its price included."""
        return self._verify.slope_ms + self.price_ms

    def step_ms(self, source: str) -> float:
        """Return the time in which this source drafts one token."""
        return self._steps[source].value if source in self._steps else PRIOR_STEP_MS

    def apply_load(self, load: Load) -> None:
        """Take over the scheduler's price, draft cap and queue delay."""
        self.price_ms = load.price_ms
        self.draft_cap = load.draft_cap
        self._queue.learn(load.queue_ms)

    def learn_draft(self, source: str, steps: int, ms: float, computed: int = 0) -> None:
        """Learn from `steps` draft steps for one session in `ms`, which includes other sessions in the same calls.

        computed: committed tokens that were computed first; a draft that computed a prompt is left out.
        """
        if steps > 0 and computed <= SPARE_COMPUTED:
            self._steps.setdefault(source, _MovingMean(PRIOR_STEP_MS)).learn(ms / steps)

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

    def learn(self, measured_ms: float) -> None:
        if not 0 <= measured_ms <= LONGEST_MS:
            return
        if self.count:
            measured_ms = _limited(measured_ms, self.value)
        self.count += 1
        self.value += max(RATE, 1 / self.count) * (measured_ms - self.value)


@dataclass
class _LineFit:
    """y = base + slope k by least squares with fading sums, the slope shrunk to its prior."""

    base_ms: float = PRIOR_VERIFY_MS
    slope_ms: float = PRIOR_VERIFY_MS * PRIOR_SLOPE
    n: float = 0.0
    k: float = 0.0
    kk: float = 0.0
    y: float = 0.0
    ky: float = 0.0

    def learn(self, k: int, y: float) -> None:
        if k < 0 or not 0 <= y <= LONGEST_MS:
            return
        if self.n:
            y = _limited(y, self.base_ms + self.slope_ms * k)
        self.n = FORGETTING * self.n + 1
        self.k = FORGETTING * self.k + k
        self.kk = FORGETTING * self.kk + k * k
        self.y = FORGETTING * self.y + y
        self.ky = FORGETTING * self.ky + k * y
        mean_k, mean_y = self.k / self.n, self.y / self.n
        prior = PRIOR_SLOPE * mean_y / (1 + PRIOR_SLOPE * mean_k)
        variance, covariance = self.kk - self.k * mean_k, self.ky - self.k * mean_y
        self.slope_ms = max(0.0, (covariance + PRIOR_WEIGHT * prior) / (variance + PRIOR_WEIGHT))
        self.base_ms = max(0.0, mean_y - self.slope_ms * mean_k)
