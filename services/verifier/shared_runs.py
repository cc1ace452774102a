"""The table of runs, shared by the model's thread and the event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from services.verifier.core.runs import RunTable

P = ParamSpec("P")
R = TypeVar("R")


def _locked(method: Callable[Concatenate[RunTable, P], R]) -> Callable[Concatenate[SharedRunTable, P], R]:
    """Let a method of the table run in one thread at a time."""

    @wraps(method)
    def locked(table: SharedRunTable, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with table.lock:
            return method(table, *args, **kwargs)

    return locked


class SharedRunTable(RunTable):
    """Steps use the table in the model's thread, messages and commits in the event loop.

    No call runs during another one. `get` and `len` are single operations of a dict and need no lock.
    """

    def __init__(self, *, digests: bool) -> None:
        """digests: as for `RunTable`."""
        super().__init__(digests=digests)
        self.lock = threading.RLock()
        """Held by each call."""

    @property
    def decoding(self) -> bool:
        with self.lock:
            return super().decoding

    start = _locked(RunTable.start)
    join = _locked(RunTable.join)
    step = _locked(RunTable.step)
    record = _locked(RunTable.record)
    due = _locked(RunTable.due)
    reported = _locked(RunTable.reported)
    drop = _locked(RunTable.drop)
    release = _locked(RunTable.release)
    halt = _locked(RunTable.halt)
    close = _locked(RunTable.close)
