"""Consoles, orderly ends, and errors as a message with an exit status, for all commands."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from shared.errors import WispError

INTERRUPTED = 130
TERMINATED = 143

T = TypeVar("T")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Turn WISP's errors and Ctrl-C into a message and an exit status."""
    try:
        yield
    except WispError as error:
        err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(1) from None
    except ValueError as error:
        from pydantic import ValidationError

        from shared.runtime.settings import problems_of

        if not isinstance(error, ValidationError):
            raise
        for problem in problems_of(error, options=False):
            err.print(Text.assemble(("error: ", "bold red"), problem), soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        err.print("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except asyncio.CancelledError:
        raise typer.Exit(TERMINATED) from None


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run asynchronous work to its end. SIGTERM and SIGHUP cancel it as Ctrl-C does."""

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await work()

    return asyncio.run(main())


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
