"""Masks that are computed while a forward pass runs, so that the choices after it do not wait for them.

Mostly the token that the logits choose is allowed, and no mask is needed. A session whose last choice needed one, such
as one of a model that does not know the format, is likely to need the next one too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property

from shared.errors import GrammarError
from shared.grammar.allowed import AllowedTokens


class MasksAhead:
    """A thread that computes masks."""

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "masks")

    @contextmanager
    def beside(self, places: Sequence[AllowedTokens]) -> Iterator[None]:
        """Compute the masks of these places while the context lasts.

        At its end, a mask in progress is waited for, and the masks behind it are left out.
        """
        if not places:
            yield
            return
        over = threading.Event()
        work = self._thread.submit(_compute, places, over)
        try:
            yield
        finally:
            over.set()
            if not work.cancel():
                work.result()


def _compute(places: Sequence[AllowedTokens], over: threading.Event) -> None:
    for allowed in places:
        if over.is_set():
            return
        with suppress(GrammarError):  # it is raised again where the mask is needed
            allowed.prepare()
