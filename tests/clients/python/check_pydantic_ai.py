"""pydantic-ai's agents."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from suite import MODEL, QUESTION, ROOT, TOKENS, TOO_LONG, URL, Weather

SETTINGS = {"max_tokens": TOKENS, "temperature": 0}
SHORT = {"max_tokens": 20, "temperature": 0}


def models() -> list[Any]:
    """Return one model for each API. Their connections belong to an event loop, so each check has its own."""
    openai = OpenAIProvider(base_url=URL, api_key="none")
    return [
        OpenAIChatModel(MODEL, provider=openai),
        OpenAIResponsesModel(MODEL, provider=openai),
        AnthropicModel(MODEL, provider=AnthropicProvider(base_url=ROOT, api_key="none")),
    ]


def check_a_stream_has_the_text_of_the_whole_answer() -> None:
    async def compare() -> None:
        for model in models():
            agent = Agent(model, model_settings=SHORT)
            whole = await agent.run(QUESTION)
            async with agent.run_stream(QUESTION) as stream:
                told = [text async for text in stream.stream_text(delta=True, debounce_by=None)]
            assert whole.output
            assert "".join(told) == whole.output

    asyncio.run(compare())


@pytest.mark.parametrize("form", [ToolOutput, NativeOutput])
def check_typed_output(form: Any) -> None:
    async def ask() -> None:
        for model in models()[:2]:
            result = await Agent(model, output_type=form(Weather), model_settings=SETTINGS).run(QUESTION)
            assert isinstance(result.output, Weather)

    asyncio.run(ask())


def check_typed_output_by_a_tool_of_anthropics_api() -> None:
    async def ask() -> None:
        result = await Agent(models()[2], output_type=ToolOutput(Weather), model_settings=SETTINGS).run(QUESTION)
        assert isinstance(result.output, Weather)

    asyncio.run(ask())


def check_a_prompt_that_is_too_long() -> None:
    async def ask() -> None:
        for model in models():
            with pytest.raises(ModelHTTPError) as caught:
                await Agent(model, model_settings=SHORT).run(TOO_LONG)
            assert caught.value.status_code == 400

    asyncio.run(ask())
