"""The speculation controller beside runs, in simulated sessions: it loses little against a run, and gains from copies.

The costs are measured: SmolLM2-135M in bfloat16 on two threads of a CPU with AVX2. A run takes the time of its steps; a
round also that of its messages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import builders
import pytest

from services.drafter.control import Controller, DraftDecision, DraftRound, DraftToken, RoundTimes, SessionControl
from services.drafter.control.controller import LONGEST_WAIT
from services.drafter.control.features import logit as log_odds
from services.drafter.control.features import sigmoid
from services.drafter.control.weights import ControlWeights, Inputs, Logistic
from services.drafter.control_files import load_weights
from services.drafter.core.lookup import LOOKUP, NgramIndex, UnsentCopies
from services.tools.local.folder import checkout

VERIFY_MS = (13.3, 16.8, 19.5, 22.0, 24.6, 27.7, 30.8, 33.9, 37.0)
"""To verify 0, 1, 2, … draft tokens."""
HOPS_MS = 4.2
STEP_MS = 2.3
REPORT = 4
"""Tokens of each report of a run."""
LONGEST = 8
TOKENS = 96
EXACT = Logistic(inputs=Inputs(features=["confidence"], mean=[0.0], scale=[1.0]), weights=[1.0], bias=0.0)


def controller() -> Controller:
    """A drafter's controller with the shipped weights, the machine's cost model and no measurements."""
    times = RoundTimes()
    times.apply_load(builders.load(draft_cap=16, queue_ms=0.0, verify_ms=list(VERIFY_MS), run_ms=VERIFY_MS[0]))
    shipped = load_weights(checkout() / "services/drafter/drafts/smollm2-135m-instruct/controller.json")
    weights = ControlWeights(acceptance={LOOKUP: shipped.acceptance[LOOKUP], "hidden": EXACT})
    return Controller("marginal", LONGEST, weights, times)


@dataclass
class Clock:
    """The time of a session, and its rounds as (draft tokens, accepted)."""

    rng: random.Random
    ms: float = 0.0
    rounds: list[tuple[int, int]] = field(default_factory=list)

    def round(self, times: RoundTimes, kept: int, accepted: int) -> None:
        verify, hops = (max(0.5, self.rng.gauss(1.0, 0.06)) * ms for ms in (VERIFY_MS[kept], HOPS_MS))
        times.learn_round(kept, hops + verify, verify, 0.0, kept + 1)
        self.ms += hops + verify
        self.rounds.append((kept, accepted))

    def speed(self, tokens: int) -> float:
        """The speed against a session without drafts: one round and a run."""
        return (HOPS_MS + tokens * VERIFY_MS[0]) / self.ms


# Copies


@dataclass
class CopyingSession:
    """A session that drafts by lookup. Its answer is given."""

    control: SessionControl
    prompt: list[int]
    answer: list[int]
    index: NgramIndex = field(default_factory=NgramIndex)

    def draft(self, round_: DraftRound, made: int) -> tuple[list[int], int | None]:
        """Draft after `made` tokens; return the kept tokens and a dropped one."""
        tokens, kept = self.prompt + self.answer[:made], []
        self.index.extend(tokens)
        if not round_.wants(LOOKUP):
            return [], None
        copies, support = self.index.continuation(tokens, round_.longest)
        for token in copies:
            decision = round_.add(DraftToken(LOOKUP, support=support))
            if decision is DraftDecision.DROP:
                return kept, token
            kept.append(token)
            if decision is DraftDecision.LAST:
                break
        return kept, None

    def room(self, made: int) -> int:
        return min(LONGEST, len(self.answer) - made - 1)

    def run(self, clock: Clock) -> float:
        """Decode the answer; return the speed against a session without drafts."""
        made, total, unsent = 0, len(self.answer), UnsentCopies(LONGEST)
        while made < total:
            round_ = self.control.begin(self.room(made), 0.0)
            probes = round_.deferred_probes()
            kept, dropped = self.draft(round_, made) if round_.longest else ([], None)
            if kept and not round_.pays:
                kept, dropped = [], kept[0]
                round_.cut(0)
            for probe in probes:
                copies, other = self.draft(probe, made)
                for copy in [*copies, *([] if other is None else [other])][:1]:
                    self.control.settle(probe, 0, 0, copy == self.answer[made])
            rest = self.answer[made:]
            accepted = next((i for i, token in enumerate(kept) if token != rest[i]), len(kept))
            matches = None if dropped is None or accepted < len(kept) else dropped == rest[accepted]
            clock.round(self.control.times, len(kept), accepted)
            left = self.control.run_tokens(round_)
            self.control.settle(round_, len(kept), accepted, matches)
            made = self.follow_run(made + accepted + 1, left, unsent, clock)
        self.control.close()
        return clock.speed(total)

    def follow_run(self, made: int, left: int, unsent: UnsentCopies, clock: Clock) -> int:
        left = min(left, len(self.answer) - made)
        while left > 0:
            step = min(REPORT, left)
            made, left = made + step, left - step
            clock.ms += step * VERIFY_MS[0]
            self.control.learn_run(step)
            for copy in unsent.follow(self.prompt + self.answer[:made], len(self.prompt) + made - step):
                self.control.observe(copy.token, copy.position, 0.0, copy.correct)
            tempted = self.control.ahead(self.room(made), 0.0)
            if left and self.draft(tempted, made)[0] and tempted.pays_to_halt:
                clock.ms += VERIFY_MS[0]  # the step that runs meanwhile
                return made + 1
        return made


def words(rng: random.Random, count: int) -> list[int]:
    """Tokens with the frequencies of words: n-grams of one token recur and mean nothing."""
    return rng.choices(range(400), [1 / (rank + 1) for rank in range(400)], k=count)


def phrases(rng: random.Random, count: int) -> list[int]:
    """Words, and phrases of two to four tokens that recur."""
    known = [[rng.randrange(1000) for _ in range(rng.choice((2, 3, 4)))] for _ in range(60)]
    made: list[int] = []
    while len(made) < count:
        made += rng.choice(known) if rng.random() < 0.5 else words(rng, 2)
    return made[:count]


def source(rng: random.Random) -> list[int]:
    return [rng.randrange(5000) for _ in range(TOKENS)]


def copied(rng: random.Random) -> tuple[list[int], list[int]]:
    text = source(rng)
    return text, text


def edited(rng: random.Random) -> tuple[list[int], list[int]]:
    text = source(rng)
    return text, [token if rng.random() > 0.08 else rng.randrange(5000) for token in text]


def then_copied(rng: random.Random) -> tuple[list[int], list[int]]:
    text = source(rng)
    return text, [*words(rng, TOKENS // 2), *text[: TOKENS // 2]]


TEXTS: dict[str, Callable[[random.Random], tuple[list[int], list[int]]]] = {
    "novel": lambda rng: (words(rng, 120), words(rng, TOKENS)),
    "phrases": lambda rng: (phrases(rng, 150), phrases(rng, TOKENS)),
    "copied": copied,
    "edited": edited,
    "novel, then copied": then_copied,
}


def copying(shared: Controller, text: str, rng: random.Random) -> float:
    prompt, answer = TEXTS[text](rng)
    return CopyingSession(shared.session(LOOKUP), prompt, answer).run(Clock(rng))


@pytest.mark.parametrize(("text", "least"), [("novel", 0.985), ("phrases", 0.98)])
def test_copies_of_other_texts_teach_no_session_to_lose(text: str, least: float) -> None:
    made = []
    for seed in range(6):
        shared, rng = controller(), random.Random(seed)
        for _ in range(3):
            for other in TEXTS:
                speed = copying(shared, other, rng)
                made += [speed] if other == text else []
    assert fmean(made) >= least


@pytest.mark.parametrize(
    ("text", "least"), [("copied", 2.3), ("edited", 1.25), ("novel, then copied", 1.2), ("novel", 0.985)]
)
def test_a_drafters_first_session_gains_from_copies(text: str, least: float) -> None:
    assert fmean(copying(controller(), text, random.Random(seed)) for seed in range(12)) >= least


def test_unsent_copies_are_the_drafts_that_lookup_would_have_made() -> None:
    unsent = UnsentCopies(2)
    tokens = [1, 2, 3, 1, 2, 9, 1]
    seen = [(copy.token.support, copy.position, copy.correct) for copy in unsent.follow(tokens, 4)]
    # After 1: 2 and 3 were copied, and 9 came. After 9 nothing is known.
    assert seen == [(1, 0, True), (1, 1, False)]
    assert [(copy.token.support, copy.correct) for copy in unsent.follow([*tokens, 2, 9], 7)] == [(1, True), (1, True)]


def test_a_gap_ends_an_unsent_draft() -> None:
    unsent = UnsentCopies(4)
    unsent.follow([1, 2, 3, 4, 1, 2], 5)
    assert [copy.position for copy in unsent.follow([1, 2, 3, 4, 1, 2, 3, 4], 7)] == [0], "3 came with a round"


def test_observed_tokens_teach_as_sent_ones_do() -> None:
    right, wrong = controller().session(LOOKUP), controller().session(LOOKUP)
    before = right.expected_acceptances(LOOKUP, 0)[1]
    for control, correct in ((right, True), (wrong, False)):
        for _ in range(12):
            control.observe(DraftToken(LOOKUP, support=2), 0, 0.0, correct)
    assert wrong.expected_acceptances(LOOKUP, 0)[1] < before < right.expected_acceptances(LOOKUP, 0)[1]


def test_a_draft_that_halts_a_run_has_to_pay_the_way_back() -> None:
    shared = controller()
    shared.times.apply_load(builders.load(draft_cap=16, verify_ms=[13.0, 13.1], run_ms=13.0))
    round_ = shared.session(LOOKUP).ahead(8, 0.0)
    round_._forecast.tokens = 1.01 * round_._forecast.ms / 13.0
    assert round_.pays
    assert not round_.pays_to_halt
    round_._forecast.tokens += HOPS_MS
    assert round_.pays_to_halt


# Drafts of a model


def model_session(shared: Controller, acceptance: float, tokens: int, rng: random.Random) -> tuple[float, int]:
    """Return the speed of a session whose draft model has this acceptance, and the number of its probes."""
    control, times, clock = shared.session("hidden"), shared.times, Clock(rng)
    made, probes_made = 0, 0
    pending: list[tuple[DraftRound, bool]] = []

    def token() -> float:
        return sigmoid(log_odds(acceptance) + rng.gauss(0.0, 1.0)) if acceptance else 0.0

    def settle() -> None:
        while pending:
            probe, right = pending.pop()
            control.settle(probe, 0, 0, right)

    while made < tokens:
        settle()
        round_ = control.begin(min(LONGEST, tokens - made - 1), 0.0)
        for probe in round_.deferred_probes():
            chance = token()
            probe.add(DraftToken("hidden", chance))
            pending.append((probe, rng.random() < chance))
            clock.ms += STEP_MS
            times.learn_probe("hidden", 1, STEP_MS)
            probes_made += 1
        chances: list[float] = []
        while round_.longest and round_.wants("hidden"):
            chances.append(token())
            if round_.add(DraftToken("hidden", chances[-1])) is not DraftDecision.MORE:
                break
        if chances:
            times.learn_draft("hidden", len(chances), len(chances) * STEP_MS)
            clock.ms += len(chances) * STEP_MS
        if round_.kept and not round_.pays:
            round_.cut(0)
        right = [rng.random() < chance for chance in chances]
        accepted = next((i for i in range(round_.kept) if not right[i]), round_.kept)
        clock.round(times, round_.kept, accepted)
        left = control.run_tokens(round_)
        dropped = len(right) > round_.kept == accepted
        control.settle(round_, round_.kept, accepted, right[accepted] if dropped else None)
        made += accepted + 1
        left = min(left, tokens - made)
        while left > 0:
            step = min(REPORT, left)
            made, left = made + step, left - step
            clock.ms += step * VERIFY_MS[0]
            control.learn_run(step)
            probed = bool(pending)
            settle()
            if probed and control.ahead(LONGEST, 0.0).wants("hidden"):
                break
    control.close()
    return clock.speed(tokens), probes_made


def model_sessions(acceptance: float, tokens: int, sessions: int) -> Sequence[tuple[float, int]]:
    shared, rng = controller(), random.Random(1)
    return [model_session(shared, acceptance, tokens, rng) for _ in range(sessions)]


@pytest.mark.parametrize("tokens", [24, 64, 300])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.7])
def test_a_draft_model_that_does_not_pay_loses_little(acceptance: float, tokens: int) -> None:
    assert fmean(speed for speed, _ in model_sessions(acceptance, tokens, 40)) >= 0.97


def test_a_draft_model_is_tried_in_sessions_too_short_for_a_probe() -> None:
    probes = sum(probes for _, probes in model_sessions(0.0, 24, 200))
    assert 200 * 24 / LONGEST_WAIT <= probes <= 200 * 24 / 50


def test_a_draft_model_that_pays_is_used_in_short_sessions() -> None:
    made = model_sessions(0.95, 64, 40)
    assert fmean(speed for speed, _ in made[20:]) >= 1.3
