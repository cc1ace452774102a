"""Consoles, clean exits, and error messages with an exit status, for all commands."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.highlighter import JSONHighlighter
from rich.segment import Segment
from rich.text import Text

from services.tools.cli.core.text_parts import escaped, printable
from shared.errors import WispError

INTERRUPTED = 130
TERMINATED = 143

T = TypeVar("T")


class SafeConsole(Console):
    """A console that no printed text can control.

    Names, texts and errors may come from untrusted servers. Only the console's own styles reach the terminal as control
    characters.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as a console does, without the control characters in texts."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


out = SafeConsole(highlight=False)
err = SafeConsole(stderr=True, highlight=False)


def print_fields(console: Console, fields: Any) -> None:
    """Print JSON. Control characters in texts are escaped, so that programs read them as they are."""
    console.print(
        JSONHighlighter()(escaped(json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False))), soft_wrap=True
    )


@contextmanager
def errors_shown() -> Iterator[None]:
    """Turn WISP's errors, the system's errors and Ctrl-C into a message and an exit status."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # a failed write raises here, not when the interpreter ends
    except WispError as error:
        _print_error(str(error))
        raise typer.Exit(1) from None
    except ExceptionGroup as group:
        if (first := _first_of(group)) is None:
            raise
        with errors_shown():
            raise first from None
    except BrokenPipeError:
        raise  # the reader has closed the output: typer ends quietly with status 1
    except OSError as error:
        _print_error(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error))
        raise typer.Exit(1) from None
    except ValueError as error:
        from pydantic import ValidationError

        from shared.runtime.settings_loading import problems_of

        if not isinstance(error, ValidationError):
            raise
        for problem in problems_of(error, options=False):
            _print_error(problem)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        err.print("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except asyncio.CancelledError:
        raise typer.Exit(TERMINATED) from None


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """Return the first error of tasks that ran together; None if one is neither WISP's own nor the system's."""
    expected, others = group.split((WispError, OSError))
    if others is not None:
        return None
    first: BaseException | None = expected
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


def _print_error(text: str) -> None:
    err.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run asynchronous work to its end. SIGTERM and SIGHUP cancel it as Ctrl-C does."""

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await work()

    return asyncio.run(main())


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the body with SystemExit, so that it cleans up. For work outside `run`.

    A second signal does not interrupt the clean-up.
    """
    numbers = signal.SIGTERM, signal.SIGHUP

    def stop(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(TERMINATED)

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def quiet_broker_client() -> None:
    """Keep the broker's client from logging connection errors, which the command reports itself."""
    for name in ("aio_pika", "aiormq"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def require(*extras: str) -> None:
    """Exit with a message unless the packages of these extras are installed."""
    from services.tools.cli.doctor import EXTRAS

    lacking = [extra for extra in extras if any(importlib.util.find_spec(name) is None for name in EXTRAS[extra])]
    if lacking:
        err.print(
            "This command needs packages that are not installed. Type: make setup "
            f"(or: pip install 'wisp[{','.join(lacking)}]')",
            markup=False,
        )
        raise typer.Exit(1)
