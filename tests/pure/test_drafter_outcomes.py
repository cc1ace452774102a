"""The likely outcomes of a round in flight, and the likely choices of a target."""

from __future__ import annotations

import numpy as np
import pytest

from services.drafter.core.outcomes import Outcome, likely_outcomes
from shared.messages import LogitRules, Sampling
from shared.sampling.likely import likely_choices
from shared.sampling.rules import LogitsProcessor
from shared.sampling.sampler import Columns, choose_in_rows

COLUMNS = Columns.of(np.arange(3, 900, 3))
SAMPLINGS = [Sampling(), Sampling(temperature=0.7, seed=5), Sampling(temperature=1.5, seed=-6)]


def test_chances_of_outcomes_follow_acceptance_and_choices() -> None:
    choices = [[(7, 0.6), (1, 0.3), (2, 0.1)], [(3, 0.5), (8, 0.25)], [(9, 0.8), (4, 0.2)]]
    found = likely_outcomes([7, 8], [0.5, 0.75], choices, 10)
    expected = [
        Outcome(0.5 * 0.3 / 0.4, 0, 1),
        Outcome(0.5 * 0.75 * 0.8, 2, 9),
        Outcome(0.5 * 0.1 / 0.4, 0, 2),
        Outcome(0.5 * 0.25 * 0.5 / 0.75, 1, 3),
        Outcome(0.5 * 0.75 * 0.2, 2, 4),
    ]
    assert [(one.accepted, one.bonus) for one in found] == [(one.accepted, one.bonus) for one in expected]
    assert [one.chance for one in found] == pytest.approx([one.chance for one in expected])
    assert likely_outcomes([7, 8], [0.5, 0.75], choices, 2) == found[:2]


def test_a_draft_token_that_is_no_likely_choice_takes_no_share() -> None:
    assert likely_outcomes([5], [0.25], [[(7, 0.5)], []], 4) == [Outcome(0.375, 0, 7)]


def test_without_another_choice_there_is_no_rejection() -> None:
    assert likely_outcomes([5], [0.25], [[(5, 1.0)], [(6, 0.5)]], 4) == [Outcome(0.125, 1, 6)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_choices_are_ordered_as_if_each_before_them_were_not_allowed(sampling: Sampling) -> None:
    logits = (np.random.default_rng(3).standard_normal(len(COLUMNS.ids)) * 2).astype(np.float32)
    found = likely_choices(logits, sampling, 17, COLUMNS, 6, None)
    assert [share for _, share in found] == sorted((share for _, share in found), reverse=True)
    for token, _ in found:
        assert choose_in_rows(logits[None], [sampling], [17], COLUMNS) == [token]
        logits[COLUMNS.ids.searchsorted(token)] = -100.0


def test_greedy_shares_are_the_softmax_and_add_up_to_one() -> None:
    columns = Columns.of(np.arange(4))
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    found = likely_choices(logits, Sampling(), 0, columns, 9, None)
    assert [token for token, _ in found] == [3, 2, 1, 0]
    assert [share for _, share in found] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_rules_hold_for_likely_choices() -> None:
    sampling = Sampling(temperature=1.0, seed=2, rules=LogitRules(prompt_len=2, bad_words=[[3], [6]]))
    logits = np.zeros(len(COLUMNS.ids), np.float32)
    found = likely_choices(logits, sampling, 4, COLUMNS, len(COLUMNS.ids), LogitsProcessor(sampling, [1, 2], None))
    assert {token for token, share in found if share > 0} == set(COLUMNS.ids.tolist()) - {3, 6}
