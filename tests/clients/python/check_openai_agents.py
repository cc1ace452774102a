"""OpenAI's agents, through the Responses API and through chats."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import agents
import openai
import pytest
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from agents.models.openai_responses import OpenAIResponsesModel
from suite import MODEL, QUESTION, TOKENS, TOO_LONG, URL, Weather

agents.set_tracing_disabled(True)
KINDS = pytest.mark.parametrize("kind", [OpenAIResponsesModel, OpenAIChatCompletionsModel])


def model(kind: Any) -> Any:
    return kind(MODEL, openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0))


@KINDS
def check_a_typed_stream_has_the_text_of_the_whole_answer(kind: Any) -> None:
    async def compare() -> None:
        # Agents take no answer from the Responses API that reached its most tokens.
        settings = agents.ModelSettings(max_tokens=TOKENS, temperature=0)
        agent = agents.Agent(name="one", model=model(kind), output_type=Weather, model_settings=settings)
        whole = await agents.Runner.run(agent, QUESTION)
        streamed = agents.Runner.run_streamed(agent, QUESTION)
        events = [event.data async for event in streamed.stream_events() if event.type == "raw_response_event"]
        told = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert isinstance(whole.final_output, Weather)
        assert Weather.model_validate_json("".join(told)) == streamed.final_output == whole.final_output

    asyncio.run(compare())


@KINDS
def check_a_tool_is_run_and_its_result_goes_back(kind: Any) -> None:
    seen = []

    @agents.function_tool
    def forecast(city: Literal["Rome", "Oslo"]) -> str:
        """Tell the weather."""
        seen.append(city)
        return "clear"

    async def ask() -> None:
        settings = agents.ModelSettings(
            max_tokens=TOKENS, temperature=0, tool_choice="required", parallel_tool_calls=False
        )
        agent = agents.Agent(
            name="one", model=model(kind), tools=[forecast], model_settings=settings, reset_tool_choice=False
        )
        with pytest.raises(agents.MaxTurnsExceeded):
            await agents.Runner.run(agent, QUESTION, max_turns=2)

    asyncio.run(ask())
    assert len(seen) >= 2, "it is called again after its result went back"
    assert set(seen) <= {"Rome", "Oslo"}


@KINDS
def check_a_prompt_that_is_too_long(kind: Any) -> None:
    async def ask() -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await agents.Runner.run(agents.Agent(name="one", model=model(kind)), TOO_LONG)
        assert caught.value.code == "context_length_exceeded"

    asyncio.run(ask())
