"""Log-probabilities: from logits to records, and from records to the fields of an answer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from gateway_peer import EOS, tiny_target
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.answer import AnswerForm
from services.gateway.core.completion import Completion, Token
from services.gateway.logprobs import LogprobFields
from shared.messages import Finish, Logprobs
from shared.messages.logprobs import TokenLogprob, as_text, from_text, pack_logprobs, unpack_logprobs
from shared.models.stop import StopStrings
from shared.models.text import Detokenizer, Tokenizer
from shared.sampling.logprobs import LEAST, logprobs_of

PROMPT = [10, 11, 12]
FORM: dict[str, Any] = {"created": 1, "model": "m", "chat": True, "service_class": "default", "pool": "pool"}
FORM |= {"seed": 1, "stops": [], "echoes": [""], "prompt_tokens": 3}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_target(Path(tmp_path_factory.mktemp("tiny"))))


def logprob(value: float, rank: int = 1, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(value, rank, top)


@given(
    st.lists(st.sampled_from([-30.0, -1.0, 0.0, 0.0, 2.5, 2.5, 7.0]), min_size=5, max_size=40),
    st.integers(0, 5),
    st.data(),
)
def test_the_records_are_those_of_the_softmax(row: list[float], top: int, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(row) - 1))
    (found,) = logprobs_of(np.array([row], dtype=np.float32), [token], top)
    total = math.log(math.fsum(math.exp(value) for value in row))
    assert found.logprob == pytest.approx(row[token] - total, abs=1e-5)
    assert found.rank == 1 + sum(value > row[token] for value in row)
    order = sorted(range(len(row)), key=lambda one: (-row[one], one))[:top]
    assert [one for one, _ in found.top] == order
    assert [value for _, value in found.top] == pytest.approx([row[one] - total for one in order], abs=1e-5)


def test_minus_infinity_has_a_number() -> None:
    row = np.array([[0.0, -np.inf, -np.inf]], dtype=np.float32)
    (found,) = logprobs_of(row, [1], 4)
    assert (found.logprob, found.top[0], found.top[1]) == (LEAST, (0, 0.0), (1, LEAST))
    assert len(found.top) == 4, "records of one size"


@given(
    st.integers(0, 20).flatmap(
        lambda top: st.lists(
            st.builds(
                TokenLogprob,
                logprob=st.floats(-9999, 0, width=32),
                rank=st.integers(1, 2**31 - 1),
                top=st.tuples(*[st.tuples(st.integers(0, 2**31 - 1), st.floats(-9999, 0, width=32))] * top),
            ),
            max_size=4,
        ).map(lambda records: (top, records))
    )
)
def test_records_survive_the_way(case: tuple[int, list[TokenLogprob]]) -> None:
    top, records = case
    body = from_text(as_text(pack_logprobs(records)))
    assert unpack_logprobs(body, top) == records
    assert unpack_logprobs(body[:-1], top) == records[:-1]


def test_damaged_records_are_none() -> None:
    assert from_text("#") == b""


def completion(tokenizer: Tokenizer, wanted: Logprobs, **fields: Any) -> Completion:
    return Completion(len(PROMPT), frozenset([EOS]), Detokenizer(tokenizer), StopStrings([]), logprobs=wanted, **fields)


def result(base_len: int, tokens: list[int], start: int, records: list[TokenLogprob], **fields: Any) -> Any:
    packed = as_text(pack_logprobs(records))
    return builders.result(base_len=base_len, tokens=tokens, logprobs=packed, logprobs_from=start, **fields)


def test_every_token_has_its_own_record(tokenizer: Tokenizer) -> None:
    one = completion(tokenizer, Logprobs())
    tokens = tokenizer.encode("abc")
    one.result(result(3, tokens[:2], 3, [logprob(-1.0), logprob(-2.0)]))
    one.result(result(4, tokens[1:], 4, [logprob(-2.0), logprob(-3.0)], round_=1, finish=Finish.LENGTH))
    pieces = one.take()
    assert [(t.text, t.logprob) for piece in pieces for t in piece.tokens] == [
        ("a", logprob(-1.0)),
        ("b", logprob(-2.0)),
        ("c", logprob(-3.0)),
    ]


def test_tokens_without_their_records_are_read_again(tokenizer: Tokenizer) -> None:
    """As after a result that repeats what another verifier has committed."""
    one = completion(tokenizer, Logprobs(prompt_len=3))
    tokens = tokenizer.encode("ab")
    records = [logprob(-value) for value in (1.0, 2.0, 3.0, 4.0)]
    one.result(builders.result(base_len=3, tokens=tokens))
    assert (one.gap, one.length) == (True, 3)
    one.result(result(3, tokens, 3, records[2:]))
    assert one.gap, "those of the prompt are missing"
    one.committed(3, tokens, Finish.LENGTH, logprobs=(pack_logprobs(records), one.first_logprob))
    assert not one.gap
    assert one.prompt_logprobs == records[:2]
    assert [t.logprob for piece in one.take() for t in piece.tokens] == records[2:]
    one.result(builders.result(base_len=3, tokens=tokens))
    assert not one.gap, "known tokens need none"


def test_a_prompt_alone_has_no_output(tokenizer: Tokenizer) -> None:
    one = completion(tokenizer, Logprobs(prompt_len=3), prompt_only=True, echo="xyz")
    records = [logprob(-1.0), logprob(-2.0), logprob(-3.0)]
    one.result(result(3, tokenizer.encode("a"), 1, records, finish=Finish.LENGTH))
    assert [(piece.text, piece.tokens) for piece in one.take()] == [("xyz", [])]
    assert (one.finish, one.tally.tokens, one.prompt_logprobs) == (Finish.LENGTH, 0, records[:2])


def fields(tokenizer: Tokenizer, **form: Any) -> LogprobFields:
    return LogprobFields(AnswerForm.model_validate(FORM | form), tokenizer)


def test_a_chats_content_has_names_and_bytes(tokenizer: Tokenizer) -> None:
    a, b, part = (tokenizer.encode(text)[0] for text in ("a", "b", "é"))
    tokens = [
        Token(a, "a", False, logprob(-0.5, 1, (a, -0.5), (part, -1.5))),
        Token(b, "b", False, logprob(-2, 3, (EOS, -1), (a, -1.5))),
    ]
    found = fields(tokenizer, logprobs=2).of(tokens, 0)
    assert found == {
        "content": [
            {
                "token": "a",
                "logprob": -0.5,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "a", "logprob": -0.5, "bytes": [97]},
                    {"token": "\ufffd", "logprob": -1.5, "bytes": [0xC3]},
                ],
            },
            {
                "token": "b",
                "logprob": -2,
                "bytes": [98],
                "top_logprobs": [
                    {"token": "<|im_end|>", "logprob": -1, "bytes": list(b"<|im_end|>")},
                    {"token": "a", "logprob": -1.5, "bytes": [97]},
                ],
            },
        ],
        "refusal": None,
    }
    json.dumps(found, allow_nan=False)
    assert fields(tokenizer).of(tokens, 0) is None


def test_a_text_completion_has_four_lists(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab")
    tokens = [Token(a, "a", False), Token(b, "b", False, logprob(-2, 3, (a, -0.25)))]
    assert fields(tokenizer, chat=False, logprobs=1).of(tokens, 4) == {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -2],
        "top_logprobs": [None, {"a": -0.25, "b": -2}],
        "text_offset": [4, 5],
    }
    named = fields(tokenizer, chat=False, logprobs=0, token_ids=True).of(tokens[1:], 0)
    assert named is not None
    assert (named["tokens"], named["top_logprobs"]) == ([f"token_id:{b}"], [{f"token_id:{b}": -2}])


def test_prompt_logprobs_have_ranks(tokenizer: Tokenizer) -> None:
    one = completion(tokenizer, Logprobs(top=1, prompt_len=3))
    a, b, c = tokenizer.encode("abc")
    one.prompt_logprobs = [logprob(-0.5, 1, (b, -0.5)), logprob(-4.0, 9, (a, -0.25))]
    assert fields(tokenizer, prompt_logprobs=1).of_prompt(one, [a, b, c]) == [
        None,
        {str(b): {"logprob": -0.5, "rank": 1, "decoded_token": "b"}},
        {
            str(c): {"logprob": -4.0, "rank": 9, "decoded_token": "c"},
            str(a): {"logprob": -0.25, "rank": 1, "decoded_token": "a"},
        },
    ]
