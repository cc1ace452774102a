"""litellm, through OpenAI's API and through Anthropic's."""

from __future__ import annotations

from typing import Any

import litellm
import pytest
from suite import ASK, FORECAST, MODEL, QUESTION, ROOT, TOKENS, TOO_LONG, URL, Weather, assert_arguments

OPENAI = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "none"}
ANTHROPIC = {"model": f"anthropic/{MODEL}", "api_base": ROOT, "api_key": "none"}


@pytest.mark.parametrize("server", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
def check_a_stream_has_the_text_of_the_whole_answer(server: dict[str, Any]) -> None:
    whole = litellm.completion(**server, messages=ASK, max_tokens=20, temperature=0)
    assert whole.choices[0].message.content
    chunks = litellm.completion(**server, messages=ASK, max_tokens=20, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


@pytest.mark.parametrize("server", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
def check_a_required_tool_is_called(server: dict[str, Any]) -> None:
    options = {"tools": [FORECAST], "tool_choice": "required", "max_tokens": TOKENS}
    (call, *_) = litellm.completion(**server, messages=ASK, **options).choices[0].message.tool_calls
    assert_arguments(call.function.arguments)


def check_structured_output() -> None:
    answer = litellm.completion(**OPENAI, messages=ASK, response_format=Weather, max_tokens=TOKENS)
    Weather.model_validate_json(answer.choices[0].message.content)


def check_log_probabilities() -> None:
    answer = litellm.completion(**OPENAI, messages=ASK, max_tokens=4, logprobs=True, top_logprobs=2)
    assert [len(one.top_logprobs) for one in answer.choices[0].logprobs.content] == [2] * 4


def check_the_responses_api() -> None:
    answer = litellm.responses(**OPENAI, input=QUESTION, max_output_tokens=20)
    assert answer.output[0].content[0].text


@pytest.mark.parametrize("server", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
def check_a_prompt_that_is_too_long(server: dict[str, Any]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**server, messages=[{"role": "user", "content": TOO_LONG}], max_tokens=5)
