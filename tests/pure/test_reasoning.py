"""Reasoning in answers: split from the content at its tags, however the text arrives."""

from __future__ import annotations

from pathlib import Path

import builders
import pytest
from gateway_peer import EOS, Script, results_of, tiny_target
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.answer import AnswerForm
from services.gateway.core.completion import Completion
from services.gateway.core.reasoning import CLOSE, OPEN, TAGS, ReasoningCounter, ReasoningSplitter, SplitText
from services.gateway.core.tool_calls import ContentDelta
from services.gateway.response import CompletionText
from shared.models.stop import StopStrings
from shared.models.text import Detokenizer, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_target(Path(tmp_path_factory.mktemp("tiny"))))


def split(text: str, *, is_open: bool = False) -> SplitText:
    return ReasoningSplitter(is_open=is_open).feed(text)


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("<think>a</think>b", False, "a", "b"),
        ("\n <think>a</think>\n\nb", False, "a", "\n\nb"),
        ("a</think>b", True, "a", "b"),
        ("a", True, "a", ""),
        ("<think>a", False, "a", ""),
        ("plain", False, "", "plain"),
        ("so <think>a</think>", False, "", "so <think>a</think>"),
        ("<think>a</think>b</think>", False, "a", "b</think>"),
        ("<think></think>", False, "", ""),
        ("", False, "", ""),
    ],
)
def test_the_reasoning_ends_with_the_first_closing_tag(text: str, is_open: bool, reasoning: str, content: str) -> None:
    assert split(text, is_open=is_open) == SplitText(reasoning, content)


def test_without_marks_all_is_content() -> None:
    text = CompletionText(AnswerForm.model_construct(thinks=None, tools=None))
    assert text.feed("<think>a</think>") == ("", [ContentDelta("<think>a</think>")])


TEXTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "th", "ink>", "a", "b "]), max_size=8).map("".join)


@given(TEXTS, st.integers(1, 5), st.booleans())
def test_pieces_cut_no_tag_and_join_to_the_whole(
    tokenizer: Tokenizer, text: str, round_len: int, is_open: bool
) -> None:
    counter = ReasoningCounter(is_open=is_open)
    completion = Completion(
        5, frozenset([EOS]), Detokenizer(tokenizer), StopStrings([]), tags=StopStrings(TAGS), reasoning=counter
    )
    splitter, parts = ReasoningSplitter(is_open=is_open), []
    pieces = []
    asked = builders.generate(prompt=[9] * 5, stop_ids=[EOS], max_tokens=400)
    for result in results_of(asked, Script(text, round_len=round_len), tokenizer):
        completion.result(result)
        pieces += completion.take()
    parts = [splitter.feed(piece.text) for piece in pieces]
    assert "".join(piece.text for piece in pieces) == text
    found = SplitText("".join(one.reasoning for one in parts), "".join(one.content for one in parts))
    assert found == split(text, is_open=is_open)
    assert counter.tokens == len(found.reasoning), "a token is a byte here"


@pytest.mark.parametrize(
    ("pieces", "is_open", "tokens"),
    [
        ([[OPEN, "so ", "it", CLOSE, "yes"]], False, 2),
        ([[OPEN], ["so ", "it"], [CLOSE], ["yes"]], False, 2),
        ([["so ", f"it{CLOSE}", "yes"]], True, 2),
        ([[f"{OPEN}so", f" it{CLOSE}yes"]], False, 2),
        ([[OPEN, "", "", "€", CLOSE]], False, 3),
        ([["", "", "€"], [CLOSE, "yes"]], True, 3),
        ([["<", "think", ">", "</", "think", ">"]], False, 0),
        ([["yes ", OPEN, "no", CLOSE]], False, 0),
        ([["so"], ["it"]], True, 2),
    ],
)
def test_tokens_of_reasoning_are_counted(pieces: list[list[str]], is_open: bool, tokens: int) -> None:
    counter = ReasoningCounter(is_open=is_open)
    for piece in pieces:
        counter.add(piece)
    assert counter.tokens == tokens


def test_a_stop_string_behind_a_withheld_tag_ends_the_text(tokenizer: Tokenizer) -> None:
    completion = Completion(5, frozenset([EOS]), Detokenizer(tokenizer), StopStrings(["!"]), tags=StopStrings(TAGS))
    asked = builders.generate(prompt=[9] * 5, stop_ids=[EOS], max_tokens=400)
    pieces = []
    for result in results_of(asked, Script("ab</thi!cd", round_len=3), tokenizer):
        completion.result(result)
        pieces += completion.take()
    assert "".join(piece.text for piece in pieces) == "ab</thi"
    assert completion.stopped_early


def test_the_cached_part_of_a_prompt_is_counted(tokenizer: Tokenizer) -> None:
    completion = Completion(10, frozenset([EOS]), Detokenizer(tokenizer), StopStrings([]))
    completion.result(builders.result(base_len=10, status="prefilled", new_tokens=3, batch="a"))
    completion.result(builders.result(base_len=10, tokens=[5, 6], new_tokens=4, trimmed_to=2, accepted=1))
    completion.result(builders.result(base_len=12, tokens=[7], new_tokens=1, round_=1))
    assert completion.cached_prompt == 10 - 3 - 2
