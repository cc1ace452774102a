"""The speculation controller: decides the length of each draft.

One `Controller` per drafter, one `SessionControl` per session, one `DraftRound` per round: `begin` starts the round,
`add` takes each token that a source drafts, `settle` learns from the result. Where drafting does not pay, a session
decodes plainly; a source that does not pay is probed now and then, since times and acceptance change. A probe drafts
one token and compares it with the target's choice, which every round brings: it costs a draft step and no verification.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from services.drafter.control.calibration import DEEPEST, REMEMBERED, Calibration, RecentLogits
from services.drafter.control.draft_round import DraftedToken, DraftRound
from services.drafter.control.features import RecentAcceptance, RoundContext
from services.drafter.control.rules import RULES, RuleName, StopRule
from services.drafter.control.times import RoundTimes
from services.drafter.control.weights import ControlWeights
from shared.log_odds import SessionOffset, sigmoid, sigmoids
from shared.slo import HOPELESS_GAIN

UNKNOWN_OFFSET = SessionOffset()
UNKNOWN_LOGIT = 0.0
"""Log odds expected of a source that has drafted nothing yet."""
PROBE_SHARE = 0.01
"""Probes of a source take at most this share of the time of plain decoding."""
FIRST_WAIT = 4
LONGEST_WAIT = 256
"""Fewest and most rounds between two probes."""
MOST_RUN = 128
"""Most tokens that a session leaves to the verifier at once."""
FIRST_RUN = 4
"""Tokens that a session leaves to the verifier after a first round whose draft does not pay, unless a source is probed
before or `RETURN_SHARE` asks for more."""
RETURN_SHARE = 0.1
"""A round between two runs takes at most this share of the time of the run after it."""
RUN_MEMORY = 64.0
"""Tokens of runs that a session's speed in runs is averaged over."""
RUN_PRIOR = 8.0
"""This average begins with so many tokens at the speed that the price assumes."""
LONGEST_UNREADY = 3
"""Consecutive rounds without hidden states after which a source no longer keeps its session from runs."""


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
        self.idle: dict[str, int] = {}
        """By source: rounds since its last probe in sessions that have ended. The next session goes on from there."""

    def session(self, *sources: str, copying: Collection[str] = (), tpot_ms: float | None = None) -> SessionControl:
        """Return the control of a new session that drafts from these sources.

        copying: sources that a verifier uses by itself in runs, while `RoundTimes.runs_copy` is true. tpot_ms: the
        promised time per token of the session.
        """
        return SessionControl(self, sources, frozenset(copying), tpot_ms)

    def rule(self) -> StopRule:
        """Return the stop rule of a new session."""
        return self._rule.for_session(self.weights)


class SessionControl:
    """Drafting control of one session."""

    def __init__(
        self, controller: Controller, sources: Sequence[str], copying: frozenset[str], tpot_ms: float | None
    ) -> None:
        self.times = controller.times
        self.calibration = controller.calibration
        self.rule = controller.rule()
        self.sources = sources
        self._copying = copying
        self._tpot_ms = tpot_ms
        self._draft_length = controller.draft_length
        self._recent_acceptance = RecentAcceptance()
        self._offsets: dict[str, SessionOffset] = {}
        self._recent_logits = RecentLogits()
        self._expected: dict[tuple[str, int], tuple[list[float], float]] = {}
        """Expected acceptances by source and position, computed when the calibration had `_expected_at` tokens."""
        self._expected_at = 0
        self._left_idle = controller.idle
        self._idle = {source: self._left_idle.pop(source, 0) for source in sources}
        """Rounds since each source was last wanted or probed, including those of earlier sessions, so that sources are
        probed also where no session is long enough for a probe of its own."""
        self._plain_tokens = 0
        """Tokens since the last draft of which a token was accepted."""
        self._unready_rounds = 0
        """Rounds in a row in which a source that does not rest had no hidden states."""
        self._run_priced_ms = self._run_ms = 0.0
        """Time of the session's tokens in runs, by the price and as measured, both fading."""

    @property
    def plain_rate(self) -> float:
        """Least tokens per millisecond at which a round is preferred to a run; 0 if there are no runs.

        It is a run's own rate, its copies included, or less where a run does not keep the session's promise.
        """
        if self.times.run_ms is None:
            return 0.0
        prior_ms = RUN_PRIOR * self.times.run_ms
        rate = (self._run_priced_ms + prior_ms) / (self._run_ms + prior_ms) / self.times.run_ms
        return rate / HOPELESS_GAIN if self._tpot_ms is not None and rate * self._tpot_ms < 1 else rate

    def runs_use(self, source: str) -> bool:
        """Return whether the verifier uses a source by itself, at no cost for messages, so that no round is needed."""
        return source in self._copying and self.times.run_ms is not None and self.times.runs_copy

    def close(self) -> None:
        """Hand the rounds since the last probes over to the next session. Call it once, at the end."""
        for source, rounds in self._idle.items():
            self._left_idle[source] = min(LONGEST_WAIT, self._left_idle.get(source, 0) + rounds)

    def begin(
        self,
        room: int,
        temperature: float,
        target_entropy: float | None = None,
        unready: Collection[str] = (),
        behind: Collection[str] = (),
    ) -> DraftRound:
        """Start a round.

        room: most draft tokens that the session can use. target_entropy: of the target's distribution that the last
        token was chosen from; known for recorded texts, not in service. unready: sources that cannot draft now.
        behind: sources that have many tokens to compute before they can draft; they do so as a probe.
        """
        round_ = self.ahead(room, temperature, target_entropy)
        if round_.longest == 0:
            return round_
        wanted = {source for source in self.sources if round_.wants(source)}
        probed = set()
        for source in self._idle:
            if source in wanted or self.runs_use(source):
                self._idle[source] = 0
                if source in behind:
                    probed.add(source)
            elif source not in unready and self._idle[source] >= self._probe_wait(source):
                self._idle[source] = 0
                probed.add(source)
            else:
                self._idle[source] += 1
        round_.probed = frozenset(probed)
        round_.unready = frozenset({*unready, *behind})
        if not wanted - round_.unready:
            round_.longest, round_.probing = min(1, len(probed)), bool(probed)
        return round_

    def _probe_wait(self, source: str) -> int:
        """Return the number of rounds between two probes of a source that does not pay.

        A probe takes a draft step. In a session that is otherwise decoded in runs it also takes two rounds: one that
        brings the hidden states since the last round, and its own.
        """
        times = self.times
        rounds_ms = 0.0 if times.run_ms is None else 2 * max(0.0, times.base_ms - times.run_ms)
        plain_ms = times.base_ms if times.run_ms is None else min(times.base_ms, times.run_ms)
        share = (times.step_ms(source) + rounds_ms) / (PROBE_SHARE * plain_ms)
        return min(LONGEST_WAIT, max(FIRST_WAIT, math.ceil(share)))

    def ahead(
        self, room: int, temperature: float, target_entropy: float | None = None, *, in_flight: bool = False
    ) -> DraftRound:
        """Return a round that may follow the one in flight. It changes nothing until it is settled.

        in_flight: it is drafted before that one's result.
        """
        longest = max(0, min(room, self._draft_length, self.times.draft_cap))
        context = RoundContext(temperature, target_entropy, self._recent_acceptance.value)
        return DraftRound(self, longest, context, in_flight=in_flight)

    def rests(self, source: str) -> bool:
        """Return whether a source is expected to draft neither in this round nor in the next."""
        if self.times.draft_cap == 0 or self.runs_use(source):
            return True
        return 0 < self._idle[source] < self._probe_wait(source)

    @property
    def decodes_plainly(self) -> bool:
        """True if all sources rest."""
        return all(self.rests(source) for source in self.sources)

    def run_tokens(self, round_: DraftRound) -> int:
        """Return the number of tokens that the session leaves to the verifier after this round; 0 for none.

        A run ends before the next probe. A session that has drafted may soon have a draft that pays: it leaves as many
        tokens as it has decoded plainly so far. A probe is judged during the run. Sources that runs use need no rounds.
        A session that only waits for hidden states goes on with rounds.
        """
        times = self.times
        if times.run_ms is None or round_.kept:
            return 0
        drafting = [source for source in self.sources if not self.runs_use(source)]
        if not drafting or self.times.draft_cap == 0:
            return MOST_RUN
        waits = any(not self.rests(source) for source in round_.unready)
        self._unready_rounds = self._unready_rounds + 1 if waits else 0
        if 0 < self._unready_rounds <= LONGEST_UNREADY:
            return 0
        until_probe = [self._probe_wait(source) - self._idle[source] for source in drafting if self.rests(source)]
        tokens = MOST_RUN
        if round_.drafted:
            round_ms = max(0.0, times.base_ms - times.run_ms)
            tokens = max(FIRST_RUN, self._plain_tokens, math.ceil(round_ms / (RETURN_SHARE * times.run_ms)))
        return max(0, min(MOST_RUN, tokens, *until_probe))

    def learn_run(self, tokens: int, ms: float) -> None:
        """Learn from tokens decoded in a run in `ms`: each counts as a round in which every source rested."""
        self._plain_tokens += tokens
        if tokens and ms > 0 and self.times.run_ms is not None:
            kept = max(0.0, 1 - tokens / RUN_MEMORY)
            self._run_priced_ms = kept * self._run_priced_ms + tokens * self.times.run_ms
            self._run_ms = kept * self._run_ms + ms
        for source in self._idle:
            self._idle[source] += tokens

    def settle(self, round_: DraftRound, verified: int, accepted: int, bonus_matches: bool | None = None) -> None:
        """Learn from a round's result.

        verified: how many of the kept tokens were verified: fewer than all where the draft was trimmed, or the text
        ended in an accepted token. accepted: how many of these were accepted. bonus_matches: if all were, whether the
        drafted token after them, trimmed or dropped, is the target's own choice; None if that is unknown.
        """
        verified = max(0, min(verified, round_.kept))
        accepted = max(0, min(accepted, verified))
        self._plain_tokens = 0 if accepted else self._plain_tokens + 1
        for i, drafted in enumerate(round_.drafted):
            if i > accepted:
                break
            self._learn_token(drafted, i, i < accepted if i < verified else bonus_matches)
            if i < verified:
                self._recent_acceptance.learn(i < accepted)
        if round_.drafted and not round_.silent:
            self.rule.learn(verified, accepted)

    def _learn_token(self, drafted: DraftedToken, position: int, correct: bool | None) -> None:
        """Remember a token whose predecessors were correct, and learn whether it was, unless that is unknown."""
        source = drafted.token.source
        logit = self.calibration.logit(source, drafted.model_logit)
        self._recent_logits.add(source, position, logit)
        self.calibration.recent.add(source, position, logit)
        if correct is not None:
            self._offsets.setdefault(source, SessionOffset()).learn(logit, correct)
            self.calibration.learn(source, drafted.model_logit, correct)

    def acceptance(self, source: str, model_logit: float) -> float:
        """Return the calibrated acceptance of a token, given that its predecessors are accepted."""
        return sigmoid(self.calibration.logit(source, model_logit) + self._offset(source))

    def expected_acceptances(self, source: str, position: int) -> tuple[Sequence[float], float]:
        """Return acceptances that the next token of a source may have, and their mean.

        They are recent ones, this session's before others'.
        """
        if self._expected_at != self.calibration.recent.added:
            self._expected_at = self.calibration.recent.added
            self._expected.clear()
        key = source, min(position, DEEPEST)
        if key not in self._expected:
            recent = self.calibration.recent.latest(*key) + self._recent_logits.latest(*key)
            acceptances = sigmoids(recent[-REMEMBERED:] or [UNKNOWN_LOGIT], self._offset(source))
            self._expected[key] = acceptances, math.fsum(acceptances) / len(acceptances)
        return self._expected[key]

    def _offset(self, source: str) -> float:
        return self._offsets.get(source, UNKNOWN_OFFSET).value
