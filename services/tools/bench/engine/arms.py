"""The arms of the engine benchmark. An arm is a program with one format of weights, timed in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from services.tools.bench.engine.core.cases import EngineCase
from shared.errors import WispError

Program = Literal["wisp", "transformers", "llama.cpp"]
ERROR_LINES = 12
"""Last lines of a failed arm's log that its error shows."""


class ArmFailed(WispError):
    """An arm cannot be loaded, or its process has ended."""


@dataclass(frozen=True)
class EngineArm:
    """A program with a model in one format of weights."""

    program: Program
    format: str
    model: Path
    """A Hugging Face folder, or llama.cpp's GGUF file."""

    @property
    def name(self) -> str:
        """The name in tables and options."""
        return f"{self.program} {self.format}"


@dataclass(frozen=True)
class ArmSizes:
    """Sizes that an arm is prepared for."""

    threads: int
    cached: int
    """Cached tokens of each session."""
    sessions: int
    """Most sessions of a pass."""


class ArmProcess:
    """An arm in a process (`worker`) that times one case at a time. Use as a context manager.

    Requests and answers are lines of JSON. Separate processes keep the arms' thread settings, memory and libraries
    apart.
    """

    def __init__(self, arm: EngineArm, sizes: ArmSizes, log: Path, *, measure_memory: bool = False) -> None:
        """log: file for what the process writes to stderr. Raises ArmFailed."""
        self.arm = arm
        self._log_path = log
        self._log = log.open("w")
        message = {
            "program": arm.program,
            "format": arm.format,
            "model": str(arm.model),
            "threads": sizes.threads,
            "cached": sizes.cached,
            "sessions": sizes.sessions,
            "measure_memory": measure_memory,
        }
        command = [sys.executable, "-m", "services.tools.bench.engine.worker", json.dumps(message)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        try:
            self.facts: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ArmProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def visit(self, case: EngineCase) -> float:
        """Return the median milliseconds of the case's timed passes."""
        return float(self._ask({"case": case.record()})["ms"])

    def score(self, tokens: list[int]) -> tuple[list[float], list[int]]:
        """Return how well the model predicts each token after the first: see `scores.Scores`."""
        answer = self._ask({"score": tokens})
        return answer["losses"], answer["choices"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        pipe: IO[str] | None = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(request) + "\n")
            pipe.flush()
        except OSError:
            pass  # the process has ended; the missing answer shows why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            log = "\n".join(self._log_path.read_text(errors="replace").splitlines()[-ERROR_LINES:])
            raise ArmFailed(f"{self.arm.name} ended with status {status}: {log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ArmFailed(f"{self.arm.name}: {answer['error']}")
        return answer
