"""Anthropic's client for Python."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest
from suite import ASK, MODEL, PARAMETERS, ROOT, TOKENS, TOO_LONG, Weather, assert_arguments

GREEDY = {"temperature": 0}
"""The client has no argument for it any more."""
FORECAST = {"name": "forecast", "description": "Tells the weather.", "input_schema": PARAMETERS}


@pytest.fixture
def client() -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=ROOT, api_key="none", max_retries=0) as made:
        yield made


def check_a_stream_ends_with_the_message_that_it_told(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model=MODEL, messages=ASK, max_tokens=20, extra_body=GREEDY)
    with client.messages.stream(model=MODEL, messages=ASK, max_tokens=20, extra_body=GREEDY) as stream:
        told = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert told
    assert told == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.stop_reason == whole.stop_reason


def check_a_tool_is_called_whole_and_streamed(client: anthropic.Anthropic) -> None:
    options = {"model": MODEL, "messages": ASK, "tools": [FORECAST], "max_tokens": TOKENS, "extra_body": GREEDY}
    options["tool_choice"] = {"type": "any", "disable_parallel_tool_use": True}
    whole = client.messages.create(**options)
    assert whole.stop_reason == "tool_use"
    (call,) = whole.content
    assert call.name == "forecast"
    assert_arguments(call.input)
    with client.messages.stream(**options) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "clear"}
    history = [*ASK, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    after = client.messages.create(model=MODEL, messages=history, tools=[FORECAST], max_tokens=5)
    assert after.usage.output_tokens


def check_answers_are_parsed_into_a_type(client: anthropic.Anthropic) -> None:
    answer = client.messages.parse(model=MODEL, messages=ASK, max_tokens=TOKENS, output_format=Weather)
    assert isinstance(answer.parsed_output, Weather)


def check_tokens_are_counted_as_they_are_used(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=ASK)
    usage = client.messages.create(model=MODEL, messages=ASK, max_tokens=1).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def check_errors_have_their_own_types(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model=MODEL, messages=[{"role": "user", "content": TOO_LONG}], max_tokens=5)
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", messages=ASK, max_tokens=5)
