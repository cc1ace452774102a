"""Where a checkout keeps its local state, and the folder of one run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex

RUNS_KEPT = 10
OWNER = "owner"
SUITE = "suite.json"


def checkout() -> Path:
    """The folder that holds the product's sources, or the working folder when it is installed as a package."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def state_folder() -> Path:
    """`.wisp` in the checkout: models, results and runs."""
    return checkout() / ".wisp"


class RunFolder:
    """A private folder of one run, locked while its owner lives. Use as a context manager.

    A run that ends well removes it; one that fails keeps it, for its logs. Folders of dead owners are removed by later
    runs, except the latest `RUNS_KEPT`.
    """

    def __init__(self, purpose: str, runs: Path | None = None) -> None:
        runs = runs or state_folder() / "run"
        runs.mkdir(parents=True, exist_ok=True)
        _prune(runs)
        self.path = runs / f"{purpose}-{token_hex(3)}"
        self.path.mkdir(mode=0o700)
        self._lock = os.open(self.path / OWNER, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.write(self._lock, f"{os.getpid()}\n".encode())
        self.kept = False
        """Set to keep it even if the run ends well."""

    def close(self, *, keep: bool = False) -> None:
        """Give the folder up; removes it unless `keep`."""
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(keep=self.kept or (kind is not None and issubclass(kind, Exception)))


@dataclass(frozen=True)
class RunningSuite:
    """Where the suite of a run is found."""

    namespace: str
    amqp_url: str | None
    """None where somebody else runs the brokers: their address may hold a password that is not ours to write down."""


def note_suite(folder: Path, suite: RunningSuite) -> None:
    """Write down where the suite of this run's folder is found."""
    (folder / SUITE).write_text(json.dumps(asdict(suite)))


def running_suites(runs: Path | None = None) -> list[RunningSuite]:
    """The suites of runs whose owners live, the latest first."""
    runs = runs or state_folder() / "run"
    found = []
    for path in sorted(runs.glob(f"*/{SUITE}"), key=_modified_s, reverse=True):
        with contextlib.suppress(OSError, ValueError, TypeError):  # being written or removed just now
            suite = RunningSuite(**json.loads(path.read_text()))
            if _owned(path.parent):
                found.append(suite)
    return found


def _prune(runs: Path) -> None:
    """Remove what dead owners left, oldest first."""
    folders = sorted((path for path in runs.iterdir() if path.is_dir()), key=_modified_s, reverse=True)
    for path in folders[RUNS_KEPT:]:
        if not _owned(path):
            shutil.rmtree(path, ignore_errors=True)


def _modified_s(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _owned(path: Path) -> bool:
    try:
        lock = os.open(path / OWNER, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        # Either a new folder whose owner is about to take the lock, or the remains of one.
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(lock)
