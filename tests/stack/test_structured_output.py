"""Structured output and tools through the whole suite, with OpenAI's own client and a tiny random model."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from asking import watching
from patience import HANG_S

from services.tools.bench.support.tiny import tiny_model
from services.tools.local.brokers import Brokers
from services.tools.local.stack import Stack


class Person(pydantic.BaseModel):
    """A client's own type."""

    name: str = pydantic.Field(max_length=8)
    age: int = pydantic.Field(ge=0, le=150)
    colours: list[Literal["red", "green", "blue"]] = pydantic.Field(max_length=3)


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": [1, 2]}},
            "required": ["a", "b"],
        },
    },
}
ASK: list[Any] = [{"role": "user", "content": "Who is it?"}]


@pytest.fixture(scope="module")
async def stack(brokers: Brokers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tiny_model(tmp_path_factory.mktemp("structured") / "tiny")
    unprofiled = {"verifier": {"WISP_PROFILE": "false"}}
    env = {"WISP_THREADS": "1", "WISP_ADMISSION": "false", "WISP_STALL_TIMEOUT_S": str(HANG_S)}
    async with Stack("structured", brokers=brokers, target=folder, verifiers=2, env=env, env_of=unprofiled) as running:
        yield running


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=stack.url, api_key="none", timeout=HANG_S, max_retries=0) as made:
        yield made


async def parsed(client: openai.AsyncOpenAI, model: str, seed: int, draft: str) -> str:
    answer = await client.chat.completions.parse(
        model=model,
        messages=ASK,
        response_format=Person,
        seed=seed,
        temperature=1.0,
        max_tokens=200,
        extra_body={"wisp": {"draft": draft}},
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Person)
    return choice.message.content or ""


async def test_answers_parse_and_are_the_same_with_drafts_and_without(stack: Stack, client: openai.AsyncOpenAI) -> None:
    plain = await asyncio.gather(*(parsed(client, "tiny", seed, "none") for seed in range(6)))
    drafted = await asyncio.gather(*(parsed(client, "tiny", seed, "lookup") for seed in range(6)))
    assert plain == drafted
    assert len(set(plain)) > 3


async def test_answers_are_the_same_after_a_verifiers_death(stack: Stack, client: openai.AsyncOpenAI) -> None:
    before = await asyncio.gather(*(parsed(client, "tiny", seed, "lookup") for seed in range(6)))
    victim = stack.processes("verifier")[0]
    async with watching(stack) as seen:
        asked = [asyncio.create_task(parsed(client, "tiny", seed, "lookup")) for seed in range(6)]
        async with asyncio.timeout(HANG_S):
            while victim.name not in seen.verifiers:  # noqa: ASYNC110 - the spy has no event for a verifier
                await asyncio.sleep(0.002)
        assert not all(task.done() for task in asked)
        await stack.stop(victim, signal.SIGKILL)
        assert await asyncio.gather(*asked) == before


async def test_a_tool_that_must_be_called_makes_the_round_trip(stack: Stack, client: openai.AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}
    whole = await client.chat.completions.create(**options, messages=ASK, seed=3, max_tokens=200)
    assert whole.choices[0].finish_reason == "tool_calls"
    message = whole.choices[0].message
    (call,) = message.tool_calls or []
    arguments = json.loads(call.function.arguments)
    assert 0 <= arguments["a"] <= 99
    assert arguments["b"] in (1, 2)
    async with client.chat.completions.stream(**options, messages=ASK, seed=3, max_tokens=200) as stream:
        async for _ in stream:
            pass
        streamed = (await stream.get_final_completion()).choices[0].message
    assert [one.function.arguments for one in streamed.tool_calls or []] == [call.function.arguments]
    history = [*ASK, message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "3"}]
    after = await client.chat.completions.create(model="tiny", messages=history, tools=[ADD], max_tokens=5)
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")
