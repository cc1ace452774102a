"""Copies in runs, in simulated sessions: they gain where a text repeats itself, and lose little where it does not.

The costs are measured: SmolLM2-135M in bfloat16 on two threads of a CPU with AVX2.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from statistics import fmean

import builders
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.verifier.core.acceptance import Verdict, accept
from services.verifier.core.copies import CopyAcceptance, ProposedCopy, RunCopies, copy_lengths
from services.verifier.core.runs import Run, RunTable
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from shared.log_odds import SessionOffset
from shared.lookup import LONGEST_MATCH, LookupText
from shared.messages import CostModel, Finish, RunGrant, Sampling

TOKENS = 96
LEASE = 7
MODEL = CostModel(
    verifier="v",
    coefficients=[10.6, 0.0, 2.8, 0.0, 0.0, 0.0, 2.8],
    ratio_p50=1,
    ratio_p90=1,
    ratio_p99=1,
    samples=1,
    version=1,
)


def step_ms(tokens: int) -> float:
    """The time of a step that computes so many tokens."""
    return 10.6 + 2.8 * tokens


def started(
    table: RunTable, session: str, prompt: Sequence[int], answer: Sequence[int], copies: int = 8, **job: object
) -> Run:
    """Start a run of a session whose first round has brought the answer's first token."""
    task = VerifyTask(session, list(prompt), [], Sampling(), frozenset(), len(answer))
    grant = RunGrant(tokens=len(answer), ms=1e6, copies=copies)
    outcome = VerifyOutcome(Verdict(0, [answer[0]], None), 0, len(prompt), 1)
    run = table.start(builders.job(session, 0, len(prompt), run=grant, **job), task, outcome, LEASE, 0.0)
    assert run is not None
    return run


def speed(copies: RunCopies, prompt: list[int], answer: list[int]) -> float:
    """Decode an answer in a run; return the speed against steps of one token."""
    table = RunTable(digests=False)
    run = started(table, "s", prompt, answer)
    ms = 0.0
    while run.finish is None:
        proposed = copies.propose([run], 10_000)
        (length,) = copies.lengths([run], proposed)
        draft = list(proposed[0].tokens[:length])
        made = run.length - len(prompt)
        verdict = accept(draft, answer[made : made + length + 1], run.task.room, frozenset())
        outcome = VerifyOutcome(verdict, length, run.length + verdict.accepted, length + 1)
        ms += step_ms(length + 1)
        copies.learn([run], proposed, [outcome])
        table.record(run, outcome, 0.0, 0.0)
    assert run.finish is Finish.LENGTH
    assert run.task.tokens == prompt + answer
    assert len(run.copied) == len({*run.copied}) <= len(answer)
    return (len(answer) - 1) * step_ms(1) / ms


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


@pytest.fixture(scope="module")
def speeds() -> dict[str, list[float]]:
    """Speeds of sessions by text. All sessions of a seed teach the same copies."""
    made: dict[str, list[float]] = {text: [] for text in TEXTS}
    for seed in range(4):
        rng, copies = random.Random(seed), RunCopies()
        copies.model = MODEL
        for _ in range(3):
            for text, sequences in TEXTS.items():
                made[text].append(speed(copies, *sequences(rng)))
    return made


@pytest.mark.parametrize(
    ("text", "least"),
    [("novel", 0.975), ("phrases", 0.985), ("copied", 3.0), ("edited", 1.9), ("novel, then copied", 1.4)],
)
def test_copies_gain_where_a_text_repeats_itself_and_lose_little_elsewhere(
    speeds: dict[str, list[float]], text: str, least: float
) -> None:
    assert fmean(speeds[text]) >= least


def test_a_run_without_permission_copies_nothing() -> None:
    table = RunTable(digests=False)
    run = started(table, "s", [1, 2, 3, 1, 2, 3], [1, 2, 3], copies=0)
    assert RunCopies().propose([run], 10_000) == [ProposedCopy()]


def test_a_copy_ends_before_a_stop_token_and_before_the_room_and_the_grant() -> None:
    table, copies = RunTable(digests=False), RunCopies()
    run = started(table, "s", [1, 2, 3, 4, 5, 6, 7, 8], [1] * 20)
    assert copies.propose([run], 10_000)[0].tokens == [2, 3, 4, 5, 6, 7, 8, 1]
    run.left = 4
    assert copies.propose([run], 10_000)[0].tokens == [2, 3, 4], "the step's own token is the fourth"
    run.left, run.task = 20, VerifyTask("s", run.task.tokens, [], Sampling(), frozenset({4}), 20)
    assert copies.propose([run], 10_000)[0].tokens == [2, 3]


def test_a_full_cache_has_no_room_for_copies() -> None:
    run = started(RunTable(digests=False), "s", [1, 2, 3, 4, 5, 6, 7, 8], [1] * 20)
    assert RunCopies().propose([run], 8)[0].tokens == ()


def test_acceptance_is_learned_by_length_of_the_match() -> None:
    acceptance, untaught = CopyAcceptance(), CopyAcceptance()
    for _ in range(400):
        acceptance.learn(ProposedCopy([1, 2], 1), [1, 3], SessionOffset())  # right after 1 token, wrong after 2
        acceptance.learn(ProposedCopy([1], 20), [9], SessionOffset())
    assert acceptance.logit(1) > 1 > untaught.logit(1)
    assert acceptance.logit(2) < -1
    assert acceptance.logit(20) < -1 < untaught.logit(20)
    assert acceptance.logit(3) == untaught.logit(3)


def test_a_session_whose_copies_are_wrong_is_expected_to_have_wrong_ones() -> None:
    runs, copies = many(2)
    acceptance = CopyAcceptance()
    for _ in range(20):
        acceptance.learn(ProposedCopy([1], LONGEST_MATCH), [9], runs[0].copy_offset)
    assert copy_lengths(MODEL, runs, copies, CopyAcceptance()) == [0, 0]


def many(count: int, **job: object) -> tuple[list[Run], list[ProposedCopy]]:
    table = RunTable(digests=False)
    runs = [started(table, f"s{i}", [1, 2, 3], [1] * 20, **job) for i in range(count)]
    return runs, [ProposedCopy([2, 3, 1, 2], LONGEST_MATCH if i == 0 else 1) for i in range(count)]


def test_the_likeliest_copies_are_verified() -> None:
    assert copy_lengths(MODEL, *many(4), CopyAcceptance()) == [4, 0, 0, 0]


def test_copies_keep_the_promises_of_the_other_runs() -> None:
    runs, copies = many(2, tpot_ms=step_ms(4))
    assert copy_lengths(MODEL, runs, copies, CopyAcceptance()) == [2, 0]
    runs, copies = many(2, tpot_ms=1.0)
    assert copy_lengths(MODEL, runs, copies, CopyAcceptance()) == [0, 0]
    runs, copies = many(1, tpot_ms=1.0)
    assert copy_lengths(MODEL, runs, copies, CopyAcceptance()) == [4], "nobody waits but the session itself"


def longest_match(tokens: list[int]) -> tuple[int, int]:
    """The longest match of the sequence's end with an earlier place, and the position after the latest such place."""
    found = (0, 0)
    for end in range(1, len(tokens)):
        matched = 0
        while matched < min(LONGEST_MATCH, end) and tokens[end - 1 - matched] == tokens[-1 - matched]:
            matched += 1
        if matched:
            found = max(found, (matched, end))
    return found


@given(
    st.lists(st.sampled_from([0, 1, 2, 256, 65536, 65537]), max_size=60),
    st.lists(st.sampled_from([0, 1]), max_size=3),
    st.integers(0, 60),
    st.integers(1, 8),
)
def test_lookup_continues_the_longest_and_then_latest_match(
    tokens: list[int], drafted: list[int], cut: int, length: int
) -> None:
    text = LookupText()
    text.extend(tokens[:cut])
    text.extend(tokens)
    whole = [*tokens, *drafted]
    matched, end = longest_match(whole)
    expected = [whole[end + i % (len(whole) - end)] for i in range(length)] if matched else []
    assert text.continuation(length, drafted) == (expected, matched)


def test_lookup_forgets_tokens_that_were_taken_back() -> None:
    text = LookupText()
    text.extend([1, 2, 3, 4, 1])
    text.extend([1, 2])
    assert len(text) == 2
    text.extend([1, 2, 1])
    assert text.continuation(2) == ([2, 1], 1)
