"""`wisp chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from services.tools.cli.ask import (
    ClientAnswer,
    Question,
    ask,
    client_at,
    first_model,
    made_in,
    reason_of,
    tokens_per_second,
    unreachable,
)
from services.tools.cli.core.text_parts import TextPart
from services.tools.cli.keyboard import read_message
from services.tools.cli.paint import Painter
from services.tools.local.folder import running_apis
from shared.errors import WispError

HELP = """\
  /reset   start a new conversation
  /help    show this list
  /quit    end the chat (or Ctrl-D)
  Ctrl-C stops an answer; at the prompt it ends the chat."""
MAX_TOKENS = 1024
TOP_P = 0.9


def running_suite(console: Console) -> str | None:
    """Return the URL of the latest suite of `wisp up` in this checkout, and print it; None if none runs."""
    apis = running_apis()
    if not apis:
        return None
    others = f", the latest of {len(apis)} (--url takes another)" if len(apis) > 1 else ""
    console.print(Text(f"Using the suite at {apis[0].url}{others}", "dim"), soft_wrap=True)
    return apis[0].url


class Chat:
    """A conversation with the gateway at `url`, which ends in `/v1`. key: as for `client_at`."""

    def __init__(
        self,
        url: str,
        console: Console,
        *,
        draft: str,
        system: str | None,
        temperature: float,
        key: str | None = None,
    ) -> None:
        self.url = url
        self.key = key
        self.console = console
        self.draft = draft
        self.temperature = temperature
        self.model = asyncio.run(self._first_model())
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._painter = Painter(console)

    def talk(self, read: Callable[[str], str] = read_message, check: Callable[[], None] = lambda: None) -> None:
        """Answer messages from `read` until EOFError or /quit. After a failure, `check` may raise the cause."""
        self.console.print(
            Text.assemble(f"Chat with {self.model}: ", self._painter.style.legend, ". /help lists commands."),
            soft_wrap=True,
        )
        while True:
            try:
                message = read("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                if self.console.is_terminal:
                    self.console.print()
                return
            if message == "/quit":
                return
            if message == "/reset":
                self._messages = list(self._opening)
                self.console.print(Text("  new conversation", "dim"))
            elif message.startswith("/") and "\n" not in message:
                self.console.print(
                    Text(HELP if message == "/help" else f"  no command {message}\n{HELP}", "dim"), soft_wrap=True
                )
            elif message:
                self._answer(message, check)

    def _answer(self, message: str, check: Callable[[], None]) -> None:
        from openai import APIConnectionError, APIError

        messages = [*self._messages, {"role": "user", "content": message}]
        sampling = {"temperature": self.temperature, "top_p": TOP_P}
        question = Question("", messages=tuple(messages), max_tokens=MAX_TOKENS, options=sampling)
        shown: list[str] = []

        def show(parts: list[TextPart]) -> None:
            shown.extend(part.text for part in parts)
            self._painter.write(parts)

        try:
            answer = asyncio.run(self._ask(question, show))
        except KeyboardInterrupt:
            self._painter.end()
            self.console.print(Text("  stopped", "dim"))
        except APIConnectionError as error:
            check()
            raise unreachable(self.url, error) from None
        except APIError as error:
            check()
            self._painter.end()
            self.console.print(Text.assemble(("  error: ", "red"), reason_of(error)), soft_wrap=True)
            return
        except WispError:
            self._painter.end()
            check()
            raise
        else:
            self._painter.end()
            if answer.summary:
                self.console.print(Text(f"  {_brief(answer)}", "dim"), soft_wrap=True)
        if shown:
            self._messages = [*messages, {"role": "assistant", "content": "".join(shown)}]

    async def _ask(self, question: Question, show: Callable[[list[TextPart]], None]) -> ClientAnswer:
        async with client_at(self.url, self.key) as client:
            return await ask(client, self.model, question, self.draft, show)

    async def _first_model(self) -> str:
        async with client_at(self.url, self.key) as client:
            return await first_model(client)


def _brief(answer: ClientAnswer) -> str:
    summary = answer.summary
    accepted = f", {summary['accepted'] / summary['verified']:.0%} of drafts accepted" if summary["verified"] else ""
    cut = ", cut at the limit" if answer.finish == "length" else ""
    return f"{made_in(summary)}{accepted}, {tokens_per_second(summary):.1f} tokens per second{cut}"
