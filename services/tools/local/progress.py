"""Progress of long steps: a spinner in a terminal, plain lines elsewhere, nothing by default.

A step that takes long shows the time that has passed, so that one which reports nothing is seen to go on.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.status import Status
from rich.text import Text

PLAIN_INTERVAL_S = 5.0
"""Shortest time between two plain lines about what a step reports."""
SILENT_S = 10.0
"""Time after which a plain line repeats what a step does that has reported nothing new."""
SHOWN_FROM_S = 1.0
"""A spinner shows the time of steps that take longer than this."""


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
        self.status = Status(self, console=console, spinner_style="cyan")
        self._detail = ""

    def __rich__(self) -> Text:
        """Return the line beside the spinner, which is drawn again several times a second."""
        shown = Text.from_markup(self.text)
        if self._detail:
            shown.append(f" {self._detail}", "dim")
        if (passed_s := self.elapsed_s) >= SHOWN_FROM_S:
            shown.append(f"  {passed_s:.0f} s", "dim")
        return shown

    def __enter__(self) -> ProgressStep:
        self.status.start()
        return self

    def detail(self, text: str) -> None:
        self._detail = text

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
        self._detail = ""
        self._ended = threading.Event()
        self._repeating = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> ProgressStep:
        self.console.print(f"  {self.text} ...", soft_wrap=True)
        self._repeating.start()
        return self

    def detail(self, text: str) -> None:
        self._detail = text
        if time.monotonic() - self.shown >= PLAIN_INTERVAL_S:
            self._show()

    def _repeat(self) -> None:
        # In a thread: some steps keep the event loop, and some have none.
        while not self._ended.wait(max(0.0, self.shown + SILENT_S - time.monotonic())):
            if time.monotonic() - self.shown >= SILENT_S:
                self._show()

    def _show(self) -> None:
        self.shown = time.monotonic()
        self.console.print(Text(f"    {self._detail or 'still at it'} ({self.elapsed_s:.0f} s)"), soft_wrap=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._repeating.join()
        if kind is None:
            self.console.print(f"  {self.outcome} ({self.elapsed_s:.1f} s)", soft_wrap=True)
        elif issubclass(kind, Exception):
            self.console.print(f"  failed: {self.text}", soft_wrap=True)
