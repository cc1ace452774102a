"""The demo and the chat with the whole suite."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from typing import Any

import pytest
from openai import AsyncOpenAI
from rich.console import Console

from services.tools.cli import demo
from services.tools.cli.ask import ClientAnswer, Question
from services.tools.cli.chat import Chat
from services.tools.cli.core.text_parts import OPEN
from services.tools.local.stack import Stack


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=100)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's questions with shorter answers."""
    monkeypatch.setattr(demo, "QUESTIONS", tuple(replace(question, max_tokens=24) for question in demo.QUESTIONS))


async def test_the_demonstration_marks_drafts_sums_up_and_compares(stack: Stack, console: Console, short: None) -> None:
    assert await demo.demo(stack.url, console, rounds=True)
    text = shown(console)
    assert text.startswith(f"Playground: {stack.url.removesuffix('v1')}\n")
    assert text.count("one column is") == len(demo.QUESTIONS)
    assert text.count(OPEN) > 1  # the legend has one
    assert text.count("tokens per round") == text.count("verifying") == len(demo.QUESTIONS)
    assert text.rstrip().endswith("identical to plain decoding: yes")


async def test_the_demonstration_names_the_difference(
    stack: Stack, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(client: AsyncOpenAI, model: str, question: Question, draft: str, show: Any = None) -> ClientAnswer:
        """Plain decoding gives one token less."""
        return await original(client, model, replace(question, max_tokens=4 - (draft == "none")), draft, show)

    original = demo.ask
    monkeypatch.setattr(demo, "ask", ask)
    assert not await demo.demo(stack.url, console)
    text = shown(console)
    assert text.count("and None, of 4 and 3 tokens") == len(demo.QUESTIONS)
    assert text.rstrip().endswith("identical to plain decoding: no")


async def test_a_chat_remembers_until_it_is_told_to_forget(
    stack: Stack, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Question] = []
    lines = iter(["What is the capital of France?", "/unknown", "And of Italy?", "/reset", "Hello!", "/quit", "never"])

    def talk() -> Chat:
        chat = Chat(stack.url, console, draft="auto", system=None, temperature=0.0)
        answer = chat._ask

        async def spy(question: Question, show: object) -> ClientAnswer:
            asked.append(question)
            return await answer(replace(question, max_tokens=12), show)  # type: ignore[arg-type]

        monkeypatch.setattr(chat, "_ask", spy)
        chat.talk(lambda _: next(lines))
        return chat

    await asyncio.to_thread(talk)
    roles = [[message["role"] for message in question.messages] for question in asked]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"]]
    assert "Paris" in asked[1].messages[1]["content"]
    assert "no command /unknown" in shown(console)
    assert next(lines) == "never"


async def test_a_conversation_that_is_too_long_is_reported(stack: Stack, console: Console) -> None:
    lines = iter(["word " * 9000, "/quit"])

    def talk() -> None:
        Chat(stack.url, console, draft="auto", system=None, temperature=0.0).talk(lambda _: next(lines))

    await asyncio.to_thread(talk)
    assert "error:" in shown(console)
    assert "tokens" in shown(console)
