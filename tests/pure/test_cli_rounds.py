"""The picture of an answer's rounds: times to scale, tokens by origin, no time lost between chunks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from services.tools.cli.core.answer_rounds import BAR, BEYOND, AnswerRound, Arrival, picture, rounds_of
from services.tools.cli.core.text_parts import TextPart
from services.tools.cli.paint import Painter


def painter(**options: object) -> Painter:
    return Painter(Console(file=io.StringIO(), width=100, **options))  # type: ignore[arg-type]


def made(
    number: int = 1, total_ms: float = 32.0, draft_ms: float = 4.0, verify_ms: float = 20.0, **costs: object
) -> AnswerRound:
    fields = {
        "queue_ms": 1.0,
        "verified": 2,
        "accepted": 1,
        "tokens": (TextPart(" sky", True), TextPart(" is", False)),
    } | costs
    return AnswerRound(number, total_ms, draft_ms, verify_ms=verify_ms, **fields)  # type: ignore[arg-type]


def cost(number: int, start: int, tokens: int, verify_ms: float = 30.0) -> dict[str, object]:
    return {
        "round": number,
        "start": start,
        "tokens": tokens,
        "drafted": 3,
        "verified": 2,
        "accepted": 1,
        "draft_ms": 1.0,
        "queue_ms": 0.5,
        "verify_ms": verify_ms,
    }


def tokens(text: str) -> list[dict[str, object]]:
    return [{"id": 0, "text": letter, "draft": letter.islower()} for letter in text]


def bars(lines: list[str]) -> list[str]:
    return [line.split(" ms ")[1][:BAR].rstrip() for line in lines[1:]]


def plain(rounds: list[AnswerRound]) -> list[str]:
    return [line.plain for line in picture(rounds, painter(force_terminal=False).style)]


def test_a_round_lasts_from_chunk_to_chunk_and_has_its_own_tokens() -> None:
    rounds = rounds_of(
        [
            Arrival(5.0, {}),
            Arrival(100.0, {"tokens": tokens("aB"), "rounds": [cost(0, 0, 2)]}),
            Arrival(140.0, {"tokens": tokens("cdE"), "rounds": [cost(1, 2, 3)]}),
        ]
    )
    assert [(one.number, one.total_ms, one.outside_ms) for one in rounds] == [(0, 100.0, 69.0), (1, 40.0, 9.0)]
    assert rounds[1].tokens == (TextPart("c", True), TextPart("d", True), TextPart("E", False))


def test_rounds_that_come_in_one_chunk_share_its_time() -> None:
    arrival = Arrival(100.0, {"tokens": tokens("aBc"), "rounds": [cost(0, 0, 1, 30.0), cost(1, 1, 2, 50.0)]})
    rounds = rounds_of([arrival])
    assert [one.total_ms for one in rounds] == pytest.approx([40.0, 60.0])
    assert ["".join(part.text for part in one.tokens) for one in rounds] == ["a", "Bc"]


def test_a_round_that_brought_only_the_end_of_the_text_has_no_tokens() -> None:
    rounds = rounds_of(
        [Arrival(50.0, {"tokens": tokens("A"), "rounds": [cost(0, 0, 1)]}), Arrival(90.0, {"rounds": [cost(1, 1, 1)]})]
    )
    assert rounds[1].tokens == ()


def test_bars_are_to_scale() -> None:
    lines = plain([made(0), made(1), made(2, total_ms=16.0, draft_ms=0.0, verify_ms=16.0)])
    assert "one column is 1 ms" in lines[0]
    assert bars(lines) == ["▒" * 4 + "░" * 8 + "█" * 20] * 2 + ["█" * 16]


def test_the_first_round_does_not_set_the_scale_and_is_cut() -> None:
    lines = plain([made(0, total_ms=800.0, draft_ms=0.0, verify_ms=700.0), made(1)])
    assert bars(lines)[0] == "░" * (BAR - 1) + BEYOND
    assert len(bars(lines)[1]) == BAR


def test_tokens_are_marked_by_origin_and_rejections_counted() -> None:
    assert plain([made()])[1].endswith("‹ sky› is  1 rejected")
    assert plain([made(accepted=2)])[1].endswith("‹ sky› is")
    (_, line) = picture([made()], painter(force_terminal=True, color_system="standard", no_color=False).style)
    assert line.plain.endswith(" sky is  1 rejected")
    assert any("green" in str(span.style) and line.plain[span.start : span.end] == " sky" for span in line.spans)


def test_a_line_stays_one_line() -> None:
    assert plain([made(tokens=(TextPart("a\nb\x1b[2J", False),))])[1].endswith("a⏎b[2J  1 rejected")


def drawn(rounds: list[AnswerRound], limit: int, **options: object) -> str:
    shown = painter(**options)
    shown.draw_rounds(rounds, limit=limit)
    return shown.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_only_the_first_rounds_are_drawn() -> None:
    text = drawn([made(number) for number in range(12)], limit=3, force_terminal=False)
    assert text.count("rejected") == 3
    assert text.endswith("  and 9 more rounds\n")


@pytest.mark.parametrize(
    ("rounds", "runs", "left"),
    [
        (5, 7, "and 5 more rounds and 7 more reports of runs"),
        (1, 1, "and 1 more round and 1 more report of a run"),
        (0, 2, "and 2 more reports of runs"),
    ],
)
def test_reports_of_runs_do_not_count_as_rounds(rounds: int, runs: int, left: str) -> None:
    text = drawn([made(), *[made()] * rounds, *[made(run=True)] * runs], limit=1, force_terminal=False)
    assert text.endswith(f"  {left}\n")


def test_the_legend_fits_a_terminal_of_80_columns() -> None:
    rounds = [made(0, total_ms=1e5), made(1, total_ms=1e5), made(2, total_ms=1e5, run=True)]
    first, second, *_ = drawn(rounds, limit=3, force_terminal=True, no_color=True).splitlines()
    assert "one column is 5000 ms" in first
    assert "run:" in second
    assert max(len(first), len(second)) < 80


@pytest.mark.parametrize("total_ms", [0.0, 0.001, 1e6])
def test_any_time_can_be_drawn(total_ms: float) -> None:
    assert len(plain([made(total_ms=total_ms, draft_ms=0.0, verify_ms=0.0)])) == 2


def test_without_rounds_there_is_no_picture() -> None:
    assert plain([]) == []
    assert rounds_of([Arrival(1.0, {}), Arrival(2.0, {"summary": {}})]) == []
