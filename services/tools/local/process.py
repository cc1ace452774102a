"""A child process with a log file, which cannot outlive its owner."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PARENT_DEATH = Path(__file__).with_name("parent_death.py")
TAIL_BYTES = 16_384


class Process:
    """A child process. Start it from a thread that outlives it: the child dies with its thread (`parent_death.py`)."""

    def __init__(self, name: str, log: Path, child: asyncio.subprocess.Process) -> None:
        self.name = name
        self.log = log
        self._child = child

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        folder: Path | None = None,
        hold_input: bool = False,
    ) -> Process:
        """Start `command` with exactly this environment and append its output to `log`.

        The child has a process group of its own, so that Ctrl-C in the terminal does not reach it: its owner stops it
        in the right order. `hold_input` gives it a standard input that stays open until its owner ends.
        """
        with log.open("ab") as output:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(PARENT_DEATH),
                str(os.getpid()),
                *command,
                stdin=asyncio.subprocess.PIPE if hold_input else asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                env=dict(environment),
                start_new_session=True,
            )
        return cls(name, log, child)

    @property
    def pid(self) -> int:
        """The command's process id."""
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._child.returncode

    @property
    def alive(self) -> bool:
        """True if the process is running."""
        return self._child.returncode is None

    async def wait(self) -> int:
        """Wait for the end; return the exit status."""
        return await self._child.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command, unless it has ended."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def stop(self, number: signal.Signals = signal.SIGTERM, grace_s: float = 5.0) -> int:
        """Send `number`, wait `grace_s` for the end, then kill the whole group. Return the exit status."""
        self.send(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._child.wait()
        # Its children may outlive it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return await self._child.wait()

    def close_input(self) -> None:
        """Close the standard input that `hold_input` keeps open."""
        if self._child.stdin is not None:
            self._child.stdin.close()

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of the log."""
        try:
            with self.log.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])
