"""Stream cursors: their text, and the rest of a completion after one."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.completion import Piece, Token
from services.gateway.core.cursor import Delivered, StreamCursor, rest_of
from services.gateway.errors import ApiError

indices = st.integers(0, 127)
counts = st.integers(0, 10**6)


@given(st.dictionaries(indices, st.builds(Delivered, counts, counts), max_size=20), st.sets(indices), st.booleans())
def test_a_cursor_survives_its_text_form(delivered: dict[int, Delivered], closed: set[int], usage: bool) -> None:
    cursor = StreamCursor("chatcmpl-0a1b", delivered, closed & delivered.keys(), usage)
    assert StreamCursor.parse(str(cursor)) == cursor


@pytest.mark.parametrize(
    "text",
    [
        *("", "chatcmpl-1", "/0:1", "a b/0:1", "x/0:1:1,", "x/0", "x/0:1", "x/0:-1:1", "x/0:1:1/v", "x/0:1:1\n"),
        "x/99999999999:1:1",
        "x/" + ",".join(f"{i}:1:1" for i in range(129)),
    ],
)
def test_other_texts_are_refused_with_the_reason(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        StreamCursor.parse(text)
    assert (caught.value.status, caught.value.code) == (400, "invalid_event_id")
    assert "Last-Event-ID" in caught.value.message


@given(st.lists(st.text(max_size=5), max_size=10), st.text(max_size=5), st.data())
def test_the_rest_of_a_completion_starts_where_the_client_is(words: list[str], echo: str, data: st.DataObject) -> None:
    def cuts() -> list[int]:
        """Positions between the pieces, in tokens."""
        return sorted({0, *data.draw(st.lists(st.integers(0, len(words)), max_size=4)), len(words)})

    def pieces(at: list[int]) -> list[Piece]:
        made = [words[start:end] for start, end in pairwise(at)] or [[]]
        texts = ["".join(some) for some in made]
        texts[0] = echo + texts[0]
        return [
            Piece(text, [Token(0, word, draft=False) for word in some], round=0)
            for text, some in zip(texts, made, strict=True)
        ]

    known, had = Delivered(), Piece("", [], round=0)
    for piece in pieces(cuts())[: data.draw(st.integers(0, 5))]:
        known = known.after(piece)
        had = Piece(had.text + piece.text, had.tokens + piece.tokens, round=0)
    seen = Delivered()
    for piece in pieces(cuts()):  # the pieces may differ from those before
        if (left := rest_of(piece, seen, known)) is not None:
            had = Piece(had.text + left.text, had.tokens + left.tokens, round=0)
        seen = seen.after(piece)
    assert had.text == echo + "".join(words)
    assert [token.text for token in had.tokens] == words
