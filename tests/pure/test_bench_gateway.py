"""The benchmark of a gateway's streams: each token of a stream is noted once, however its bytes arrive."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.stream import event
from services.tools.bench.gateway import SentTokens, StreamClient
from services.tools.bench.grammar import schema
from shared.errors import WispError

SESSION = "chatcmpl-0123456789ab"


def chunk(content: str, **delta: str) -> bytes:
    choice = {"index": 0, "delta": {**delta, "content": content}, "logprobs": None, "finish_reason": None}
    return event({"id": SESSION, "object": "chat.completion.chunk", "choices": [choice]})


def stream(texts: list[str]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    return head + chunk("", role="assistant") + b"".join(map(chunk, texts)) + b"data: [DONE]\n\n"


@given(
    texts=st.lists(st.sampled_from([" river", '"delta":{"content":"', "\\", "\n", "é"]), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 2000), max_size=12),
)
async def test_each_token_is_noted_once_however_it_arrives(texts: list[str], cuts: list[int]) -> None:
    now_s = time.perf_counter()
    sent = SentTokens({SESSION: [(now_s, f"b{number}") for number in range(len(texts))]}, since_s=now_s)
    client, body = StreamClient(b"", sent), stream(texts)
    places = sorted({0, *(cut % len(body) for cut in cuts), len(body)})
    for begin, end in pairwise(places):
        client.data_received(body[begin:end])
    client.connection_lost(None)
    assert client.ended.result() is None
    assert len(sent.took_ms) == len(texts)
    assert min(sent.took_ms) >= 0


async def test_tokens_of_the_warm_up_do_not_count() -> None:
    sent = SentTokens({SESSION: [(1.0, "a"), (3.0, "b")]}, since_s=2.0)
    StreamClient(b"", sent).data_received(stream(["x", "y"]))
    assert len(sent.took_ms) == len(sent.added_ms) == 1


async def test_a_refused_request_is_an_error_with_the_answer() -> None:
    client = StreamClient(b"", SentTokens())
    client.data_received(b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"error":{"message":"no verifier is running"}}')
    client.connection_lost(None)
    with pytest.raises(WispError, match="no verifier is running"):
        client.ended.result()


def test_the_schema_of_the_benchmark_has_2_kb() -> None:
    assert 2000 <= len(json.dumps(schema())) <= 2500
