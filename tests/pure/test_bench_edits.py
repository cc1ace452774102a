"""Predicted outputs on the packaged edits: found again behind what was inserted, deleted or replaced."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from services.drafter.control import Controller
from services.tools.bench.edits.__main__ import packaged
from services.tools.bench.edits.core.decoding import copied_rounds
from services.tools.bench.edits.core.documents import Edit, edits

EDITS = packaged()
DRAFT_LENGTH = 8


def words(text: str, ids: dict[str, int]) -> list[int]:
    """Tokens for tests: words and signs with the space before them, and line ends with the indentation behind them."""
    return [ids.setdefault(word, len(ids)) for word in re.findall(r" ?\w+|\n\s*| +| ?[^\w\s]", text)]


def rounds_of(edit: Edit, *, predicted: bool) -> tuple[int, int]:
    """Return the tokens of an edited document, and the rounds that they take."""
    ids: dict[str, int] = {}
    before, after = words(edit.before, ids), words(edit.after, ids)
    controller = Controller("fixed", DRAFT_LENGTH)
    return len(after), len(list(copied_rounds(before, after, controller, before if predicted else None)))


def test_the_package_has_fifty_different_edits() -> None:
    assert len({(edit.document, edit.instruction) for edit in EDITS}) == len({edit.after for edit in EDITS}) == 50
    assert {edit.kind for edit in EDITS} == {"code", "text"}
    assert all(edit.before != edit.after for edit in EDITS)


def test_a_replaced_text_has_to_occur_once() -> None:
    document = {
        "name": "d",
        "kind": "text",
        "content": "a b a",
        "edit": [{"instruction": "w", "replace": [["a", "c"]]}],
    }
    with pytest.raises(ValueError, match="occurs 2 times"):
        list(edits({"document": [document]}))


def test_edits_take_over_six_tokens_a_round_with_a_prediction() -> None:
    with_it, without = ([rounds_of(edit, predicted=predicted) for edit in EDITS] for predicted in (True, False))
    tokens = sum(tokens for tokens, _ in with_it)
    assert tokens / sum(rounds for _, rounds in with_it) > 6
    assert min(tokens / rounds for tokens, rounds in with_it) > 3
    assert sum(rounds for _, rounds in with_it) < sum(rounds for _, rounds in without)


BEFORE = list(range(100))


@pytest.mark.parametrize(
    "after",
    [
        [*BEFORE[:50], 900, 901, 902, *BEFORE[50:]],
        [*BEFORE[:50], *BEFORE[60:]],
        [*BEFORE[:50], 900, *BEFORE[51:]],
        [*BEFORE[:50], 900, 901, 902, *BEFORE[55:]],
        [*BEFORE[50:], *BEFORE[:50]],
    ],
    ids=["insertion", "deletion", "replacement", "longer replacement", "moved"],
)
def test_one_difference_costs_few_rounds(after: Sequence[int]) -> None:
    whole = -(-len(after) // (DRAFT_LENGTH + 1))
    made = list(copied_rounds([7], after, Controller("fixed", DRAFT_LENGTH), BEFORE))
    new = sum(token >= 900 for token in after)
    assert len(made) <= whole + new + 3
    assert sum(round_.accepted + 1 for round_ in made) == len(after)
    last = made[-2]
    assert last.accepted == len(last.draft), "the place is found again"
