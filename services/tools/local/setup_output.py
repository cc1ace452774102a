"""The output of the set-up: its steps as they go on, and pip's progress. Uses the standard library only."""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PLAIN_INTERVAL_S = 10.0
NAME_WIDTH = 16
MEGABYTE = 10**6


class StepFailed(Exception):
    """A step failed, as the message explains."""


@dataclass
class SetupStep:
    """A step and what is shown of it: one line that is redrawn in a terminal, a line now and then elsewhere."""

    name: str
    live: bool
    """True if the output is a terminal whose line can be redrawn."""
    coloured: bool
    symbols: bool
    """True if the output can encode more than ASCII."""
    detail: str = ""
    """The current activity."""
    outcome: str = ""
    """Words that remain after the end."""
    started_s: float = field(default_factory=time.monotonic)
    shown_s: float = field(default_factory=time.monotonic)
    frame: int = 0

    def show(self) -> None:
        """Show the activity: at once in a terminal, every `PLAIN_INTERVAL_S` elsewhere."""
        now = time.monotonic()
        passed = duration(now - self.started_s)
        if self.live:
            self.frame += 1
            frames = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" if self.symbols else "|/-\\"
            text = f"{self.name:{NAME_WIDTH}} {self.detail}"
            room = shutil.get_terminal_size().columns - len(passed) - 6
            mark = self._painted("36", frames[self.frame % len(frames)])
            sys.stdout.write(f"\r\x1b[K{mark} {text[:room]}  {self._painted('2', passed)}")
            sys.stdout.flush()
        elif now - self.shown_s >= PLAIN_INTERVAL_S:
            self.shown_s = now
            print(f"  {self.name:{NAME_WIDTH}} {self.detail or 'working'} ({passed})", flush=True)

    def end(self, failed: bool) -> None:
        """Show the outcome, or that the step failed."""
        passed = duration(time.monotonic() - self.started_s)
        mark = ("✗" if self.symbols else "x") if failed else ("✓" if self.symbols else "+")
        outcome = "failed" if failed else self.outcome
        clear = "\r\x1b[K" if self.live else ""
        mark = self._painted("31" if failed else "32", mark)
        print(f"{clear}{mark} {self.name:{NAME_WIDTH}} {outcome}  {self._painted('2', passed)}", flush=True)

    def _painted(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.coloured else text


@contextmanager
def step(name: str) -> Iterator[SetupStep]:
    """Show a step while the body runs. Ends this program if it raises StepFailed."""
    live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    symbols = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    shown = SetupStep(name, live, live and not os.environ.get("NO_COLOR"), symbols)
    try:
        if live:
            shown.show()
        yield shown
    except StepFailed as error:
        shown.end(failed=True)
        sys.exit(str(error))
    except BaseException:
        if live:
            print(flush=True)
        raise
    shown.end(failed=False)


def duration(seconds: float) -> str:
    """Return a time in words: `41 s`, `3 min 5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class PipOutput:
    """Progress of a `pip install`, from its output, its temporary files and the environment."""

    def __init__(self, downloads: Path, environment: Path, pins: int) -> None:
        """pins: number of packages that pip looks for, about; 0 if unknown."""
        self._downloads = downloads
        self._environment = environment
        self._pins = pins
        self._found: set[str] = set()
        self._file = ""
        self._size = ""
        self._installing: list[str] = []
        self._began_s = 0.0
        self._other = ""

    def read(self, line: str) -> None:
        """Read one line of pip's output."""
        line = line.strip()
        if found := re.match(r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)", line):
            self._found.add(found[1].lower())
            self._file = self._other = ""
        elif found := re.match(r"Downloading (\S+?)(?:\.metadata)? \(([\d.]+) ([kMG]?B)", line):
            self._file = "" if ".metadata" in line else found[1].rpartition("/")[2]
            self._size = f"{found[2]} {found[3]}"
        elif found := re.match(r"Installing collected packages: (.*)", line):
            self._installing = found[1].split(", ")
            self._began_s = time.time()
        elif found := re.match(r"(Installing build dependencies|Preparing|Building)", line):
            self._other = "building" if found[1] == "Building" else "preparing the build of wisp"

    def describe(self) -> str:
        """Return the current activity, in a few words with numbers that grow."""
        if self._installing:
            current = min(self._arrived(), len(self._installing) - 1)
            return f"installing package {current + 1} of {len(self._installing)}: {self._installing[current]}"
        if not self._found:
            return self._other
        known = f" of about {self._pins}" if self._pins > len(self._found) else ""
        found = f"found {len(self._found)}{known}"
        if not self._file:
            return f"{found}, {self._other or 'looking for the next'}"
        arrived = self._size if "kB" in self._size else f"{self._fetched() // MEGABYTE} MB of {self._size}"
        return f"{found}, downloading {'-'.join(self._file.split('-')[:2])}: {arrived}"

    def _fetched(self) -> int:
        """Return the bytes of the current download that have arrived."""
        sizes = []
        for path in self._downloads.glob(f"pip-*/**/{glob_escaped(self._file)}"):
            try:
                sizes.append(path.stat().st_size)
            except OSError:  # it was moved meanwhile
                continue
        return max(sizes, default=0)

    def _arrived(self) -> int:
        """Return the number of packages installed so far."""
        folders = self._environment.glob("lib/python*/site-packages/*.dist-info")
        arrived = 0
        for folder in folders:
            try:
                arrived += folder.stat().st_mtime >= self._began_s - 1
            except OSError:  # pip replaces it
                continue
        return arrived


def glob_escaped(name: str) -> str:
    """Return a pattern that matches a name."""
    return re.sub(r"([*?[])", r"[\1]", name)
