"""OpenAI's client for Python."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from suite import ASK, FORECAST, MODEL, PARAMETERS, QUESTION, TOKENS, TOO_LONG, URL, Weather, assert_arguments


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=URL, api_key="none", max_retries=0) as made:
        yield made


def check_a_stream_has_the_text_and_usage_of_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=ASK, seed=1, max_tokens=20)
    assert whole.choices[0].message.content
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=ASK, seed=1, max_tokens=20, stream=True, stream_options=options
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def check_a_required_tool_is_called_whole_and_streamed(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": ASK, "tools": [FORECAST], "tool_choice": "required", "seed": 2}
    options |= {"max_tokens": TOKENS, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls
    assert call.function.name == "forecast"
    assert_arguments(call.function.arguments)
    with client.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    history = [*ASK, whole.message, {"role": "tool", "tool_call_id": call.id, "content": "clear"}]
    after = client.chat.completions.create(model=MODEL, messages=history, tools=[FORECAST], max_tokens=5)
    assert after.usage.completion_tokens


def check_answers_are_parsed_into_a_type(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Weather, max_tokens=TOKENS)
    assert isinstance(answer.choices[0].message.parsed, Weather)


def check_log_probabilities_of_chats_and_of_echoed_prompts(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=4, logprobs=True, top_logprobs=3)
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens
    assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in content)
    echoed = client.completions.create(model=MODEL, prompt="Rome", max_tokens=0, echo=True, logprobs=1)
    assert echoed.choices[0].text == "Rome"
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    assert len(echoed.choices[0].logprobs.token_logprobs) == 4


def check_responses_whole_streamed_parsed_and_with_tools(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=20)
    assert first.output_text
    events = list(
        client.responses.create(
            model=MODEL, input="And?", previous_response_id=first.id, max_output_tokens=20, stream=True
        )
    )
    done = events[-1].response
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == done.output_text
    parsed = client.responses.parse(model=MODEL, input=QUESTION, text_format=Weather, max_output_tokens=TOKENS)
    assert isinstance(parsed.output_parsed, Weather)
    tool = {"type": "function", "name": "forecast", "parameters": PARAMETERS, "strict": True}
    called = client.responses.create(
        model=MODEL, input=QUESTION, tools=[tool], tool_choice="required", max_output_tokens=TOKENS
    )
    assert_arguments(next(item for item in called.output if item.type == "function_call").arguments)


def check_errors_have_their_own_types_and_codes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": TOO_LONG}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=ASK)
    assert missing.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == [MODEL]
