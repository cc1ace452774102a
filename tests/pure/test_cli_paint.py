"""Answers on every kind of terminal: draft tokens are set apart, and the numbers of the summary add up."""

from __future__ import annotations

import io
import itertools

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from services.tools.cli.ask import ClientAnswer, summary_lines, tokens_per_second
from services.tools.cli.core.text_parts import CLOSE, OPEN, TextPart, printable, text_parts
from services.tools.cli.paint import Painter

WRITTEN = [TextPart("The capital", False), TextPart(" of France", True), TextPart(" is Paris.", False)]
SUMMARY = {
    "rounds": 10.0,
    "tokens": 21.0,
    "drafted": 40.0,
    "verified": 40.0,
    "accepted": 10.0,
    "ttft_ms": 100.0,
    "total_ms": 2100.0,
    "draft_ms": 1.0,
    "queue_ms": 2.0,
    "verify_ms": 1500.0,
    "messaging_ms": 597.0,
}


def painted(written: list[TextPart], **options: object) -> str:
    file = io.StringIO()
    painter = Painter(Console(file=file, width=40, **options))  # type: ignore[arg-type]
    painter.write(written)
    painter.end()
    return file.getvalue()


def test_drafts_are_coloured_in_a_terminal() -> None:
    assert painted(WRITTEN, force_terminal=True, color_system="standard", no_color=False) == (
        "The capital\x1b[32m of France\x1b[0m is Paris.\n"
    )


def test_drafts_are_underlined_where_colour_is_not_wanted() -> None:
    assert painted(WRITTEN, force_terminal=True, no_color=True) == "The capital\x1b[4m of France\x1b[0m is Paris.\n"


def test_drafts_are_marked_where_there_is_no_terminal() -> None:
    assert painted(WRITTEN, force_terminal=False) == f"The capital{OPEN} of France{CLOSE} is Paris.\n"


def test_a_mark_spans_chunks_and_is_closed_at_the_end() -> None:
    file = io.StringIO()
    painter = Painter(Console(file=file, force_terminal=False))
    for part in (TextPart("a", False), TextPart("b", True), TextPart("c", True)):
        painter.write([part])
    painter.end()
    assert file.getvalue() == f"a{OPEN}bc{CLOSE}\n"


def test_long_lines_and_markup_come_out_as_they_are() -> None:
    text = "[bold]x[/bold] " * 20
    assert painted([TextPart(text, False)], force_terminal=False) == text + "\n"


def test_text_cannot_take_over_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\r\n\tc\x9b") == "a[2Jb\n\tc"


def test_a_chunk_is_split_by_origin() -> None:
    trace = {"tokens": [{"id": 1, "text": "a", "draft": True}, {"id": 2, "text": "b", "draft": True}]}
    assert text_parts("ab", trace) == [TextPart("ab", True)]
    trace["tokens"].append({"id": 3, "text": "c", "draft": False})
    assert text_parts("abc", trace) == [TextPart("ab", True), TextPart("c", False)]


def test_text_outside_the_trace_counts_as_the_targets() -> None:
    assert text_parts("abc", {"tokens": [{"id": 1, "text": "ab", "draft": True}]}) == [TextPart("abc", False)]
    assert text_parts("abc", None) == [TextPart("abc", False)]
    assert text_parts("", {}) == []


@given(st.lists(st.tuples(st.text(max_size=4), st.booleans())))
def test_splitting_loses_no_text(tokens: list[tuple[str, bool]]) -> None:
    delta = "".join(text for text, _ in tokens)
    trace = {"tokens": [{"id": 0, "text": text, "draft": draft} for text, draft in tokens]}
    split = text_parts(delta, trace)
    assert "".join(part.text for part in split) == delta
    assert all(one.draft != other.draft for one, other in itertools.pairwise(split))


def test_the_summary_gives_every_figure() -> None:
    text = "\n".join(summary_lines(SUMMARY))
    assert tokens_per_second(SUMMARY) == 10.0
    for figure in (
        "21 tokens in 10 rounds",
        "2.10 tokens per round",
        "10 of 40 draft tokens accepted (25%)",
        "first token after 100 ms",
        "10.0 tokens per second",
        "1 drafting, 2 queueing, 1,500 verifying, 597 messaging",
    ):
        assert figure in text


def test_a_summary_counts_one_token_in_the_singular() -> None:
    one = SUMMARY | {"tokens": 9.0, "rounds": 1.0, "run_tokens": 8.0, "verified": 1.0, "accepted": 1.0}
    made, per_round, drafts = summary_lines(one)[0].split(", ")
    assert made == "1 token in 1 round and 8 by the verifier alone"
    assert (per_round, drafts) == ("1.00 tokens per round", "1 of 1 draft token accepted (100%)")


def test_copies_are_counted_beside_the_drafts_that_are_marked_like_them() -> None:
    runs = SUMMARY | {"tokens": 40.0, "run_tokens": 19.0, "copied": 7.0}
    first, second, *_ = summary_lines(runs)
    assert first.startswith("21 tokens in 10 rounds and 19 by the verifier alone (7 of them copied)")
    assert second == "marked above: 10 accepted draft tokens and 7 copied by the verifier"
    assert "marked" not in "".join(summary_lines(SUMMARY))


def test_a_summary_without_drafts_or_a_second_token_is_possible() -> None:
    alone = SUMMARY | {"tokens": 1.0, "verified": 0.0, "accepted": 0.0, "total_ms": 100.0}
    assert "no drafts" in summary_lines(alone)[0]
    assert tokens_per_second(alone) == 0.0


def test_the_first_difference_of_two_answers_is_named() -> None:
    answer = ClientAnswer(text="ab", tokens=[1, 2], finish="stop")
    assert answer.difference(ClientAnswer(text="ab", tokens=[1, 2], finish="stop", summary={"rounds": 1.0})) == ""
    assert (
        answer.difference(ClientAnswer(text="ac", tokens=[1, 3, 4], finish="stop"))
        == "output token 2 is 2 and 3, of 2 and 3 tokens"
    )
    assert (
        answer.difference(ClientAnswer(text="a", tokens=[1], finish="length"))
        == "output token 2 is 2 and None, of 2 and 1 tokens"
    )
    assert "the text is 'ab' and 'a'" in answer.difference(ClientAnswer(text="a", tokens=[1, 2], finish="stop"))
    assert "'stop' and 'length'" in answer.difference(ClientAnswer(text="ab", tokens=[1, 2], finish="length"))
