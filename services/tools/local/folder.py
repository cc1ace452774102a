"""Folders of local state: the checkout's `.wisp`, and one folder per run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from urllib.parse import urlsplit

RUNS_KEPT = 10
OWNER = "owner"
SUITE = "suite.json"
API = "api.json"


def checkout() -> Path:
    """Return the folder with the sources, or the working folder when WISP is installed as a package."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def state_folder() -> Path:
    """Return `.wisp` in the checkout: models, results and runs."""
    return checkout() / ".wisp"


class RunFolder:
    """Context manager with a private folder for one run, locked while its owner lives.

    A successful run removes its folder; a failed one leaves it, for its logs. Later runs remove the folders of ended
    owners, except the latest `RUNS_KEPT`.
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
        """Set to keep the folder after a successful run."""

    def close(self, *, keep: bool = False) -> None:
        """Unlock the folder; remove it unless `keep`."""
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(keep=self.kept or (kind is not None and issubclass(kind, Exception)))


@dataclass(frozen=True)
class RunningSuite:
    """The address of a run's suite."""

    namespace: str
    amqp_url: str | None
    """None for given brokers, whose address may hold a password that must not be written to disk."""


def note_suite(folder: Path, suite: RunningSuite) -> None:
    """Write the suite's address to its run's folder."""
    (folder / SUITE).write_text(json.dumps(asdict(suite)))


def running_suites(runs: Path | None = None) -> list[RunningSuite]:
    """Return the suites of runs whose owners live, the latest first."""
    runs = runs or state_folder() / "run"
    found = []
    for path in sorted(runs.glob(f"*/{SUITE}"), key=_modified_s, reverse=True):
        with contextlib.suppress(OSError, ValueError, TypeError):  # being written or removed
            suite = RunningSuite(**json.loads(path.read_text()))
            if _owned(path.parent):
                found.append(suite)
    return found


@dataclass(frozen=True)
class RunningApi:
    """The API that `wisp up` serves."""

    url: str
    """It ends in `/v1`."""
    pid: int
    """Process of the command."""

    @property
    def port(self) -> int | None:
        """The port of the URL."""
        return urlsplit(self.url).port


def page_of(url: str) -> str:
    """Return the address of a gateway's page, given the URL of its API."""
    return f"{url.rstrip('/').removesuffix('/v1')}/"


def note_api(folder: Path, api: RunningApi) -> None:
    """Write the API's address to its run's folder."""
    (folder / API).write_text(json.dumps(asdict(api)))


def running_apis(runs: Path | None = None) -> list[RunningApi]:
    """Return the APIs of runs whose owners live, the latest first."""
    return list(suites_by_api(runs))


def suites_by_api(runs: Path | None = None) -> dict[RunningApi, RunningSuite | None]:
    """Return the APIs of runs whose owners live, the latest first, and the suite behind each.

    None where no messages can be observed, as with `wisp up --serving centralized`.
    """
    runs = runs or state_folder() / "run"
    found = {}
    for path in sorted(runs.glob(f"*/{API}"), key=_modified_s, reverse=True):
        with contextlib.suppress(OSError, ValueError, TypeError):  # being written or removed
            api = RunningApi(**json.loads(path.read_text()))
            suite = path.with_name(SUITE)
            if _owned(path.parent):
                found[api] = RunningSuite(**json.loads(suite.read_text())) if suite.exists() else None
    return found


def _prune(runs: Path) -> None:
    """Remove folders of dead owners, oldest first."""
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
        # A new folder whose owner is about to take the lock, or a partly removed one.
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(lock)
