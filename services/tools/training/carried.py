"""A training run in pieces of less than 16 MB: all that another machine needs to go on with it.

Machines with a GPU are often lent for minutes, start empty, and give back small files only. A run's folder has
gigabytes of hidden states. What is carried is the rest: prompts, the tokens of the texts, whose states the target
computes again much faster than it generated them, and the checkpoint of the training. The few held-out texts are
generated again.

carried.json    the files, the pieces of each, and what the run was started with
NAME.0, ...     pieces. A new checkpoint has new names; the old pieces go when carried.json no longer names them
"""

from __future__ import annotations

import gzip
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from services.tools.local.pieces import FilePiece, join, split
from services.tools.training import shards
from services.tools.training.run import TrainingRun, created
from shared.errors import SettingsError
from shared.runtime.files import replacing

CONTENTS: Final = "carried.json"
PIECE_BYTES: Final = 15_000_000
KEEP_S: Final = 10.0
"""Shortest time between two looks for something new to keep."""
PROMPTS: Final = "prompts"
CHECKPOINT: Final = "checkpoint"
TEXTS: Final = "texts-"
"""Beginning of the name of a shard's tokens."""

T = TypeVar("T")


class CarriedFile(BaseModel):
    """A file of the run, in pieces."""

    model_config = ConfigDict(frozen=True)

    pieces: list[FilePiece]
    changed_ns: int
    """Time of its last change, by which a newer checkpoint is seen."""


class Contents(BaseModel):
    """The content of carried.json."""

    started_with: dict[str, Any]
    files: dict[str, CarriedFile] = {}


class CarriedRun:
    """The pieces of a run in a folder."""

    def __init__(self, folder: Path, run: TrainingRun) -> None:
        """folder: new, empty, or with the pieces of this run by another machine. Raises SettingsError."""
        self._folder, self._run = created(folder), run
        self._contents = self._read()
        if self._contents.started_with != _started_with(run):
            raise SettingsError(
                f"{folder} has the pieces of a run with another target, seed, [prompts] or [model]: name the settings "
                "of that run, or another folder"
            )
        self._looked_s = float("-inf")

    @property
    def found(self) -> bool:
        """True if the folder has pieces."""
        return bool(self._contents.files)

    def restore(self) -> int:
        """Put into the run's folder what it lacks; return the number of texts whose states were computed again.

        When the run's time is up, the texts that are left are for the next time. Raises SettingsError for a missing or
        damaged piece.
        """
        run, count = self._run, 0
        if not run.prompts.is_file() and PROMPTS in self._contents.files:
            with self._joined(PROMPTS) as packed, gzip.open(packed) as content, replacing(run.prompts) as unfinished:
                unfinished.write_bytes(content.read())
        run.texts.mkdir(exist_ok=True)
        found = {
            name: run.texts / f"{name.removeprefix(TEXTS)}.safetensors"
            for name in sorted(self._contents.files)
            if name.startswith(TEXTS)
        }
        missing = {name: shard for name, shard in found.items() if not shard.is_file()}
        in_time = takewhile(lambda _: not run.time_is_up, missing)
        computed = run.with_states(self._tokens(name) for name in in_time)
        for shard, texts in zip(missing.values(), computed, strict=False):  # fewer, when the time is up
            shards.save(shard, texts)
            count += len(texts)
        if not run.checkpoint.is_file() and CHECKPOINT in self._contents.files:
            with self._joined(CHECKPOINT) as joined, replacing(run.checkpoint) as unfinished:
                shutil.copyfile(joined, unfinished)
        return count

    def keep(self) -> None:
        """Write the pieces of what is new in the run's folder."""
        run, files = self._run, self._contents.files
        if run.prompts.is_file() and PROMPTS not in files:
            self._keep(PROMPTS, run.prompts, _compress)
        for shard in shards.files(run.texts):
            if (name := f"{TEXTS}{shard.stem}") not in files:
                self._keep(name, shard, write_tokens)
        if run.checkpoint.is_file():
            held = files.get(CHECKPOINT)
            if held is None or held.changed_ns != run.checkpoint.stat().st_mtime_ns:
                self._keep(CHECKPOINT, run.checkpoint, shutil.copyfile)
        self._looked_s = time.monotonic()

    def watching(self, report: Callable[[T], None]) -> Callable[[T], None]:
        """Return a callback that also keeps what is new, every few seconds."""

        def watched(progress: T) -> None:
            report(progress)
            if time.monotonic() - self._looked_s > KEEP_S:
                self.keep()

        return watched

    def _read(self) -> Contents:
        path = self._folder / CONTENTS
        if not path.is_file():
            return Contents(started_with=_started_with(self._run))
        try:
            return Contents.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise SettingsError(f"{path} is damaged: copy it again, or name a new folder") from error

    def _tokens(self, name: str) -> Sequence[shards.GeneratedText]:
        with self._joined(name) as packed:
            return read_tokens(packed)

    @contextmanager
    def _joined(self, name: str) -> Iterator[Path]:
        with TemporaryDirectory(prefix="wisp-carried-", dir=self._run.folder) as made:
            whole = Path(made) / name
            join(self._folder, self._contents.files[name].pieces, whole)
            yield whole

    def _keep(self, name: str, file: Path, write: Callable[[Path, Path], object]) -> None:
        """Write a file, as `write` changes it, in pieces, and then name them in carried.json."""
        changed_ns = file.stat().st_mtime_ns
        before = self._contents.files.get(name)
        with TemporaryDirectory(prefix="wisp-carried-", dir=self._run.folder) as made:
            whole = Path(made) / name
            write(file, whole)
            pieces = split(whole, self._folder, f"{name}-{changed_ns}", PIECE_BYTES)
        self._contents.files[name] = CarriedFile(pieces=pieces, changed_ns=changed_ns)
        with replacing(self._folder / CONTENTS) as unfinished:
            unfinished.write_text(self._contents.model_dump_json(indent=1) + "\n")
        for old in before.pieces if before else ():
            (self._folder / old.name).unlink(missing_ok=True)


def write_tokens(shard: Path, to: Path) -> None:
    """Write the texts of a shard without their hidden states."""
    texts = shards.load(shard)
    with to.open("wb") as file:
        np.savez_compressed(
            file,
            tokens=torch.cat([text.tokens for text in texts]).numpy(),
            lengths=[len(text.tokens) for text in texts],
            prompt_lens=[text.prompt_len for text in texts],
            origins=[text.origin for text in texts],
            temperatures=[text.temperature for text in texts],
            kinds=[text.kind for text in texts],
        )


def read_tokens(path: Path) -> Sequence[shards.GeneratedText]:
    """Return the texts that `write_tokens` wrote, with states of no element."""
    with np.load(path, allow_pickle=False) as file:
        parts = {name: file[name] for name in file.files}
    tokens = torch.split(torch.from_numpy(parts["tokens"]), parts["lengths"].tolist())
    return [
        shards.GeneratedText(one, torch.zeros(len(one), 0), prompt_len, origin, temperature, kind)
        for one, prompt_len, origin, temperature, kind in zip(
            tokens, *(parts[name].tolist() for name in ("prompt_lens", "origins", "temperatures", "kinds")), strict=True
        )
    ]


def _started_with(run: TrainingRun) -> dict[str, Any]:
    settings = run.config
    return {
        "vocabulary": run.target.vocab_fingerprint,
        "seed": settings.seed,
        "prompts": settings.prompts.model_dump(),
        "model": settings.model.model_dump(),
    }


def _compress(file: Path, to: Path) -> None:
    with file.open("rb") as content, gzip.open(to, "wb") as packed:
        shutil.copyfileobj(content, packed)
