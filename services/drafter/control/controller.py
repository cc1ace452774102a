"""How long each draft is to be: the speculation controller. Pure.

One controller per drafter, one `SessionControl` per session. A round goes `begin`, `add` for every token that a source
drafts, `settle` with what was verified. Where drafting does not pay, a session decodes plainly; a source that does not
pay is tried now and then, to see whether that has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from services.drafter.control.calibration import REMEMBERED, Calibration, Offset, Outlook
from services.drafter.control.features import Context, Recent, features, sigmoid
from services.drafter.control.guess import Guess
from services.drafter.control.records import RoundRecord
from services.drafter.control.rules import Entropy, Judged, Marginal, Predicted, Standing, StopRule
from services.drafter.control.times import Pace
from services.drafter.control.weights import ControlWeights
from shared.errors import SettingsError

RuleName = Literal["fixed", "entropy", "predictor", "marginal"]
UNKNOWN = 0.0
"""Log odds expected of the tokens of a source that has drafted nothing yet."""
FIRST_WAIT = 4
LONGEST_WAIT = 64
"""Rounds without a source before it is tried, and how far fruitless trials double that."""
PROBE_LENGTH = 1


class Step(Enum):
    """What becomes of a token just drafted, and what next."""

    DROP = "drop"
    """Not worth sending; the draft ends before it."""
    LAST = "last"
    """Send it, draft no more."""
    MORE = "more"
    """Send it, draft another."""


class Controller:
    """What the sessions of one drafter share."""

    def __init__(
        self, rule: RuleName, draft_length: int, weights: ControlWeights | None = None, pace: Pace | None = None
    ) -> None:
        """draft_length: longest draft. Raises SettingsError when the rule needs weights that are not there."""
        self.weights = weights or ControlWeights()
        if rule == "predictor" and self.weights.predictor is None:
            raise SettingsError(
                "the stop rule 'predictor' needs trained weights; train them with `wisp controller train`, or choose "
                "fixed, entropy or marginal"
            )
        self.rule_name = rule
        self.draft_length = draft_length
        self.pace = pace or Pace()
        self.calibration = Calibration(self.weights.acceptance)

    def session(self, *sources: str) -> SessionControl:
        """Control of a new session that drafts from these sources."""
        return SessionControl(self, sources)

    def rule(self) -> StopRule:
        """The stop rule of one session."""
        if self.rule_name == "predictor" and self.weights.predictor is not None:
            return Predicted(self.weights.predictor)
        return {"entropy": Entropy, "marginal": Marginal}.get(self.rule_name, StopRule)()


class SessionControl:
    """What is known of one session."""

    def __init__(self, controller: Controller, sources: Sequence[str]) -> None:
        self.pace = controller.pace
        self.calibration = controller.calibration
        self.rule = controller.rule()
        self.sources = sources
        self._draft_length = controller.draft_length
        self._recent = Recent()
        self._offsets: dict[str, Offset] = {}
        self._outlook = Outlook()
        self._trials = {source: _Trial() for source in sources}

    def begin(self, room: int, temperature: float, target_entropy: float | None = None) -> Round:
        """Start a round. room: most draft tokens that the session can use. target_entropy: of the target's
        distribution that the last token was chosen from, where it is known: in recorded texts, not in service."""
        round_ = self.ahead(room, temperature, target_entropy)
        if round_.longest == 0:
            return round_
        wanted = [source for source in self.sources if round_.wants(source)]
        round_.tried = frozenset(source for source, trial in self._trials.items() if trial.due(source in wanted))
        if not wanted:
            round_.longest = min(round_.longest, PROBE_LENGTH) if round_.tried else 0
            round_.probing = bool(round_.tried)
        return round_

    def ahead(self, room: int, temperature: float, target_entropy: float | None = None) -> Round:
        """A round that may follow the one in flight. It counts for nothing until it is settled."""
        longest = max(0, min(room, self._draft_length, self.pace.draft_cap))
        return Round(self, longest, Context(temperature, target_entropy, self._recent.value))

    @property
    def resting(self) -> bool:
        """Whether the session decodes plainly, and will do so in its next round."""
        return self.pace.draft_cap == 0 or all(0 < trial.idle < trial.wait for trial in self._trials.values())

    def settle(self, round_: Round, verified: int, accepted: int) -> None:
        """Learn from a round's result.

        verified: how many of its kept tokens were; fewer where the draft was trimmed or the text ended in an accepted
        token, since those behind are unknown. accepted: how many of these were right.
        """
        verified = max(0, min(verified, round_.kept))
        accepted = max(0, min(accepted, verified))
        for i, token in enumerate(round_.drafted):
            if i > accepted:
                break
            source, logit = token.guess.source, self.calibration.logit(token.guess.source, token.model_logit)
            self._outlook.see(source, i, logit)
            self.calibration.outlook.see(source, i, logit)
            if i < verified:
                self._recent.learn(i < accepted)
                self._offsets.setdefault(source, Offset()).learn(logit, i < accepted)
                self.calibration.learn(source, token.model_logit, i < accepted)
        if round_.drafted:
            self.rule.learn(verified, accepted)
        right = {guess.source for guess in round_.guesses[:accepted]}
        # What was trimmed, or never verified, says nothing of its source.
        judged = {t.guess.source for i, t in enumerate(round_.drafted) if i < verified or i >= round_.kept}
        for source in round_.tried & judged:
            self._trials[source].learn(source in right)

    def acceptance(self, source: str, model_logit: float) -> float:
        """Calibrated chance of a token."""
        return sigmoid(self.calibration.logit(source, model_logit) + self._offset(source))

    def prospects(self, source: str, position: int) -> list[float]:
        """Chances that the next token of a source may turn out to have, from the session's tokens before others'."""
        seen = self.calibration.outlook.recall(source, position) + self._outlook.recall(source, position)
        offset = self._offset(source)
        return [sigmoid(logit + offset) for logit in seen[-REMEMBERED:] or [UNKNOWN]]

    def _offset(self, source: str) -> float:
        return self._offsets[source].value if source in self._offsets else 0.0


@dataclass
class _Trial:
    """When a source that is not worth its time is tried all the same: times and texts change."""

    idle: int = 0
    """Rounds without it."""
    wait: int = FIRST_WAIT

    def due(self, wanted: bool) -> bool:
        """Whether a round is to try it; called once for each round."""
        if wanted:
            self.idle, self.wait = 0, FIRST_WAIT
        elif self.idle >= self.wait:
            self.idle = 0
            return True
        else:
            self.idle += 1
        return False

    def learn(self, right: bool) -> None:
        """Whether the trial brought an accepted token."""
        self.wait = FIRST_WAIT if right else min(2 * self.wait, LONGEST_WAIT)


@dataclass(frozen=True)
class _Drafted:
    guess: Guess
    model_logit: float


class Round:
    """A draft in the making, and what its settling needs to know."""

    def __init__(self, session: SessionControl, longest: int, context: Context) -> None:
        self.longest = longest
        """Most tokens to draft; 0 is plain decoding."""
        self.tried: frozenset[str] = frozenset()
        """Sources that may draft the first token in order to learn, against the rule."""
        self.probing = False
        """Whether nothing but such a trial is drafted."""
        self.acceptance: list[float] = []
        """Calibrated chance of each kept token, its predecessors being accepted."""
        self.drafted: list[_Drafted] = []
        self.context = context
        self._session = session
        self._standing = Standing(session.pace.base_ms)
        self._open = True

    @property
    def kept(self) -> int:
        """Tokens to send."""
        return len(self.acceptance)

    @property
    def guesses(self) -> list[Guess]:
        """The kept tokens."""
        return [token.guess for token in self.drafted[: self.kept]]

    def wants(self, source: str) -> bool:
        """Whether another token by this source is worth its time."""
        if not self._open or self.kept >= self.longest:
            return False
        session, pace = self._session, self._session.pace
        trial = source in self.tried and not self.drafted
        return trial or session.rule.goes_on(
            self._standing, session.prospects(source, self.kept), pace.step_ms(source), pace.token_ms
        )

    def estimate(self, guess: Guess) -> float:
        """Calibrated chance of a token as the next one of this draft."""
        known = features(guess, self.kept, self.context)
        return self._session.acceptance(guess.source, self._session.calibration.model_logit(guess, known))

    def add(self, guess: Guess) -> Step:
        """Take in a token just drafted; the answer says whether to keep it and to draft another.

        Where a session has several sources, `wants` says which of them is worth the next token.
        """
        if not self._open or self.kept >= self.longest:
            return Step.DROP
        session, pace = self._session, self._session.pace
        known = features(guess, self.kept, self.context)
        model_logit = session.calibration.model_logit(guess, known)
        acceptance = session.acceptance(guess.source, model_logit)
        self.drafted.append(_Drafted(guess, model_logit))
        self._standing.ms += pace.step_ms(guess.source)
        if not self.probing and not session.rule.keeps(self._standing, Judged(guess, known, acceptance), pace.token_ms):
            self._open = False
            return Step.DROP
        self.acceptance.append(acceptance)
        self._standing.keep(acceptance, pace.token_ms)
        if any(self.wants(source) for source in {guess.source, *session.sources}):
            return Step.MORE
        self._open = False
        return Step.LAST

    def cut(self, length: int) -> None:
        """Only the first `length` kept tokens are sent: a source that failed has lost the others."""
        if length < self.kept:
            del self.acceptance[length:]
            self._open = False

    def record(self, session: str, kind: str, verified: int, accepted: int) -> RoundRecord:
        """The round as training reads it, with the same counts that `settle` gets."""
        return RoundRecord(
            session=session,
            kind=kind,
            temperature=self.context.temperature,
            target_entropy=self.context.target_entropy,
            guesses=self.guesses,
            verified=verified,
            accepted=accepted,
        )
