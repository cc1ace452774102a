"""Drafts that learn from their sessions: the texts that they see, and the comparison of weights."""

from __future__ import annotations

import numpy as np
import pytest

from services.drafter.core.judging import HeldBackScore, TextScore
from services.drafter.core.observed import SHORTEST, ObservedSession, ObservedText, StateRecorder
from shared.messages import HiddenFormat, HiddenStates, Sampling
from shared.models.bfloat16 import nearest_bits
from shared.models.hidden_states import parts

SIZE = 3
TOKENS = list(range(100, 140))
SAMPLING = Sampling(temperature=0.7, seed=5)


def row(position: int) -> list[float]:
    return [position, -position, 1.0]


def states(start: int, stop: int, form: HiddenFormat = HiddenFormat.BFLOAT16) -> HiddenStates:
    bits = nearest_bits(np.array([row(position) for position in range(start, stop)], np.float32))
    (part,) = parts(bits, start, form)
    return HiddenStates(session="s", round=0, **vars(part))


def texts(*messages: HiddenStates, prompt_len: int = 10, most: int = 1000) -> list[ObservedText]:
    recorder = StateRecorder(SIZE, most)
    for message in messages:
        recorder.add(message)
    return ObservedSession(TOKENS, prompt_len, SAMPLING, recorder).texts()


def test_a_session_becomes_a_text_from_its_first_known_state() -> None:
    (text,) = texts(states(4, 20), states(20, 39))
    assert text.tokens.tolist() == TOKENS[4:]
    assert (text.start, text.prompt_len, text.sampling) == (4, 6, SAMPLING)
    expected = np.array([row(position) for position in range(4, 39)], np.float32)
    assert np.array_equal(text.states, nearest_bits(expected))


def test_lost_states_divide_a_session_and_repeated_ones_do_not() -> None:
    first, second = texts(states(0, 12), states(8, 20), states(22, 39), prompt_len=2)
    assert (first.start, len(first.tokens), first.prompt_len) == (0, 21, 2)
    assert (second.start, len(second.tokens), second.prompt_len) == (22, 18, 0)


def test_a_text_too_short_to_learn_from_is_left_out() -> None:
    start = len(TOKENS) - SHORTEST
    assert texts(states(start, 39), prompt_len=0)[0].answer_tokens == SHORTEST
    assert texts(states(start, 39), prompt_len=start + 1) == []
    assert texts() == []


def test_states_beyond_the_committed_tokens_are_ignored() -> None:
    """Redis may have lost tokens that were committed before."""
    (text,) = texts(states(10, 60))
    assert len(text.states) == len(text.tokens) - 1 == 29


def test_a_long_session_keeps_the_states_of_its_end() -> None:
    (text,) = texts(*(states(i, i + 1) for i in range(39)), most=20)
    assert text.start == 19


def test_states_of_another_size_are_ignored_and_int8_ones_are_not() -> None:
    recorder = StateRecorder(SIZE + 1, 100)
    recorder.add(states(0, 39))
    assert recorder.texts(TOKENS, 0, SAMPLING) == []
    (text,) = texts(states(0, 39, HiddenFormat.INT8))
    assert len(text.states) == 39


def scored(*accepted: int, drafts: int = 100) -> HeldBackScore:
    return HeldBackScore(tuple(TextScore(drafts, count // 2, count) for count in accepted))


@pytest.mark.parametrize(
    ("ours", "theirs", "better"),
    [
        ((60, 61, 62, 60), (50, 51, 52, 50), True),
        ((50, 51, 52, 50), (60, 61, 62, 60), False),
        ((51, 51, 53, 50), (50, 51, 52, 50), False),  # within the margin
        ((53, 54, 55, 53), (50, 51, 52, 50), True),
        ((90, 20, 90, 20), (50, 51, 52, 50), False),  # by chance
        ((60,), (50,), False),  # one text shows no spread
        ((), (), False),
    ],
)
def test_better_weights_gain_more_than_chance(ours: tuple[int, ...], theirs: tuple[int, ...], better: bool) -> None:
    assert scored(*ours).beats(scored(*theirs)) is better


def test_a_score_counts_all_texts_by_their_drafts() -> None:
    score = HeldBackScore((TextScore(10, 5, 8), TextScore(30, 6, 12)))
    assert (score.drafts, score.acceptance, score.accepted) == (40, 11 / 40, 20 / 40)
