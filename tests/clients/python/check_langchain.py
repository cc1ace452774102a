"""LangChain's chat model for OpenAI's API."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from suite import MODEL, QUESTION, TOKENS, TOO_LONG, URL, Weather


def model(**options: Any) -> ChatOpenAI:
    chosen = {"max_tokens": TOKENS, "temperature": 0, "max_retries": 0, **options}
    return ChatOpenAI(base_url=URL, api_key="none", model=MODEL, **chosen)


@tool
def rain(tomorrow: bool) -> str:
    """Tell whether it rains."""
    return f"{tomorrow}"


def check_a_stream_has_the_text_and_usage_of_the_whole_answer() -> None:
    whole = model(max_tokens=20).invoke(QUESTION)
    chunks = list(model(max_tokens=20, stream_usage=True).stream(QUESTION))
    assert whole.content
    assert "".join(chunk.content for chunk in chunks) == whole.content
    used = [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata]
    assert sum(used) == whole.usage_metadata["output_tokens"]


def check_a_bound_tool_makes_the_round_trip() -> None:
    bound = model().bind_tools([rain], tool_choice="any", parallel_tool_calls=False)
    called = bound.invoke(QUESTION)
    (call,) = called.tool_calls
    assert isinstance(call["args"]["tomorrow"], bool)
    result = rain.invoke(call)
    assert isinstance(result, ToolMessage)
    after = model(max_tokens=5).bind_tools([rain]).invoke([HumanMessage(QUESTION), called, result])
    assert after.usage_metadata["output_tokens"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def check_structured_output(method: str) -> None:
    assert isinstance(model().with_structured_output(Weather, method=method).invoke(QUESTION), Weather)


def check_log_probabilities() -> None:
    answer = model(max_tokens=4, logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert [len(one["top_logprobs"]) for one in answer.response_metadata["logprobs"]["content"]] == [2] * 4


def check_the_responses_api() -> None:
    answer = model(max_tokens=20, use_responses_api=True).invoke(QUESTION)
    assert answer.text
    told = "".join(chunk.text for chunk in model(max_tokens=20, use_responses_api=True).stream(QUESTION))
    assert told == answer.text


def check_a_prompt_that_is_too_long() -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        model().invoke(TOO_LONG)
    assert caught.value.code == "context_length_exceeded"
