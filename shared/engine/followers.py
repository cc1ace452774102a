"""The processes of the other GPUs. The first GPU's process starts them, sends them every pass and watches them.

A follower ends when the first process does. If a follower ends first, no pass can be computed any more: the first
process says so and ends with `STATUS`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, Final

import structlog

from shared.engine.peers import GroupMembership
from shared.errors import EngineError
from shared.gpu_kernels.memory import DeviceMemory
from shared.kernels.cache import PackedBatch

STATUS: Final = 70
"""Exit status of a process that has lost a GPU's process (EX_SOFTWARE)."""
PROGRAM: Final = ("-m", "shared.engine.follower")


@dataclass(frozen=True, slots=True)
class Task:
    """First message to a follower."""

    folder: Path
    form: str
    torch_device: str
    membership: GroupMembership


@dataclass(frozen=True, slots=True)
class LoadPart:
    """Load this rank's part of the model, with a KV of so many blocks."""

    blocks: int


@dataclass(frozen=True, slots=True)
class Meet:
    """Join the process group: all have loaded their parts."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Compute a batch with the options that the first process has."""

    tokens: Sequence[int]
    batch: PackedBatch
    wanted: Sequence[int]
    wide_tiles: bool
    joins_runs: bool | None
    with_graphs: bool


@dataclass(frozen=True, slots=True)
class PrepareGraphs:
    """Capture the graphs of steps."""


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Copy a block's keys and values."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class ClearBlock:
    """Set a block's keys and values to zero."""

    block: int


@dataclass(frozen=True, slots=True)
class Started:
    """Answer of a follower: its device can be used."""

    memory: DeviceMemory | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """Answer of a follower: its part is loaded."""

    hardware: str
    """Kind of GPU. All have to be of one, so that their bits are."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Last message of a follower."""

    reason: str


def end_process(reason: str) -> None:
    """Log the reason and end this process at once, whose passes would wait for a dead follower for ever."""
    structlog.get_logger().error("stopped", error=reason)
    sys.stderr.flush()
    os._exit(STATUS)


class Followers:
    """The processes of ranks 1 and more."""

    def __init__(
        self,
        folder: Path,
        form: str,
        torch_devices: Sequence[str],
        *,
        program: Sequence[str] = PROGRAM,
        on_loss: Callable[[str], None] = end_process,
    ) -> None:
        """Start the processes. torch_devices: of all ranks, the first process's own one included. program: arguments of
        Python. on_loss: called in a thread of its own when a follower has ended.
        """
        self._folder = TemporaryDirectory(prefix="wisp-gpus-")
        self._on_loss = on_loss
        self._devices = torch_devices[1:]
        ranks = len(torch_devices)
        self.membership = GroupMembership(0, ranks, Path(self._folder.name) / "meeting")
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank, torch_device in enumerate(self._devices, 1):
            own, other = Pipe()
            command = [sys.executable, *program, str(other.fileno())]
            self._processes.append(subprocess.Popen(command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL))
            other.close()
            self._connections.append(own)
            self._send(rank, Task(folder, form, torch_device, GroupMembership(rank, ranks, self.membership.meeting)))

    def memories(self) -> list[DeviceMemory | None]:
        """Return the memory of each follower's device. Raises EngineError if one has failed."""
        return [answer.memory for answer in self._answers(Started)]

    def require_loaded(self, hardware: str) -> None:
        """Wait until every follower has loaded its part.

        Raises EngineError if one has failed, or has other hardware than the first process.
        """
        for torch_device, answer in zip(self._devices, self._answers(Loaded), strict=True):
            if answer.hardware != hardware:
                raise EngineError(
                    f"WISP_GPUS: {torch_device} is {answer.hardware}, and the first GPU is {hardware}. GPUs that "
                    "compute a model together must be of one kind"
                )

    def tell(self, message: object) -> None:
        """Send every follower a message. Raises EngineError if one has ended."""
        for rank in range(1, len(self._connections) + 1):
            self._send(rank, message)

    def watch(self) -> None:
        """From now on, call `on_loss` when a follower ends."""
        Thread(target=self._watch, name="followers", daemon=True).start()

    def close(self) -> None:
        """End the followers."""
        for process in self._processes:
            process.kill()
            process.wait()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()

    def _send(self, rank: int, message: object) -> None:
        try:
            self._connections[rank - 1].send(message)
        except OSError as error:
            raise self._lost(rank, "") from error

    def _answers(self, kind: type[Any]) -> list[Any]:
        return [self._answer(rank, kind) for rank in range(1, len(self._connections) + 1)]

    def _answer(self, rank: int, kind: type[Any]) -> Any:
        answer = self._last_words(rank)
        if isinstance(answer, kind):
            return answer
        raise self._lost(rank, answer.reason if isinstance(answer, Failed) else "")

    def _last_words(self, rank: int) -> object:
        try:
            return self._connections[rank - 1].recv()
        except (EOFError, OSError):
            return None

    def _lost(self, rank: int, reason: str) -> EngineError:
        why = reason or f"status {self._processes[rank - 1].wait()}"
        return EngineError(f"the process of GPU {self._devices[rank - 1]} has ended ({why})")

    def _watch(self) -> None:
        ready = wait(self._connections)[0]
        rank = next(number for number, one in enumerate(self._connections, 1) if one is ready)
        answer = self._last_words(rank)
        self._on_loss(str(self._lost(rank, answer.reason if isinstance(answer, Failed) else "")))
