"""Progress of long steps: a spinner in a terminal, plain lines elsewhere, nothing by default."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.status import Status

PLAIN_INTERVAL_S = 5.0


class ProgressStep:
    """A running step, as a context manager."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.outcome = text
        self.started = time.monotonic()

    def __enter__(self) -> ProgressStep:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        return None

    def detail(self, text: str) -> None:
        """Show the current activity."""

    def done(self, text: str) -> None:
        """Set the line that remains after a successful end."""
        self.outcome = text

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning of the step."""
        return time.monotonic() - self.started


class Progress:
    """Progress that shows nothing; the base of those that do."""

    def step(self, text: str) -> ProgressStep:
        """Return a step to use as a context manager."""
        return ProgressStep(text)


class ConsoleProgress(Progress):
    """Progress on a rich console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def step(self, text: str) -> ProgressStep:
        """Return a step to use as a context manager."""
        return _Spinner(text, self.console) if self.console.is_terminal else _Lines(text, self.console)


class _Spinner(ProgressStep):
    def __init__(self, text: str, console: Console) -> None:
        super().__init__(text)
        self.console = console
        self.status = Status(text, console=console, spinner_style="cyan")

    def __enter__(self) -> ProgressStep:
        self.status.start()
        return self

    def detail(self, text: str) -> None:
        self.status.update(f"{self.text} [dim]{escape(text)}[/dim]")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.status.stop()
        if kind is None:
            self.console.print(f"[green]✓[/green] {self.outcome} [dim]{self.elapsed_s:.1f} s[/dim]")
        elif issubclass(kind, Exception):
            self.console.print(f"[red]✗[/red] {self.text}")


class _Lines(ProgressStep):
    def __init__(self, text: str, console: Console) -> None:
        super().__init__(text)
        self.console = console
        self.shown = time.monotonic()

    def __enter__(self) -> ProgressStep:
        self.console.print(f"  {self.text} ...", soft_wrap=True)
        return self

    def detail(self, text: str) -> None:
        now = time.monotonic()
        if now - self.shown >= PLAIN_INTERVAL_S:
            self.shown = now
            self.console.print(f"    {text}", soft_wrap=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.console.print(f"  {self.outcome} ({self.elapsed_s:.1f} s)", soft_wrap=True)
        elif issubclass(kind, Exception):
            self.console.print(f"  failed: {self.text}", soft_wrap=True)
