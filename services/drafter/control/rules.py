"""Stop rules: whether to send a drafted token, and whether to draft another.

`RULES` lists them by name; settings and the command line take their choices from it. To add a rule, subclass `StopRule`
and add it to `RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from services.drafter.control.features import DraftToken, Features
from services.drafter.control.weights import ControlWeights, Predictor
from shared.errors import SettingsError


@dataclass
class RoundForecast:
    """Expected outcome of a round with the tokens kept so far."""

    ms: float
    """Time of the round, the drafting done so far included."""
    added_ms: Sequence[float]
    """Time that verifying 0, 1, 2, … tokens adds to a round, their price included; ends with the longest draft."""
    plain_rate: float = 0.0
    """Tokens per millisecond that the session gets without rounds, in a run; 0 if there are no runs."""
    tokens: float = 1.0
    """Expected tokens: the bonus token, and each kept draft token times its survival."""
    survival: float = 1.0
    """Probability that all kept tokens are accepted."""
    kept: int = 0

    @property
    def rate(self) -> float:
        """Tokens per millisecond of the round as it is, or without rounds if that is more."""
        return max(self.tokens / self.ms, self.plain_rate)

    @property
    def deficit(self) -> float:
        """Tokens that the round as it is lacks against as much time without rounds."""
        return max(0.0, self.plain_rate * self.ms - self.tokens)

    def keep(self, acceptance: float) -> None:
        """Add a token with the given acceptance after its predecessors, and the time to verify it."""
        self.ms += self.more_ms(1)
        self.kept += 1
        self.survival *= acceptance
        self.tokens += self.survival

    def more_ms(self, count: int) -> float:
        """Return the time that verifying `count` more tokens adds."""
        return self.added_ms[self.kept + count] - self.added_ms[self.kept]


class ScoredToken(NamedTuple):
    """A drafted token with its features and its calibrated acceptance."""

    token: DraftToken
    features: Features
    acceptance: float


class NextTokens(NamedTuple):
    """The tokens that a source may draft next."""

    step_ms: float
    """Time to draft one of them."""
    acceptances: Sequence[float]
    """Possible acceptances of the first one, equally likely."""
    mean: float
    """Their mean."""
    later: Sequence[float] = ()
    """Expected acceptance of each one after it, given that its predecessors are accepted."""


class StopRule:
    """Decides when one session's draft ends. One object per session, since some rules learn."""

    needs_predictor: ClassVar[bool] = False
    """True if the rule needs trained weights (`ControlWeights.predictor`)."""
    reads_model_statistics: ClassVar[bool] = False
    """True if the rule decides by the statistics of a draft model; copied tokens get another criterion."""

    @classmethod
    def for_session(cls, weights: ControlWeights) -> StopRule:
        """Make the rule of a new session. Raises SettingsError when `weights` lack something that it needs."""
        return cls()

    def keeps(self, forecast: RoundForecast, token: ScoredToken, following: NextTokens) -> bool:
        """Return whether a drafted token is worth verifying. following: the tokens that may be drafted after it."""
        raise NotImplementedError

    def goes_on(self, forecast: RoundForecast, following: NextTokens) -> bool:
        """Return whether to draft another token, the first of `following`."""
        return True

    def pays(self, forecast: RoundForecast) -> bool:
        """Return whether to send the finished draft, rather than to leave the session to the verifier."""
        return True

    def learn(self, verified: int, accepted: int) -> None:
        """Learn from a verified round."""


class Fixed(StopRule):
    """Always draft to the longest length."""

    def keeps(self, forecast: RoundForecast, token: ScoredToken, following: NextTokens) -> bool:
        return True


class Marginal(StopRule):
    """Draft while more tokens raise the expected tokens per time, E / T of the round.

    The time of a drafted token is spent; the token is kept if its survival S is worth its verification:
    S > (E / T) added_ms. A token not drafted yet costs its step in any case, and its verification only if it is kept:
    mean(max(0, S a - (E / T) added_ms)) > (E / T) step_ms, over its possible acceptances `a`. Where one token is not
    worth it, several together may be, since the first verified token can cost more than those after it.

    Where the verifier can decode the session in a run, E / T is at least the run's, and the draft has to bring the
    tokens that a round lacks against that: it pays for messages and queue, which a run does without.

    E / T is the round's own. In simulated sessions of independent tokens, the best constant rate in its place, found by
    trying, brought at most 2 % more, so a session's long-run rate is not worth learning.
    """

    def keeps(self, forecast: RoundForecast, token: ScoredToken, following: NextTokens) -> bool:
        survival = forecast.survival * token.acceptance
        if survival > forecast.deficit + forecast.rate * forecast.more_ms(1):
            return True
        return _pays(forecast, survival, survival, 1, (following.mean, *following.later), following.step_ms)

    def goes_on(self, forecast: RoundForecast, following: NextTokens) -> bool:
        rate, survival = forecast.rate, forecast.survival
        acceptances, least = following.acceptances, rate * forecast.more_ms(1)
        worth = [tokens for a in acceptances if (tokens := survival * a) > least]
        if sum(worth) - least * len(worth) > len(acceptances) * (forecast.deficit + rate * following.step_ms):
            return True
        return _pays(forecast, 0.0, forecast.survival, 0, (following.mean, *following.later), following.step_ms)

    def pays(self, forecast: RoundForecast) -> bool:
        return forecast.deficit == 0.0


def _pays(
    forecast: RoundForecast, gain: float, survival: float, drafted: int, later: Iterable[float], step_ms: float
) -> bool:
    """Return whether the `drafted` tokens not kept yet, and some number of those after them, together raise E / T
    above the round's and a run's.

    gain, survival: expected tokens of the former, and the probability that all are accepted. later: acceptances of the
    others. step_ms: the time to draft one of these.
    """
    rate, deficit = forecast.rate, forecast.deficit
    added_ms, first = forecast.added_ms, forecast.kept + drafted
    kept_ms = added_ms[forecast.kept]
    for steps, acceptance in enumerate(islice(later, len(added_ms) - 1 - first), 1):
        survival *= acceptance
        gain += survival
        if gain > deficit + rate * (added_ms[first + steps] - kept_ms + steps * step_ms):
            return True
    return False


class Entropy(StopRule):
    """Stop where the draft's entropy H is high: keep while 1 - sqrt(0.2 H), a bound on acceptance, is over a threshold.

    After AdaEDL (arXiv 2410.18351, with its factor 0.2) and, like it, without training: the threshold moves the share
    of accepted tokens towards a target (steps and target are ours). Copied tokens have no entropy and are all kept.
    """

    reads_model_statistics = True
    FACTOR = 0.2
    TARGET = 0.7
    STEP = 0.01
    SMOOTHING = 0.5

    def __init__(self) -> None:
        self.threshold = 0.4
        self._share = self.TARGET

    def keeps(self, forecast: RoundForecast, token: ScoredToken, following: NextTokens) -> bool:
        if token.token.support:
            return True
        return 1 - math.sqrt(self.FACTOR * max(0.0, token.token.entropy)) >= self.threshold

    def learn(self, verified: int, accepted: int) -> None:
        if verified == 0:
            # The rule sent nothing, or all of it was trimmed: relax slowly.
            self.threshold = max(0.0, self.threshold - self.STEP / 10)
            return
        self._share += self.SMOOTHING * (accepted / verified - self._share)
        step = self.STEP if self._share < self.TARGET else -self.STEP
        self.threshold = min(0.95, max(0.0, self.threshold + step))


class Predicted(StopRule):
    """WISP's rule (arXiv 2601.11652): the draft ends where the predictor expects a rejection.

    The predictor was trained on tokens of models; copied tokens are judged by their calibrated acceptance.
    """

    needs_predictor = True
    reads_model_statistics = True

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    @classmethod
    def for_session(cls, weights: ControlWeights) -> StopRule:
        if weights.predictor is None:
            raise SettingsError(
                "the stop rule 'predictor' needs trained weights; train them with `wisp controller train`, or choose "
                f"{', '.join(name for name, rule in RULES.items() if not rule.needs_predictor)}"
            )
        return cls(weights.predictor)

    def keeps(self, forecast: RoundForecast, token: ScoredToken, following: NextTokens) -> bool:
        if token.token.support:
            return 1 - token.acceptance <= self._predictor.threshold
        return self._predictor.rejection(token.features) <= self._predictor.threshold


RULES: Mapping[str, type[StopRule]] = {
    "fixed": Fixed,
    "entropy": Entropy,
    "predictor": Predicted,
    "marginal": Marginal,
}
if TYPE_CHECKING:
    RuleName = str
else:
    # A Literal, so that settings accept these names only and list them in `--help`.
    RuleName = Literal[tuple(RULES)]
