"""Acceptance: the draft counts exactly as far as it is what the target would have said."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.verifier.core.acceptance import accept
from shared.messages import Finish

NONE: frozenset[int] = frozenset()
TOKENS = st.integers(0, 5)


def test_an_accepted_draft_brings_the_bonus_token_as_well() -> None:
    verdict = accept([1, 2, 3], [1, 2, 3, 4], room=10, stop_ids=NONE)
    assert (verdict.accepted, verdict.tokens, verdict.finish) == (3, [1, 2, 3, 4], None)


def test_the_first_difference_is_the_targets_own_token() -> None:
    verdict = accept([1, 2, 3], [1, 9], room=10, stop_ids=NONE)
    assert (verdict.accepted, verdict.tokens) == (1, [1, 9])


def test_without_a_draft_a_round_is_one_decoded_token() -> None:
    verdict = accept([], [7], room=10, stop_ids=NONE)
    assert (verdict.accepted, verdict.tokens) == (0, [7])


def test_a_stop_token_inside_the_draft_ends_the_text_there() -> None:
    verdict = accept([1, 2, 3], [1, 2, 3, 4], room=10, stop_ids=frozenset([2]))
    assert (verdict.accepted, verdict.tokens, verdict.finish) == (2, [1, 2], Finish.STOP)


def test_a_stop_token_in_the_last_place_is_a_stop_and_not_a_length() -> None:
    assert accept([], [2], room=1, stop_ids=frozenset([2])).finish is Finish.STOP


def test_the_text_never_grows_beyond_its_room() -> None:
    verdict = accept([1, 2, 3], [1, 2, 3, 4], room=2, stop_ids=NONE)
    assert (verdict.accepted, verdict.tokens, verdict.finish) == (2, [1, 2], Finish.LENGTH)


@given(st.lists(TOKENS, min_size=1, max_size=30), st.data())
def test_however_it_is_drafted_the_text_is_the_targets(text: list[int], data: st.DataObject) -> None:
    """Decode a fixed continuation with arbitrary drafts and lengths: the result is always that continuation."""
    stop_ids = frozenset([5])
    end = text.index(5) + 1 if 5 in text else len(text)
    finish = Finish.STOP if 5 in text else Finish.LENGTH
    out: list[int] = []
    last = None
    while last is None:
        draft = data.draw(st.lists(TOKENS, max_size=6))
        upcoming = [*text[len(out) :], *[0] * 8]
        verdict = accept(draft, upcoming[: len(draft) + 1], room=len(text) - len(out), stop_ids=stop_ids)
        assert verdict.tokens[: verdict.accepted] == draft[: verdict.accepted]
        assert len(verdict.tokens) >= 1
        out += verdict.tokens
        last = verdict.finish
    assert (out, last) == (text[:end], finish)
