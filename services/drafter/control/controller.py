"""The speculation controller: decides the length of each draft.

One `Controller` per drafter, one `SessionControl` per session, one `DraftRound` per round: `begin` starts the round,
`add` takes each token that a source drafts, `settle` learns from the result. Where drafting does not pay, a session
decodes plainly; a source that does not pay is probed now and then, since times and texts change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from services.drafter.control.calibration import REMEMBERED, Calibration, RecentLogits, SessionOffset
from services.drafter.control.features import DraftToken, RecentAcceptance, RoundContext, features, sigmoid
from services.drafter.control.records import RoundRecord
from services.drafter.control.rules import RULES, RoundForecast, RuleName, ScoredToken, StopRule
from services.drafter.control.times import RoundTimes
from services.drafter.control.weights import ControlWeights

UNKNOWN_LOGIT = 0.0
"""Log odds expected of a source that has drafted nothing yet."""
FIRST_WAIT = 4
LONGEST_WAIT = 64
"""Rounds without a source before it is probed: at first, and at most after fruitless probes doubled it."""
PROBE_LENGTH = 1


class DraftDecision(Enum):
    """The controller's decision about a token just drafted."""

    DROP = "drop"
    """Do not send the token; the draft ends before it."""
    LAST = "last"
    """Send the token, draft no more."""
    MORE = "more"
    """Send the token, draft another."""


class Controller:
    """State that the sessions of one drafter share."""

    def __init__(
        self, rule: RuleName, draft_length: int, weights: ControlWeights | None = None, times: RoundTimes | None = None
    ) -> None:
        """draft_length: longest draft. Raises SettingsError when the rule needs trained weights and has none."""
        self.weights = weights or ControlWeights()
        self._rule = RULES[rule]
        self._rule.for_session(self.weights)
        self.draft_length = draft_length
        self.times = times or RoundTimes()
        self.calibration = Calibration(self.weights.acceptance)

    def session(self, *sources: str) -> SessionControl:
        """Return the control of a new session that drafts from these sources."""
        return SessionControl(self, sources)

    def rule(self) -> StopRule:
        """Return the stop rule of a new session."""
        return self._rule.for_session(self.weights)


class SessionControl:
    """Drafting control of one session."""

    def __init__(self, controller: Controller, sources: Sequence[str]) -> None:
        self.times = controller.times
        self.calibration = controller.calibration
        self.rule = controller.rule()
        self.sources = sources
        self._draft_length = controller.draft_length
        self._recent_acceptance = RecentAcceptance()
        self._offsets: dict[str, SessionOffset] = {}
        self._recent_logits = RecentLogits()
        self._probes = {source: _SourceProbe() for source in sources}

    def begin(self, room: int, temperature: float, target_entropy: float | None = None) -> DraftRound:
        """Start a round.

        room: most draft tokens that the session can use. target_entropy: of the target's distribution that the last
        token was chosen from; known for recorded texts, not in service.
        """
        round_ = self.ahead(room, temperature, target_entropy)
        if round_.longest == 0:
            return round_
        wanted = [source for source in self.sources if round_.wants(source)]
        round_.probed = frozenset(source for source, probe in self._probes.items() if probe.due(source in wanted))
        if not wanted:
            round_.longest = min(round_.longest, PROBE_LENGTH) if round_.probed else 0
            round_.probing = bool(round_.probed)
        return round_

    def ahead(self, room: int, temperature: float, target_entropy: float | None = None) -> DraftRound:
        """Return a round that may follow the one in flight. It changes nothing until it is settled."""
        longest = max(0, min(room, self._draft_length, self.times.draft_cap))
        return DraftRound(self, longest, RoundContext(temperature, target_entropy, self._recent_acceptance.value))

    @property
    def decodes_plainly(self) -> bool:
        """True if the session drafts neither in this round nor in the next."""
        return self.times.draft_cap == 0 or all(0 < probe.idle < probe.wait for probe in self._probes.values())

    def settle(self, round_: DraftRound, verified: int, accepted: int) -> None:
        """Learn from a round's result.

        verified: how many of the kept tokens were verified: fewer than all where the draft was trimmed, or the text
        ended in an accepted token. accepted: how many of these were accepted.
        """
        verified = max(0, min(verified, round_.kept))
        accepted = max(0, min(accepted, verified))
        for i, drafted in enumerate(round_.drafted):
            if i > accepted:
                break
            source = drafted.token.source
            logit = self.calibration.logit(source, drafted.model_logit)
            self._recent_logits.add(source, i, logit)
            self.calibration.recent.add(source, i, logit)
            if i < verified:
                self._recent_acceptance.learn(i < accepted)
                self._offsets.setdefault(source, SessionOffset()).learn(logit, i < accepted)
                self.calibration.learn(source, drafted.model_logit, i < accepted)
        if round_.drafted:
            self.rule.learn(verified, accepted)
        successful = {token.source for token in round_.kept_tokens[:accepted]}
        # Trimmed tokens were kept and not verified: they show nothing about their source.
        judged = {d.token.source for i, d in enumerate(round_.drafted) if i < verified or i >= round_.kept}
        for source in round_.probed & judged:
            self._probes[source].learn(source in successful)

    def acceptance(self, source: str, model_logit: float) -> float:
        """Return the calibrated acceptance of a token, given that its predecessors are accepted."""
        return sigmoid(self.calibration.logit(source, model_logit) + self._offset(source))

    def expected_acceptances(self, source: str, position: int) -> list[float]:
        """Return acceptances that the next token of a source may have: recent ones, this session's before others'."""
        recent = self.calibration.recent.latest(source, position) + self._recent_logits.latest(source, position)
        offset = self._offset(source)
        return [sigmoid(logit + offset) for logit in recent[-REMEMBERED:] or [UNKNOWN_LOGIT]]

    def _offset(self, source: str) -> float:
        return self._offsets[source].value if source in self._offsets else 0.0


@dataclass
class _SourceProbe:
    """Timing of the probes: rounds drafted by a source although the rule finds that it does not pay."""

    idle: int = 0
    """Rounds without the source."""
    wait: int = FIRST_WAIT

    def due(self, wanted: bool) -> bool:
        """Return whether a round probes the source; called once per round. wanted: by the rule."""
        if wanted:
            self.idle, self.wait = 0, FIRST_WAIT
        elif self.idle >= self.wait:
            self.idle = 0
            return True
        else:
            self.idle += 1
        return False

    def learn(self, successful: bool) -> None:
        """Set the wait for the next probe. successful: whether this one brought an accepted token."""
        self.wait = FIRST_WAIT if successful else min(2 * self.wait, LONGEST_WAIT)


@dataclass(frozen=True)
class DraftedToken:
    """A token that a source has drafted, with the trained model's log odds of its acceptance."""

    token: DraftToken
    model_logit: float


class DraftRound:
    """One round's draft while it is made, kept until the round is settled."""

    def __init__(self, session: SessionControl, longest: int, context: RoundContext) -> None:
        self.longest = longest
        """Most tokens to draft; 0 is plain decoding."""
        self.probed: frozenset[str] = frozenset()
        """Sources that may draft the first token as a probe, against the rule."""
        self.probing = False
        """True if the draft is a probe and nothing else."""
        self.acceptance: list[float] = []
        """Calibrated acceptance of each kept token, given that its predecessors are accepted."""
        self.drafted: list[DraftedToken] = []
        """All tokens drafted: the kept ones, and at most one dropped after them."""
        self.context = context
        self._session = session
        self._forecast = RoundForecast(session.times.base_ms)
        self._open = True

    @property
    def kept(self) -> int:
        """Number of tokens to send."""
        return len(self.acceptance)

    @property
    def kept_tokens(self) -> list[DraftToken]:
        """The kept tokens."""
        return [drafted.token for drafted in self.drafted[: self.kept]]

    def wants(self, source: str) -> bool:
        """Return whether another token by this source is worth its time."""
        if not self._open or self.kept >= self.longest:
            return False
        session, times = self._session, self._session.times
        probe = source in self.probed and not self.drafted
        return probe or session.rule.goes_on(
            self._forecast, session.expected_acceptances(source, self.kept), times.step_ms(source), times.token_ms
        )

    def estimate(self, token: DraftToken) -> float:
        """Return the calibrated acceptance that a token would have as the next one of this draft."""
        known = features(token, self.kept, self.context)
        return self._session.acceptance(token.source, self._session.calibration.model_logit(token, known))

    def add(self, token: DraftToken) -> DraftDecision:
        """Add a token just drafted, and decide whether to keep it and whether to draft another.

        In a session of several sources, `wants` decides which of them may draft the next token.
        """
        if not self._open or self.kept >= self.longest:
            return DraftDecision.DROP
        session, times = self._session, self._session.times
        known = features(token, self.kept, self.context)
        model_logit = session.calibration.model_logit(token, known)
        acceptance = session.acceptance(token.source, model_logit)
        self.drafted.append(DraftedToken(token, model_logit))
        self._forecast.ms += times.step_ms(token.source)
        scored = ScoredToken(token, known, acceptance)
        if not self.probing and not session.rule.keeps(self._forecast, scored, times.token_ms):
            self._open = False
            return DraftDecision.DROP
        self.acceptance.append(acceptance)
        self._forecast.keep(acceptance, times.token_ms)
        if any(self.wants(source) for source in {token.source, *session.sources}):
            return DraftDecision.MORE
        self._open = False
        return DraftDecision.LAST

    def cut(self, length: int) -> None:
        """Keep only the first `length` tokens: a source that failed has lost the others."""
        if length < self.kept:
            del self.acceptance[length:]
            self._open = False

    def record(self, session: str, kind: str, verified: int, accepted: int) -> RoundRecord:
        """Return the round as a training example. verified, accepted: as for `settle`."""
        return RoundRecord(
            session=session,
            kind=kind,
            temperature=self.context.temperature,
            target_entropy=self.context.target_entropy,
            guesses=self.kept_tokens,
            verified=verified,
            accepted=accepted,
        )
