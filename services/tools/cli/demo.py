"""`wisp demo`: questions with drafts and again by plain decoding."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from services.tools.cli.ask import (
    ClientAnswer,
    Question,
    address_of,
    ask,
    client_at,
    first_model,
    reason_of,
    summary_lines,
    tokens_per_second,
    unreachable,
)
from services.tools.cli.core.text_parts import TextPart
from services.tools.cli.paint import Painter
from services.tools.local.folder import page_of
from shared.errors import WispError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MAX_RETRIES = 10
QUESTIONS = (
    Question(
        "Chat, greedy",
        messages=(
            {
                "role": "user",
                "content": "Explain in simple words how a rainbow is made. "
                "Use the words sunlight, raindrop and colours.",
            },
        ),
        max_tokens=96,
        options={"temperature": 0},
    ),
    Question(
        "Completion, sampled at temperature 0.7 with seed 7",
        prompt="Country: France. Capital: Paris. Language: French.\n"
        "Country: Germany. Capital: Berlin. Language: German.\n"
        "Country: Italy. Capital: Rome. Language: Italian.\n"
        "Country:",
        max_tokens=64,
        options={"temperature": 0.7, "seed": 7},
    ),
    Question(
        "Chat, an edit of code, greedy",
        messages=(
            {
                "role": "user",
                "content": "Rename the function area to surface in this Python code. Answer with the whole code.\n\n"
                "def area(width, height):\n    return width * height\n\n"
                "def perimeter(width, height):\n    return 2 * (width + height)\n\n"
                "def diagonal(width, height):\n    return (width ** 2 + height ** 2) ** 0.5\n",
            },
        ),
        max_tokens=96,
        options={"temperature": 0},
    ),
)


async def demo(url: str, console: Console, rounds: bool = False, key: str | None = None) -> bool:
    """Ask the gateway at `url` with and without drafts; return whether the tokens are the same.

    rounds: draw the first rounds of each drafted answer. key: API key, by default the environment's. Raises WispError
    if the gateway does not answer.
    """
    from openai import APIConnectionError, APIError

    try:
        # A loaded gateway answers with a Retry-After header, which the client obeys.
        return await _demo(client_at(url, key).with_options(max_retries=MAX_RETRIES), console, rounds)
    except APIConnectionError as error:
        raise unreachable(url, error) from error
    except APIError as error:
        raise WispError(f"{url}: {reason_of(error)}. The gateway's /ready reports what is missing.") from error


def busy_note(load: float, cores: int) -> str:
    """Return what to say of speeds measured on a machine with this load average; nothing if a core was free."""
    if load < cores:
        return ""
    return (
        f"Other programs kept this machine's {cores} cores busy (load {load:.1f}): the speeds are lower than on a "
        "quiet machine, most of all those with drafts."
    )


async def _demo(opened: AsyncOpenAI, console: Console, rounds: bool) -> bool:
    busy = busy_note(os.getloadavg()[0], os.cpu_count() or 1)
    async with opened as client:
        model = await first_model(client)
        painter = Painter(console)
        console.print(Text.assemble("Playground: ", (page_of(address_of(client)), "cyan")), soft_wrap=True)
        console.print(Text.assemble(f"\n{model} answers: ", painter.style.legend), soft_wrap=True)
        drafted = [await _show(client, model, question, console, painter, rounds) for question in QUESTIONS]
        console.print(Text("\nThe same questions by plain decoding, without drafts", "bold"))
        plain = [await _traced(client, model, question, "none") for question in QUESTIONS]
    for question, with_drafts, without in zip(QUESTIONS, drafted, plain, strict=True):
        fast, slow = tokens_per_second(with_drafts.summary), tokens_per_second(without.summary)
        speeds = f"  {question.title}: {slow:.1f} tokens per second; with drafts {fast:.1f}"
        console.print(Text(speeds), soft_wrap=True)
        if difference := with_drafts.difference(without):
            problem = f"  {question.title}, with drafts and without: {difference}"
            console.print(Text(problem, "red"), soft_wrap=True)
    if busy:
        console.print(Text(busy, "yellow"), soft_wrap=True)
    identical = not any(one.difference(other) for one, other in zip(drafted, plain, strict=True))
    console.print(
        Text.assemble("identical to plain decoding: ", ("yes", "bold green") if identical else ("no", "bold red"))
    )
    return identical


async def _show(
    client: AsyncOpenAI, model: str, question: Question, console: Console, painter: Painter, rounds: bool
) -> ClientAnswer:
    console.print(Text(f"\n{question.title}", "bold"))
    console.print(
        Text(question.messages[-1]["content"] if question.messages else question.prompt, "dim"), soft_wrap=True
    )
    try:
        answer = await _traced(client, model, question, "auto", painter.write)
    finally:
        painter.end()
    for line in summary_lines(answer.summary):
        console.print(Text(f"  {line}", "cyan"), soft_wrap=True)
    if rounds:
        painter.draw_rounds(answer.rounds)
    return answer


async def _traced(
    client: AsyncOpenAI,
    model: str,
    question: Question,
    draft: str,
    show: Callable[[list[TextPart]], None] | None = None,
) -> ClientAnswer:
    """Return the answer to a question. Raises WispError if it comes without the gateway's measurements."""
    answer = await ask(client, model, question, draft, show)
    if not answer.summary:
        raise WispError(f"{address_of(client)} answers without measurements, as no gateway of WISP does")
    return answer
