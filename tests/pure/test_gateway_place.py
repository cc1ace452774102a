"""Ids of stream events: what they say, and what of a text is left to send after them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.errors import ApiError
from services.gateway.place import Place, left_of, rest_of
from services.gateway.session import Piece, Token

indices = st.integers(0, 127)


@given(st.dictionaries(indices, st.integers(0, 10**6), max_size=20), st.sets(indices), st.booleans())
def test_a_place_survives_being_written_and_read(shown: dict[int, int], closed: set[int], usage: bool) -> None:
    place = Place("chatcmpl-0a1b", shown, closed & shown.keys(), usage)
    assert Place.parse(str(place)) == place


@pytest.mark.parametrize(
    "text",
    [
        *("", "chatcmpl-1", "/0:1", "a b/0:1", "x/0:1,", "x/0", "x/0:-1", "x/0:1/v", "x/0:1\n"),
        "x/99999999999:1",
        "x/" + ",".join(f"{i}:1" for i in range(129)),
    ],
)
def test_what_is_no_place_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        Place.parse(text)
    assert (caught.value.status, caught.value.code) == (400, "invalid_event_id")
    assert "Last-Event-ID" in caught.value.message


@given(st.lists(st.text(min_size=1, max_size=5), max_size=10), st.data())
def test_what_is_left_of_a_text_follows_exactly_on_what_the_client_has(words: list[str], data: st.DataObject) -> None:
    text = "".join(words)
    # A client has whole pieces, but they need not be cut again as they were.
    ends = [sum(map(len, words[:count])) for count in range(len(words) + 1)]
    known = data.draw(st.sampled_from(ends))
    cuts = sorted({0, *data.draw(st.lists(st.sampled_from(ends), max_size=4)), len(text)})
    rest, seen, tokens = "", 0, []
    for start, end in pairwise(cuts):
        inside = [word for word, at in zip(words, ends, strict=False) if start <= at < end]
        piece = Piece(text[start:end], [Token(0, word, draft=False) for word in inside], round=0)
        left = rest_of(piece, left_of({3: known}, 3, seen))
        seen += len(piece.text)
        if left is not None:
            rest += left.text
            tokens += left.tokens
    assert rest == text[known:]
    assert "".join(token.text for token in tokens) == rest


def test_an_echoed_prompt_is_part_of_the_text_but_of_no_token() -> None:
    piece = Piece("prompt+one two", [Token(1, "one ", draft=False), Token(2, "two", draft=True)], round=0)
    left = rest_of(piece, len("prompt+one "))
    assert left is not None
    assert (left.text, [token.id for token in left.tokens]) == ("two", [2])
    assert rest_of(piece, len(piece.text)) is None
    assert rest_of(piece, 0) is piece
