"""One round's draft: which of a source's tokens are kept, and whether another one is drafted."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from services.drafter.control.calibration import DEEPEST
from services.drafter.control.features import DraftToken, RoundContext, features
from services.drafter.control.records import RoundRecord
from services.drafter.control.rules import NextTokens, RoundForecast, ScoredToken

if TYPE_CHECKING:
    from services.drafter.control.controller import SessionControl

LOOKAHEAD = 8
"""The rule looks this many tokens ahead."""


class DraftDecision(Enum):
    """The controller's decision about a token just drafted."""

    DROP = "drop"
    """Do not send the token; the draft ends before it."""
    LAST = "last"
    """Send the token, draft no more."""
    MORE = "more"
    """Send the token, draft another."""


class DraftedToken(NamedTuple):
    """A token that a source has drafted, with the trained model's log odds of its acceptance."""

    token: DraftToken
    model_logit: float


class DraftRound:
    """One round's draft while it is made, kept until the round is settled."""

    def __init__(
        self, session: SessionControl, longest: int, context: RoundContext, *, in_flight: bool = False
    ) -> None:
        """in_flight: it is drafted while another round is in flight, so that its draft steps delay nothing."""
        self.longest = longest
        """Most tokens to draft; 0 is plain decoding."""
        self.probed: frozenset[str] = frozenset()
        """Sources that draft the first token as a probe, although the rule does not want them."""
        self.probing = False
        """True if the draft is a probe and nothing else."""
        self.unready: frozenset[str] = frozenset()
        """Sources that cannot draft in this round."""
        self.silent = False
        """True if no token is kept."""
        self.acceptance: list[float] = []
        """Calibrated acceptance of each kept token, given that its predecessors are accepted."""
        self.drafted: list[DraftedToken] = []
        """All tokens drafted: the kept ones, and at most one dropped after them."""
        self.context = context
        self._session = session
        self._expected: dict[tuple[str, int], NextTokens] = {}
        """Expected tokens by source and position."""
        times = session.times
        self._step_ms = _no_time if in_flight else times.step_ms
        self._forecast = RoundForecast(
            times.base_ms,
            [times.added_ms(count) for count in range(longest + 1)],
            plain_rate=session.plain_rate,
        )
        self._open = True

    @property
    def kept(self) -> int:
        """Number of tokens to send."""
        return len(self.acceptance)

    @property
    def kept_tokens(self) -> list[DraftToken]:
        """The kept tokens."""
        return [drafted.token for drafted in self.drafted[: self.kept]]

    def deferred_probes(self) -> list[DraftRound]:
        """Return each probe as a silent round of its own, which this one then lacks.

        It may be drafted while this round is in flight, and is settled once the target's first token is known.
        """
        probes = []
        for source in sorted(self.probed):
            probe = DraftRound(self._session, 1, self.context)
            probe.probed, probe.silent = frozenset({source}), True
            probes.append(probe)
        self.probed = frozenset()
        if self.probing:
            self.longest = 0
        return probes

    def wants(self, source: str) -> bool:
        """Return whether another token by this source is worth its time."""
        if not self._open or self.kept >= self.longest or source in self.unready:
            return False
        if not self.drafted and self._session.runs_use(source):
            return False
        if source in self.probed and not self.drafted:
            return True
        return not self.silent and self._session.rule.goes_on(self._forecast, self._following(source, self.kept))

    def _following(self, source: str, position: int) -> NextTokens:
        """Return the tokens that a source may draft from `position` on, as expected when the round first asked."""
        session, end = self._session, min(self.longest, position + LOOKAHEAD)
        last = self.drafted[-1].token if self.drafted else None
        if last and last.support and last.source == source:
            copies = [replace(last, support=last.support + i, contested=False) for i in range(1, end - position + 1)]
            first, *later = [self.estimate(token, position + i) for i, token in enumerate(copies)] or [0.0]
            return NextTokens(self._step_ms(source), [first], first, later)
        if (known := self._expected.get((source, position))) is not None:
            return known
        acceptances, mean = session.expected_acceptances(source, position)
        later = [session.expected_acceptances(source, i)[1] for i in range(position + 1, min(end, DEEPEST + 1))]
        if (deep := end - max(position, DEEPEST) - 1) > 0:
            later += [session.expected_acceptances(source, DEEPEST)[1]] * deep
        following = NextTokens(self._step_ms(source), acceptances, mean, later)
        self._expected[source, position] = following
        return following

    def estimate(self, token: DraftToken, position: int | None = None) -> float:
        """Return the calibrated acceptance that a token would have at `position`: by default the next of this draft."""
        known = features(token, self.kept if position is None else position, self.context)
        return self._session.acceptance(token.source, self._session.calibration.model_logit(token, known))

    def add(self, token: DraftToken) -> DraftDecision:
        """Add a token just drafted, and decide whether to keep it and whether to draft another.

        In a session of several sources, `wants` decides which of them may draft the next token.
        """
        if not self._open or self.kept >= self.longest:
            return DraftDecision.DROP
        session = self._session
        known = features(token, self.kept, self.context)
        model_logit = session.calibration.model_logit(token, known)
        acceptance = session.acceptance(token.source, model_logit)
        self.drafted.append(DraftedToken(token, model_logit))
        self._forecast.ms += self._step_ms(token.source)
        if not token.support and not self.silent:
            self._forecast.plain_rate = 0.0
        scored = ScoredToken(token, known, acceptance)
        following = self._following(token.source, self.kept + 1)
        if self.silent or not session.rule.keeps(self._forecast, scored, following):
            self._open = False
            return DraftDecision.DROP
        self.acceptance.append(acceptance)
        self._forecast.keep(acceptance)
        if self.wants(token.source) or any(self.wants(one) for one in session.sources if one != token.source):
            return DraftDecision.MORE
        self._open = False
        return DraftDecision.LAST

    @property
    def pays(self) -> bool:
        """True if the draft should be sent, rather than the session left to the verifier."""
        return self._session.rule.pays(self._forecast)

    def cut(self, length: int) -> None:
        """Keep only the first `length` tokens: a source that failed has lost the others."""
        if length < self.kept:
            del self.acceptance[length:]
            self._open = False

    def record(self, session_id: str, kind: str, verified: int, accepted: int) -> RoundRecord:
        """Return the round as a training example. verified, accepted: as for `settle`."""
        return RoundRecord(
            session=session_id,
            kind=kind,
            temperature=self.context.temperature,
            target_entropy=self.context.target_entropy,
            guesses=self.kept_tokens,
            verified=verified,
            accepted=accepted,
        )


def _no_time(source: str) -> float:
    return 0.0
