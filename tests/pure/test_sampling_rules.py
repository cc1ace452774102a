"""Changes of logits before the choice: each option's definition, position by position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import BadLogits, NoTokenAllowed
from shared.messages import LogitRules, ReasoningBudget, Sampling, TokenBias
from shared.sampling.rules import Floats, Ids, LogitsProcessor
from shared.sampling.sampler import Columns, choose, choose_in_rows

VOCABULARY = 8
ROW = np.array([2.0, -1.0, 0.5, 4.0, 0.0, -3.0, 1.0, 3.0], dtype=np.float32)


def ruled(temperature: float = 0.0, prompt_len: int = 2, **rules: Any) -> Sampling:
    return Sampling(temperature=temperature, seed=5, rules=LogitRules(prompt_len=prompt_len, **rules))


def changed(sampling: Sampling, tokens: Sequence[int], row: Floats = ROW) -> list[float]:
    result: list[float] = LogitsProcessor(sampling, tokens).apply(row).tolist()
    return result


def by_definition(row: Sequence[float], sampling: Sampling, tokens: Sequence[int]) -> list[float]:
    """vLLM's steps, written out token by token in float64."""
    rules, out = sampling.rules, list(row)
    assert rules is not None
    output = list(tokens[rules.prompt_len :])
    if (forced := forced_by_definition(rules.reasoning, output)) is not None:
        return [value if token == forced else -math.inf for token, value in enumerate(row)]
    biases: dict[int, float] = {one.token: one.bias for one in rules.logit_bias}
    for token in range(len(row)):
        banned = rules.allowed_token_ids is not None and token not in rules.allowed_token_ids
        for *before, last in rules.bad_words:
            banned |= last == token and output[len(output) - len(before) :] == before
        banned |= len(output) < rules.min_tokens and token in rules.withheld_ids
        if banned:
            out[token] = -math.inf
            continue
        out[token] += biases.get(token, 0.0)
        if token in tokens:
            out[token] *= 1 / rules.repetition_penalty if out[token] > 0 else rules.repetition_penalty
        out[token] -= rules.frequency_penalty * output.count(token)
        out[token] -= rules.presence_penalty * (token in output)
    if rules.min_p and sampling.temperature:
        largest = max(out)
        out = [
            value if math.exp((value - largest) / sampling.temperature) >= rules.min_p else -math.inf for value in out
        ]
    return out


def forced_by_definition(budget: ReasoningBudget | None, output: list[int]) -> int | None:
    """Return the closing tag if it has to come next, else None."""
    if budget is None:
        return None
    reasoning = output
    if budget.opening is not None:
        rest = list(itertools.dropwhile(lambda token: token in budget.blank and token != budget.opening, output))
        if rest[:1] != [budget.opening]:
            return None
        reasoning = rest[1:]
    return budget.closing if len(reasoning) == budget.most and budget.closing not in reasoning else None


IDS = st.integers(0, VOCABULARY - 1)
PENALTIES = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.5])
RULES = st.builds(
    LogitRules,
    prompt_len=st.integers(0, 4),
    presence_penalty=PENALTIES,
    frequency_penalty=PENALTIES,
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.25, 4.0]),
    logit_bias=st.lists(
        st.builds(TokenBias, token=IDS, bias=st.sampled_from([-100.0, -1.0, 0.5, 100.0])),
        max_size=3,
        unique_by=lambda bias: bias.token,
    ),
    min_p=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
    min_tokens=st.integers(0, 4),
    withheld_ids=st.lists(IDS, max_size=2),
    bad_words=st.lists(st.lists(IDS, min_size=1, max_size=3), max_size=3),
    allowed_token_ids=st.none() | st.lists(IDS, min_size=1, max_size=6),
    reasoning=st.none()
    | st.builds(
        ReasoningBudget,
        most=st.integers(0, 4),
        opening=st.none() | IDS,
        blank=st.lists(IDS, max_size=2),
        closing=IDS,
    ),
)
SAMPLINGS = st.builds(Sampling, temperature=st.sampled_from([0.0, 0.7, 1.3]), seed=st.just(7), rules=RULES)
TOKENS = st.lists(IDS, min_size=4, max_size=12)
NUMBERS = st.lists(
    st.sampled_from([-8.0, -2.0, -0.75, 0.0, 0.5, 1.0, 3.0, 9.0]), min_size=VOCABULARY, max_size=VOCABULARY
)


@given(NUMBERS, SAMPLINGS, TOKENS)
def test_the_logits_are_those_of_the_definition(row: list[float], sampling: Sampling, tokens: list[int]) -> None:
    found = changed(sampling, tokens, np.array(row, dtype=np.float32))
    assert found == pytest.approx(by_definition(row, sampling, tokens), rel=1e-5, abs=1e-5)


@given(NUMBERS, SAMPLINGS, TOKENS, st.integers(0, 12))
def test_positions_in_a_chain_are_those_of_their_prefixes(
    row: list[float], sampling: Sampling, tokens: list[int], start: int
) -> None:
    """A draft's positions have the bits that they have when they are decoded one by one."""
    logits = np.array(row, dtype=np.float32)
    prompt_len = 0 if sampling.rules is None else sampling.rules.prompt_len
    start = max(prompt_len, min(start, len(tokens)))
    chain = LogitsProcessor(sampling, tokens[:start])
    for end in range(start, len(tokens) + 1):
        alone = LogitsProcessor(sampling, tokens[:end]).apply(logits)
        assert chain.apply(logits).tobytes() == alone.tobytes()
        if end < len(tokens):
            chain.push(tokens[end])


@given(NUMBERS, SAMPLINGS, TOKENS, st.lists(IDS, min_size=1, unique=True))
def test_columns_have_the_logits_of_their_tokens(
    row: list[float], sampling: Sampling, tokens: list[int], some: list[int]
) -> None:
    ids = np.array(sorted(some))
    whole = np.full(VOCABULARY, -np.inf, dtype=np.float32)
    whole[ids] = np.array(row, dtype=np.float32)[ids]
    processor = LogitsProcessor(sampling, tokens)
    assert processor.apply(whole[ids], ids).tolist() == processor.apply(whole)[ids].tolist()


@given(NUMBERS, SAMPLINGS, TOKENS)
def test_a_row_is_not_changed_in_place(row: list[float], sampling: Sampling, tokens: list[int]) -> None:
    logits = np.array(row, dtype=np.float32)
    changed(sampling, tokens, logits)
    assert logits.tolist() == row


def test_repetition_counts_prompt_and_output_the_others_output_only() -> None:
    tokens = [0, 1, 3, 3]  # the first two are the prompt
    assert changed(ruled(repetition_penalty=2.0), tokens)[:4] == [1.0, -2.0, 0.5, 2.0]
    assert changed(ruled(presence_penalty=1.5), tokens)[:4] == [2.0, -1.0, 0.5, 2.5]
    assert changed(ruled(frequency_penalty=1.5), tokens)[:4] == [2.0, -1.0, 0.5, 1.0]


def test_withheld_tokens_are_allowed_after_the_fewest_tokens() -> None:
    sampling = ruled(min_tokens=2, withheld_ids=[3])
    assert changed(sampling, [0, 0, 5])[3] == -math.inf
    assert changed(sampling, [0, 0, 5, 5])[3] == 4.0


def test_a_bad_word_is_kept_from_being_completed_in_the_output() -> None:
    sampling = ruled(bad_words=[[1, 3], [7]])
    assert changed(sampling, [0, 1])[3] == 4.0, "the prompt's tokens are no part of it"
    assert changed(sampling, [0, 1, 1])[3] == -math.inf
    assert changed(sampling, [0, 1])[7] == -math.inf


@pytest.mark.parametrize(
    ("output", "forced"),
    [([4, 4], None), ([4, 4, 4], 6), ([4, 4, 4, 6], None), ([4, 4, 4, 5], None), ([4, 6, 4, 4, 4], None)],
)
def test_the_closing_tag_follows_the_last_token_of_reasoning(output: list[int], forced: int | None) -> None:
    budget = ReasoningBudget(most=3, opening=None, closing=6)
    sampling = ruled(reasoning=budget, allowed_token_ids=[1, 2], temperature=0.9)
    processor = LogitsProcessor(sampling, [0, 0, *output])
    assert processor.only == forced
    logits = np.random.default_rng(1).normal(size=(1, VOCABULARY)).astype(np.float32)
    (chosen,) = choose_in_rows(logits, [sampling], [9], processors=[processor])
    assert chosen == forced if forced is not None else chosen in (1, 2)


@pytest.mark.parametrize(
    ("output", "forced"), [([], None), ([5], 6), ([3, 3, 5], 6), ([1, 5], None), ([3, 1, 5], None), ([3, 3], None)]
)
def test_reasoning_begins_with_the_output_or_has_no_end(output: list[int], forced: int | None) -> None:
    budget = ReasoningBudget(most=0, opening=5, blank=[3], closing=6)
    assert LogitsProcessor(ruled(reasoning=budget), [5, 0, *output]).only == forced


def test_ids_beyond_the_vocabulary_change_nothing() -> None:
    sampling = ruled(logit_bias=[TokenBias(token=99, bias=1.0)], bad_words=[[99]], repetition_penalty=2.0)
    assert changed(sampling, [99, 98])[:] == ROW.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_choice_is_made_from_the_changed_logits(temperature: float) -> None:
    sampling = ruled(temperature, allowed_token_ids=[5], min_p=0.1)
    processor = LogitsProcessor(sampling, [0, 1])
    plain = Sampling(temperature=temperature, seed=5)
    rows = torch.from_numpy(np.stack([ROW, ROW]))
    chosen = choose(rows, [sampling, plain], [2, 2], [processor, None])
    assert chosen == [5, choose(rows[:1], [plain], [2])[0]]


@given(NUMBERS, SAMPLINGS, TOKENS)
def test_the_noise_is_added_to_the_changed_logits(row: list[float], sampling: Sampling, tokens: list[int]) -> None:
    logits = np.array([row], dtype=np.float32)
    processor = LogitsProcessor(sampling, tokens)
    after = processor.apply(logits[0])
    if math.isfinite(after.max()):
        expected = choose_in_rows(after[None], [sampling], [len(tokens)])
        assert choose_in_rows(logits, [sampling], [len(tokens)], processors=[processor]) == expected
    else:
        with pytest.raises(NoTokenAllowed, match=f"position {len(tokens)}"):
            choose_in_rows(logits, [sampling], [len(tokens)], processors=[processor])


def test_a_draft_vocabulary_without_an_allowed_token_is_used_as_it_is() -> None:
    sampling = ruled(allowed_token_ids=[5])
    columns = Columns.of(np.array([0, 2, 3]))
    chosen = choose_in_rows(ROW[None, [0, 2, 3]], [sampling], [2], columns, [LogitsProcessor(sampling, [0, 1])])
    assert chosen == [3]


def test_broken_logits_are_reported_although_the_rules_would_hide_them() -> None:
    sampling = ruled(allowed_token_ids=[5])
    row = ROW.copy()
    row[0] = np.nan
    with pytest.raises(BadLogits):
        choose_in_rows(row[None], [sampling], [2], processors=[LogitsProcessor(sampling, [0, 1])])


def test_without_rules_there_is_no_processor() -> None:
    assert LogitsProcessor.of(Sampling(temperature=1.0, top_k=3), [1, 2]) is None


class OnlyAfter:
    """Allows the token after the last one, as a grammar would."""

    def __init__(self, last: int) -> None:
        self.last = last

    @property
    def only(self) -> int | None:
        return self.last + 1

    @property
    def few(self) -> Ids | None:
        return np.array([self.last + 1])

    def allows(self, token: int) -> bool:
        return token == self.last + 1

    def apply(self, logits: Floats, ids: Ids | None) -> None:
        tokens = np.arange(len(logits)) if ids is None else ids
        logits[tokens != self.last + 1] = -np.inf

    def push(self, token: int) -> None:
        self.last = token


def test_a_mask_comes_before_the_other_rules() -> None:
    plain = Sampling()
    masked = LogitsProcessor.of(plain, [0], OnlyAfter(0))
    assert masked is not None
    chosen = [choose_in_rows(ROW[None], [plain], [1], processors=[masked])[0]]
    masked.push(chosen[0])
    chosen += choose_in_rows(ROW[None], [plain], [2], processors=[masked])
    assert chosen == [1, 2]
    both = LogitsProcessor(ruled(bad_words=[[1]]), [0, 0], OnlyAfter(0))
    with pytest.raises(NoTokenAllowed):
        choose_in_rows(ROW[None], [ruled()], [2], processors=[both])
