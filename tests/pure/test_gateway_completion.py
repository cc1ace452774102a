"""Completions: committed tokens in, text out, also when results are lost, late or repeated."""

from __future__ import annotations

import codecs
import random
from collections.abc import Sequence
from pathlib import Path

import builders
import pytest
from gateway_peer import EOS, Script, results_of, tiny_target
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.completion import Completion, Piece
from shared.messages import Failure, Finish, Generate, Result, Status
from shared.models.stop import StopStrings
from shared.models.text import Detokenizer, Tokenizer

PROMPT_LEN = 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_target(Path(tmp_path_factory.mktemp("tiny"))))


def generate(max_tokens: int = 400) -> Generate:
    return builders.generate(prompt=[9] * PROMPT_LEN, stop_ids=[EOS], max_tokens=max_tokens)


def new_completion(tokenizer: Tokenizer, stops: list[str] | None = None, echo: str = "") -> Completion:
    return Completion(PROMPT_LEN, frozenset([EOS]), Detokenizer(tokenizer), StopStrings(stops or []), echo=echo)


def feed(completion: Completion, results: list[Result]) -> list[Piece]:
    pieces = []
    for result in results:
        completion.result(result)
        pieces += completion.take()
    return pieces


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def whole(tokenizer: Tokenizer, script: Script, stops: list[str] | None = None) -> tuple[Completion, list[Piece]]:
    completion = new_completion(tokenizer, stops)
    return completion, feed(completion, results_of(generate(), script, tokenizer))


TEXTS = st.text(st.sampled_from("ab \n.é€🙂"), min_size=1, max_size=30)


@given(text=TEXTS, round_len=st.integers(1, 9), stops=st.lists(st.text("ab .é🙂", min_size=1, max_size=3), max_size=3))
def test_the_text_ends_before_the_first_stop_string(
    tokenizer: Tokenizer, text: str, round_len: int, stops: list[str]
) -> None:
    completion, pieces = whole(tokenizer, Script(text=text, round_len=round_len), stops)
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    expected = text if not ends else text[: sum(min(ends))]
    assert text_of(pieces) == expected
    assert completion.finish is Finish.STOP
    assert completion.stopped_early == bool(ends)


@given(text=TEXTS, round_len=st.integers(1, 9), stops=st.lists(st.text("ab .é🙂", min_size=1, max_size=3), max_size=3))
def test_each_piece_is_the_text_of_its_tokens_in_order(
    tokenizer: Tokenizer, text: str, round_len: int, stops: list[str]
) -> None:
    completion, pieces = whole(tokenizer, Script(text=text, round_len=round_len), stops)
    for piece in pieces:
        assert piece.text == "".join(token.text for token in piece.tokens)
    ids = [token.id for piece in pieces for token in piece.tokens]
    assert ids == tokenizer.encode(text)[: len(ids)]
    assert completion.tally.tokens == len(ids)


@given(text=TEXTS, round_len=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_lost_late_repeated_and_reordered_results_change_no_text(
    tokenizer: Tokenizer, text: str, round_len: int, seed: int
) -> None:
    results = results_of(generate(), Script(text=text, round_len=round_len), tokenizer)
    committed = [token for result in results for token in result.tokens]
    luck = random.Random(seed)
    arriving = [result for result in results for _ in range(luck.choice([0, 1, 1, 2]))]
    luck.shuffle(arriving)
    completion = new_completion(tokenizer)
    pieces = feed(completion, arriving)
    # The rest, as Redis would return it.
    completion.committed(completion.length, committed[completion.length - PROMPT_LEN :], Finish.STOP)
    pieces += completion.take()
    assert text_of(pieces) == text
    assert completion.finish is Finish.STOP
    assert completion.tally.tokens == len(committed) - 1


def test_a_result_beyond_the_known_tokens_leaves_a_gap_to_fill(tokenizer: Tokenizer) -> None:
    results = results_of(generate(), Script(text="abcdefgh", round_len=4), tokenizer)
    completion = new_completion(tokenizer)
    assert feed(completion, [results[0], results[2]]) == []
    assert completion.gap
    completion.committed(PROMPT_LEN, results[1].tokens, None)
    assert not completion.gap
    assert text_of(completion.take() + feed(completion, results[2:])) == "abcdefgh"


@given(text=TEXTS, round_len=st.integers(1, 9))
def test_rounds_have_their_positions_and_add_up_to_the_tally(tokenizer: Tokenizer, text: str, round_len: int) -> None:
    completion, pieces = whole(tokenizer, Script(text=text, round_len=round_len))
    rounds = [round_ for piece in pieces for round_ in piece.rounds] + completion.take_rounds()
    assert [round_.start for round_ in rounds] == list(range(0, len(tokenizer.encode(text)) + 1, round_len))
    assert sum(round_.tokens for round_ in rounds) == completion.tally.tokens + 1
    for name in ("drafted", "verified", "accepted", "draft_ms", "queue_ms", "verify_ms"):
        assert sum(getattr(round_, name) for round_ in rounds) == getattr(completion.tally, name)
    assert rounds[0].verify_ms == 2.0 + 0.75, "the prefill chunk belongs to the first round"
    assert completion.take_rounds() == []


def test_queueing_and_drafting_count_once_for_a_chunked_prompt(tokenizer: Tokenizer) -> None:
    results = results_of(generate(), Script(text="abc", round_len=4), tokenizer)
    first = next(result for result in results if result.status is Status.COMMITTED)
    # Both chunks and the round belong to one Verify, drafted in 3 ms and sent 20 and 32 ms before the last two.
    chunks = [
        first.model_copy(
            update={
                "status": Status.PREFILLED,
                "batch": f"c{n}",
                "tokens": [],
                "draft_ms": 3.0,
                "queue_ms": q,
                "verify_ms": 10.0,
            }
        )
        for n, q in enumerate((8.0, 20.0))
    ]
    completion = new_completion(tokenizer)
    feed(completion, [*chunks, first.model_copy(update={"draft_ms": 3.0, "queue_ms": 32.0, "verify_ms": 5.0})])
    assert (completion.tally.draft_ms, completion.tally.queue_ms, completion.tally.verify_ms) == (3.0, 12.0, 25.0)


def test_accepted_draft_tokens_are_marked(tokenizer: Tokenizer) -> None:
    _, pieces = whole(tokenizer, Script(text="abcdefg", round_len=3))
    assert [(t.text, t.draft) for piece in pieces for t in piece.tokens] == [
        ("a", True),
        ("b", True),
        ("c", False),
        ("d", True),
        ("e", True),
        ("f", False),
        ("g", True),
    ]
    assert [piece.round for piece in pieces] == [0, 1, 2]


def test_rounds_count_once_and_bonus_tokens_are_not_accepted_ones(tokenizer: Tokenizer) -> None:
    results = results_of(generate(), Script(text="abcdefgh", round_len=3), tokenizer)
    completion = new_completion(tokenizer)
    feed(completion, [*results[:-1], *results[:-1], results[-1]])
    tally = completion.tally
    assert (tally.rounds, tally.tokens) == (3, 8)
    assert (tally.drafted, tally.verified, tally.accepted) == (12, 9, 6)
    assert tally.verify_ms == pytest.approx(2.0 + 3 * 0.75)


def test_a_late_result_counts_although_its_tokens_are_known(tokenizer: Tokenizer) -> None:
    results = results_of(generate(), Script(text="abcdefgh", round_len=3), tokenizer)
    completion = new_completion(tokenizer)
    completion.committed(PROMPT_LEN, results[1].tokens, None)
    feed(completion, results[1:])
    assert (completion.tally.rounds, completion.tally.accepted) == (3, 6)


def test_a_conflict_adds_tokens_but_no_round(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abc")
    conflict = builders.result("s", 4, PROMPT_LEN, ids, status=Status.CONFLICT)
    completion = new_completion(tokenizer)
    assert text_of(feed(completion, [conflict])) == "abc"
    assert completion.tally.rounds == 0
    assert completion.tally.tokens == 3


def test_the_end_of_text_token_is_neither_sent_nor_counted(tokenizer: Tokenizer) -> None:
    completion, pieces = whole(tokenizer, Script(text="ab"))
    assert text_of(pieces) == "ab"
    assert completion.tally.tokens == 2
    assert completion.length == PROMPT_LEN + 3


def test_a_completion_may_be_empty(tokenizer: Tokenizer) -> None:
    completion, pieces = whole(tokenizer, Script(text=""))
    assert (text_of(pieces), completion.finish) == ("", Finish.STOP)


def test_whitespace_is_text(tokenizer: Tokenizer) -> None:
    _, pieces = whole(tokenizer, Script(text="  \n \n\n ", round_len=2))
    assert text_of(pieces) == "  \n \n\n "


def test_no_piece_splits_a_character(tokenizer: Tokenizer) -> None:
    _, pieces = whole(tokenizer, Script(text="a🙂é€", round_len=1))
    assert [piece.text for piece in pieces] == ["a", "🙂", "é", "€"]


def test_a_character_cut_off_by_the_length_is_replaced(tokenizer: Tokenizer) -> None:
    completion = new_completion(tokenizer)
    pieces = feed(completion, results_of(generate(max_tokens=3), Script(text="a🙂", round_len=1), tokenizer))
    assert text_of(pieces) == "a�"
    assert completion.finish is Finish.LENGTH
    assert completion.tally.tokens == 3


class ByteDecoder:
    """Tokens of several bytes, some of which end in the middle of a character."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join((b"a", b"b\xe2", b"\x80\xe2", b"\x82")[one - 10] for one in ids))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


@pytest.mark.parametrize("tokens", [[11], [10, 11], [12], [11, 13], [10, 12, 12], [12, 13]])
@pytest.mark.parametrize("stops", [[], ["\ufffd\ufffd"], ["b\ufffd"]])
def test_an_unfinished_character_at_the_end_is_shown_however_tokens_come(tokens: list[int], stops: list[str]) -> None:
    """The stop token may come alone, when all tokens before it are sent."""
    shown = set()
    everything = [*tokens, EOS]
    for cuts in range(2 ** len(tokens)):
        completion = Completion(PROMPT_LEN, frozenset([EOS]), ByteDecoder(), StopStrings(stops))
        base_len, result, pieces = PROMPT_LEN, [], []
        for i, token in enumerate(everything):
            result.append(token)
            if cuts >> i & 1 or token == EOS:
                finish = Finish.STOP if token == EOS else None
                pieces += feed(completion, [builders.result("s", i, base_len, result, finish=finish)])
                base_len, result = base_len + len(result), []
        assert completion.finish is Finish.STOP
        shown.add(text_of(pieces))
    decoder = ByteDecoder()
    text = decoder.feed(tokens) + decoder.flush()
    assert shown == {min((text.split(stop)[0] for stop in stops), default=text)}


def test_a_replacement_character_can_complete_a_stop_string(tokenizer: Tokenizer) -> None:
    completion = new_completion(tokenizer, ["b\ufffd"])
    pieces = feed(completion, results_of(generate(max_tokens=4), Script(text="ab🙂", round_len=1), tokenizer))
    assert text_of(pieces) == "a"
    assert completion.finish is Finish.STOP


def test_text_that_could_become_a_stop_string_is_withheld(tokenizer: Tokenizer) -> None:
    completion = new_completion(tokenizer, ["END"])
    results = results_of(generate(), Script(text="xEN", round_len=1), tokenizer)
    assert text_of(feed(completion, results[:-1])) == "x"
    assert text_of(feed(completion, results[-1:])) == "EN"
    assert not completion.stopped_early


def test_a_stop_string_ends_the_completion_before_its_session(tokenizer: Tokenizer) -> None:
    completion = new_completion(tokenizer, ["END"])
    results = results_of(generate(), Script(text="text before END and after", round_len=4), tokenizer)
    pieces = feed(completion, results[:5])
    assert text_of(pieces) == "text before "
    assert completion.stopped_early
    assert completion.finish is Finish.STOP
    assert completion.tally.tokens == len("text before END")
    assert feed(completion, results) == []


def test_an_echo_comes_before_the_first_text_or_alone(tokenizer: Tokenizer) -> None:
    results = results_of(generate(), Script(text="ab", round_len=1), tokenizer)
    assert text_of(feed(new_completion(tokenizer, echo="prompt "), results)) == "prompt ab"
    empty = results_of(generate(), Script(text=""), tokenizer)
    assert text_of(feed(new_completion(tokenizer, echo="prompt "), empty)) == "prompt "


def test_a_failed_result_ends_the_completion_with_its_reason(tokenizer: Tokenizer) -> None:
    failure = Failure(code="cache_full", message="no room")
    completion, pieces = whole(tokenizer, Script(failure=failure))
    assert completion.failure == failure
    assert pieces == []
    assert completion.done


def test_tokens_of_a_run_are_counted_apart_from_rounds(tokenizer: Tokenizer) -> None:
    completion = new_completion(tokenizer)
    first, second, third = tokenizer.encode("a b c")[:3]
    feed(
        completion,
        [
            builders.result("s", 0, PROMPT_LEN, [first], trimmed_to=2, drafted=2, run_left=3),
            builders.result("s", 1, PROMPT_LEN + 1, [second, third], run=True, run_left=1, copied=[1], trimmed_to=4),
            builders.result("s", 2, PROMPT_LEN + 3, [EOS], run=True, finish=Finish.STOP),
        ],
    )
    tally = completion.tally
    assert (tally.rounds, tally.tokens, tally.run_tokens, tally.verified) == (1, 3, 2, 2), "the end is no token"
    assert (tally.copied, tally.copies_verified, tally.accepted, tally.drafts) == (1, 4, 0, 1)
    assert completion.finish is Finish.STOP


def test_a_stop_string_or_token_may_be_part_of_the_text(tokenizer: Tokenizer) -> None:
    completion = Completion(
        PROMPT_LEN, frozenset([EOS]), Detokenizer(tokenizer), StopStrings(["lo t"]), include_stop=True
    )
    pieces = feed(completion, results_of(generate(), Script("Hello there", round_len=3), tokenizer))
    assert text_of(pieces) == "Hello t"
    assert (completion.finish, completion.stopped_early) == (Finish.STOP, True)
    (letter,) = tokenizer.encode("w")
    completion = Completion(PROMPT_LEN, frozenset([letter]), Detokenizer(tokenizer), StopStrings([]), include_stop=True)
    ended = builders.result(base_len=PROMPT_LEN, tokens=[*tokenizer.encode("Now")], finish=Finish.STOP)
    assert text_of(feed(completion, [ended])) == "Now"
    assert (completion.finish, completion.tally.tokens) == (Finish.STOP, 3)


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (2, ""), (3, "ab "), (7, "ab ab ")])
def test_stop_strings_count_if_they_end_behind_the_fewest_tokens(
    tokenizer: Tokenizer, min_tokens: int, text: str
) -> None:
    completion = Completion(
        PROMPT_LEN, frozenset([EOS]), Detokenizer(tokenizer), StopStrings(["ab "]), min_tokens=min_tokens
    )
    assert text_of(feed(completion, results_of(generate(), Script("ab ab ab ab", round_len=2), tokenizer))) == text
