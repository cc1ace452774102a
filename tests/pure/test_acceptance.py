"""Acceptance: a draft is accepted exactly as far as it equals the target's own choices."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.verifier.core.acceptance import accept
from shared.messages import Finish

NONE: frozenset[int] = frozenset()
TOKENS = st.integers(0, 5)


def test_an_accepted_draft_also_brings_the_bonus_token() -> None:
    verdict = accept([1, 2, 3], [1, 2, 3, 4], room=10, stop_ids=NONE)
    assert (verdict.accepted, verdict.tokens, verdict.finish) == (3, [1, 2, 3, 4], None)


def test_the_first_difference_is_replaced_by_the_targets_token() -> None:
    verdict = accept([1, 2, 3], [1, 9], room=10, stop_ids=NONE)
    assert (verdict.accepted, verdict.tokens) == (1, [1, 9])


def test_a_round_without_a_draft_decodes_one_token() -> None:
    verdict = accept([], [7], room=10, stop_ids=NONE)
    assert (verdict.accepted, verdict.tokens) == (0, [7])


def test_a_stop_token_inside_the_draft_ends_the_completion() -> None:
    verdict = accept([1, 2, 3], [1, 2, 3, 4], room=10, stop_ids=frozenset([2]))
    assert (verdict.accepted, verdict.tokens, verdict.finish) == (2, [1, 2], Finish.STOP)


def test_choices_behind_a_stop_token_may_be_missing() -> None:
    verdict = accept([1, 2, 3], [1, 2], room=10, stop_ids=frozenset([2]))
    assert (verdict.accepted, verdict.tokens, verdict.finish) == (2, [1, 2], Finish.STOP)


def test_a_stop_token_in_the_last_place_finishes_with_stop() -> None:
    assert accept([], [2], room=1, stop_ids=frozenset([2])).finish is Finish.STOP


def test_the_completion_never_grows_beyond_its_room() -> None:
    verdict = accept([1, 2, 3], [1, 2, 3, 4], room=2, stop_ids=NONE)
    assert (verdict.accepted, verdict.tokens, verdict.finish) == (2, [1, 2], Finish.LENGTH)


@given(st.lists(TOKENS, min_size=1, max_size=30), st.data())
def test_the_completion_is_the_targets_for_any_drafts(text: list[int], data: st.DataObject) -> None:
    """Decoding a fixed continuation with arbitrary drafts always gives that continuation."""
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
