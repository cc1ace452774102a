"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.models.stop import StopStrings

stop_lists = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)
pieces = st.lists(st.text("ab\n", max_size=6), max_size=12)


def first_hit(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that ends first (the longest of those), looked up in the whole text."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


def fed(stops: list[str], texts: list[str]) -> tuple[str, str | None]:
    detector = StopStrings(stops)
    shown = ""
    for text in texts:
        safe, hit = detector.feed(text)
        shown += safe
        if hit is not None:
            return shown, hit
    return shown + detector.flush(), None


@settings(max_examples=10 * settings.default.max_examples)
@given(stops=stop_lists, texts=pieces)
@example(stops=["aab"], texts=["aa", "ab"])
@example(stops=["abab", "ba"], texts=list("aababab"))
def test_the_outcome_is_that_of_searching_the_whole_text(stops: list[str], texts: list[str]) -> None:
    assert fed(stops, texts) == first_hit("".join(texts), stops)


@settings(max_examples=5 * settings.default.max_examples)
@given(stops=stop_lists, texts=pieces)
def test_exactly_the_longest_beginning_of_a_stop_string_is_withheld(stops: list[str], texts: list[str]) -> None:
    detector = StopStrings(stops)
    shown = seen = ""
    for text in texts:
        seen += text
        safe, hit = detector.feed(text)
        if hit is not None:
            return
        shown += safe
        beginnings = [stop[:n] for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])]
        assert shown + max(beginnings, key=len, default="") == seen


@given(stops=stop_lists.filter(bool), texts=pieces)
def test_after_a_stop_string_nothing_is_shown_any_more(stops: list[str], texts: list[str]) -> None:
    detector = StopStrings(stops)
    detector.feed(stops[0])
    hit = detector.hit
    assert hit is not None
    assert [detector.feed(text) for text in texts] == [("", hit)] * len(texts)
    assert detector.flush() == ""


def test_a_stop_string_may_span_many_pieces() -> None:
    detector = StopStrings(["<|end of text|>"])
    shown = [detector.feed(character) for character in "Hi <|end of time. <|end of text|> there"]
    assert "".join(text for text, _ in shown) == "Hi <|end of time. "
    assert detector.hit == "<|end of text|>"


def test_withheld_text_is_given_at_the_end() -> None:
    detector = StopStrings(["\n\nUser:"])
    assert detector.feed("Fine.\n\nUse") == ("Fine.", None)
    assert detector.flush() == "\n\nUse"
    assert detector.flush() == ""


def test_without_stop_strings_nothing_is_withheld() -> None:
    assert StopStrings([]).feed("abc") == ("abc", None)


def test_a_text_full_of_near_hits_costs_time_in_proportion_to_its_length() -> None:
    stop = "a" * 2000 + "b"
    detector = StopStrings([stop])
    shown = sum(len(detector.feed("a" * 100)[0]) for _ in range(1000))
    assert shown == 100_000 - 2000


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["x", ""])
