"""Learned weights on disk, so that they outlive a restart. Texts are never stored. Loads no torch to read.

Each pair of a shipped draft and a target has a folder of its own, named after the fingerprints of both:

version-N/          a draft like any other (`services.drafter.hidden.card`); the highest N counts
version-N/learned.json   its acceptance on the held-back texts when it was kept
lock                held by the process that keeps versions here
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from services.drafter.hidden.card import CONFIG, WEIGHTS, HiddenDraftFolder
from services.drafter.hidden.tensors import HEAD_IDS, draft_tensors
from shared.errors import ModelError, SettingsError

FACTS = "learned.json"
KEPT = 2
"""Versions that are kept."""
UNFINISHED = ".new"
_NAME = re.compile(r"version-(\d{1,9})")


def draft_fingerprint(draft: HiddenDraftFolder) -> str:
    """Return the identity of a draft: its shape and its weights. Raises ModelError."""
    digest = hashlib.sha256()
    try:
        for name in (CONFIG, WEIGHTS):
            digest.update((draft.path / name).read_bytes())
    except OSError as error:
        raise ModelError(f"{draft.path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


def _head_ids(draft: HiddenDraftFolder) -> NDArray[Any]:
    return draft_tensors(draft)[HEAD_IDS]


class VersionFolder:
    """The learned versions of a draft for one target."""

    def __init__(self, folder: Path, draft: HiddenDraftFolder, target_fingerprint: str) -> None:
        """folder: of the user's choice. Raises ModelError."""
        self.path = folder / f"{draft_fingerprint(draft)}-{target_fingerprint}"
        self._draft = draft
        self._lock: IO[bytes] | None = None

    @property
    def last_number(self) -> int:
        """Number of the last version; 0 if there is none."""
        return max(self._numbers(), default=0)

    @staticmethod
    def number(version: HiddenDraftFolder) -> int:
        """Return the number of a version of `newest`."""
        return int(version.path.name.removeprefix("version-"))

    def newest(self) -> HiddenDraftFolder | None:
        """Return the newest version that can be used; None if there is none."""
        for number in sorted(self._numbers(), reverse=True):
            with suppress(ModelError):
                found = HiddenDraftFolder.open(self._version(number))
                if found.card == self._draft.card and np.array_equal(_head_ids(found), _head_ids(self._draft)):
                    return found
        return None

    def lock(self) -> bool:
        """Let this process keep versions here; return False if another one does already. Raises SettingsError.

        A version that a killed process was writing is removed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise SettingsError(
                f"learned drafts cannot be kept in {self.path} ({error.strerror}); name another folder "
                "(WISP_DRAFT_LEARNING_FOLDER)"
            ) from error
        self._lock = lock
        for unfinished in self.path.glob(f".*{UNFINISHED}"):
            shutil.rmtree(unfinished, ignore_errors=True)
        return True

    @property
    def locked(self) -> bool:
        """True if this process keeps versions here."""
        return self._lock is not None

    def keep(self, number: int, write: Callable[[Path], None], facts: Mapping[str, object]) -> None:
        """Keep a version, and remove the oldest ones. write: writes the draft into a folder. Raises OSError."""
        unfinished = self.path / f".{token_hex(4)}{UNFINISHED}"
        try:
            write(unfinished)
            (unfinished / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
            unfinished.rename(self._version(number))
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        for old in sorted(self._numbers())[:-KEPT]:
            shutil.rmtree(self._version(old), ignore_errors=True)

    def _version(self, number: int) -> Path:
        return self.path / f"version-{number}"

    def _numbers(self) -> list[int]:
        names: list[str] = []
        with suppress(OSError):
            names = [path.name for path in self.path.iterdir()]
        return [int(found[1]) for name in names if (found := _NAME.fullmatch(name))]
