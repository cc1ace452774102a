"""Predicted outputs: copied where they fit, found again behind a difference, and never more than a draft."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.drafter.control import Controller, DraftRound
from services.drafter.sources import DraftRequest, LookupDrafts, Prediction
from shared.messages import Sampling
from shared.prediction import PredictedText, PredictionFollower

PROMPT = [900, 901, 902]
TOKENS = st.lists(st.integers(0, 6), max_size=40)


def follower(prediction: Sequence[int], output: Sequence[int] = ()) -> PredictionFollower:
    made = PredictionFollower(PredictedText(prediction))
    for token in output:
        made.push(token)
    return made


LETTERS = list(range(100, 126))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ([], LETTERS[:3]),
        (LETTERS[:5], LETTERS[5:8]),
        ([*LETTERS[:5], 1], LETTERS[6:9]),  # replaced, as far as known
        ([*LETTERS[:5], 1, 2], []),  # lost
        ([*LETTERS[:5], 1, 2, LETTERS[5]], LETTERS[6:9]),  # inserted
        ([*LETTERS[:5], 1, 2, LETTERS[7]], LETTERS[8:11]),  # replaced three by two
        ([*LETTERS[:5], LETTERS[8]], LETTERS[9:12]),  # deleted
        ([*LETTERS[:5], 1, LETTERS[20]], []),  # one token far away is no place
        ([*LETTERS[:5], 1, *LETTERS[20:22]], LETTERS[22:25]),  # two are
        ([*LETTERS[10:13], 1, *LETTERS[2:5]], LETTERS[5:8]),  # back
        (LETTERS, []),
    ],
)
def test_the_place_is_found_again_by_the_last_tokens(output: list[int], expected: list[int]) -> None:
    assert follower(LETTERS, output).continuation(3) == expected


def test_of_repeated_lines_the_nearest_is_the_place() -> None:
    line = [1, 2, 3, 4]
    prediction = [*line, 10, *line, 20, *line, 30]
    assert follower(prediction, [*line, 10, 99, *line]).continuation(1) == [20]


def test_predicted_tokens_are_counted() -> None:
    edited = [*LETTERS[:5], 1, *LETTERS[6:]]
    assert follower(LETTERS, edited).accepted == 25
    assert follower(LETTERS, LETTERS).accepted == 26
    assert follower(LETTERS, [1, 2, 3]).accepted == 0


@given(TOKENS, TOKENS, st.integers(0, 9))
def test_any_output_is_followed_or_given_up(prediction: list[int], output: list[int], length: int) -> None:
    made = follower(prediction, output)
    copied = made.continuation(length)
    assert len(copied) <= length
    assert made.accepted <= len(output)
    text = ",".join(map(str, prediction))
    assert ",".join(map(str, copied)) in text
    again = made.copy()
    again.push(3)
    assert made.continuation(length) == copied, "a copy goes its own way"


def round_of(length: int) -> DraftRound:
    return Controller("fixed", 100).session("lookup").begin(length, temperature=0.0)


def decoded(output: Sequence[int], prediction: Sequence[int] | None, length: int = 8) -> int:
    """Return the rounds that it takes to decode an output with drafts of this length."""
    source = LookupDrafts()
    expected = None if prediction is None else Prediction(len(PROMPT), prediction)
    tokens, rounds = list(PROMPT), 0
    whole = [*PROMPT, *output]
    while len(tokens) < len(whole):
        asked = DraftRequest("s", tokens, Sampling(), round_of(length), ("lookup",), prediction=expected)
        (draft,) = source.propose([asked])
        for token in draft.tokens:
            if len(tokens) < len(whole) - 1 and whole[len(tokens)] == token:
                tokens.append(token)
            else:
                break
        tokens.append(whole[len(tokens)])
        rounds += 1
    return rounds


FILE = [token for line in range(30) for token in (500, line % 7 + 200, 501, line + 300, 502, line % 3 + 400, 503)]


def test_an_edited_file_takes_few_rounds() -> None:
    """Three edits: a renamed word, an added line and a removed one."""
    edited = [*FILE[:40], 1, *FILE[41:100], 500, 2, 3, 4, 503, *FILE[100:150], *FILE[157:]]
    with_prediction, without = decoded(edited, FILE), decoded(edited, None)
    assert len(edited) / with_prediction > 6, "nearly the 9 tokens of a round whose whole draft is right"
    assert len(edited) / with_prediction > 2 * len(edited) / without
    assert decoded(FILE, FILE) == -(-len(FILE) // 9)


def test_a_useless_prediction_costs_no_more_rounds_than_tokens() -> None:
    assert decoded(LETTERS, [7] * 50) <= len(LETTERS)


@given(TOKENS.filter(bool), TOKENS)
def test_a_session_that_lost_tokens_copies_as_a_new_one(output: list[int], prediction: list[int]) -> None:
    expected = Prediction(len(PROMPT), prediction)

    def drafted(source: LookupDrafts, tokens: Sequence[int]) -> list[int]:
        asked = DraftRequest("s", tokens, Sampling(), round_of(4), ("lookup",), prediction=expected)
        return source.propose([asked])[0].tokens

    source = LookupDrafts()
    drafted(source, [*PROMPT, *output])
    shorter = [*PROMPT, *output[: len(output) // 2]]
    assert drafted(source, shorter) == drafted(LookupDrafts(), shorter)
