"""Handing K/V over to other verifiers, through Redis.

What is handed over are full blocks of committed tokens, each under an identity made of all tokens up to its end, beside
the model's fingerprint and the engine's layout: a block that is found is the right one, whoever computed it and for
whichever session. The rest of a session, less than a block, is computed by whoever takes it over. Blocks expire, and
together they take no more than the limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Protocol, TypeVar

from services.verifier import metrics
from services.verifier.core.transfer_cost import Worth
from services.verifier.settings import KvHandoff
from shared.engine import Engine
from shared.engine.blocks import BLOCK, block_names
from shared.errors import BrokersError, EngineError
from shared.runtime import logging
from shared.state.kv import KvBlocks

T = TypeVar("T")

VERSION = 1
"""Of what the bytes of a block mean, beside the engine's layout."""
AT_ONCE = 4
"""Blocks that travel together, six megabytes of the default model's: so long may the model have to wait for its
thread."""
LATER_S = 0.05
"""Pause of `work` after each turn, so that a turn takes many sessions' new blocks."""


class InModelThread(Protocol):
    """Runs engine work where the engine lives."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """Its result."""


class Handoff:
    """Gives and takes K/V for one engine."""

    def __init__(
        self,
        kv: KvBlocks,
        engine: Engine,
        fingerprint: str,
        run: InModelThread,
        *,
        mode: KvHandoff,
        ttl_s: float,
        limit_bytes: int,
    ) -> None:
        self._kv = kv
        self._engine = engine
        self._run = run
        self._mode = mode
        self._ttl_s = ttl_s
        self._kind = f"{VERSION}-{fingerprint}-{engine.layout}"
        self._most = limit_bytes // engine.block_bytes
        self._news: dict[str, list[int]] = {}
        self._arrived = asyncio.Event()
        self._log = logging.get()
        self.worth = Worth()

    async def load(self, sessions: Mapping[str, Sequence[int]]) -> None:
        """Get what others left of these sessions (committed tokens of each), where that is faster than computing it."""
        if self._mode == "off":
            return
        for session, tokens in sessions.items():
            # The last token is computed in any case, for its logits.
            names = block_names(tokens[:-1])
            wanted = await self._run(partial(self._lacking, names))
            if not wanted:
                continue
            try:
                await self._load(session, (len(names) - len(wanted)) * BLOCK, wanted)
            except BrokersError as error:
                self._log.warning("K/V not loaded", session=session, error=str(error))
                return

    async def _load(self, session: str, held: int, wanted: Sequence[bytes]) -> None:
        there = await self._kv.touch(self._kind, wanted, self._ttl_s)
        first = [name for name, _ in takewhile(lambda one: one[1], zip(wanted, there, strict=True))]
        if not first or not self.worth.loads(held, len(first), self._engine.block_bytes):
            return
        started = time.perf_counter()
        loaded = 0
        for start in range(0, len(first), AT_ONCE):
            some = first[start : start + AT_ONCE]
            contents = await self._kv.read(self._kind, some)
            taken = await self._run(partial(self._adopt, some, contents))
            loaded += taken
            if taken < len(some):
                break
        if loaded:
            took_ms = (time.perf_counter() - started) * 1000
            self.worth.loaded(loaded * self._engine.block_bytes, took_ms)
            metrics.HANDOFF_LOADED.inc(loaded * BLOCK)
            self._log.info("K/V loaded", session=session, tokens=loaded * BLOCK, ms=round(took_ms, 1))

    def _lacking(self, names: Sequence[bytes]) -> list[bytes]:
        return [name for name in names if not self._engine.has_block(name)]

    def _contents(self, names: Sequence[bytes]) -> dict[bytes, bytes | None]:
        return {name: self._engine.block(name) for name in names}

    def _adopt(self, names: Sequence[bytes], contents: Sequence[bytes | None]) -> int:
        """How many of these blocks, from the first on, the engine holds now."""
        for done, (name, content) in enumerate(zip(names, contents, strict=True)):
            try:
                if content is None or not (self._engine.adopt(name, content) or self._engine.has_block(name)):
                    return done
            except EngineError as error:
                self._log.warning("K/V in Redis ignored", error=str(error))
                return done
        return len(names)

    def committed(self, session: str, tokens: Sequence[int]) -> None:
        """A session that goes on has these committed tokens now."""
        if self._mode == "write-through" and len(tokens) >= BLOCK:
            self._news[session] = list(tokens)
            self._arrived.set()

    async def work(self) -> None:
        """Write new blocks through, for ever."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            news, self._news = self._news, {}
            await self._save(news)
            await asyncio.sleep(LATER_S)

    async def leave(self, sessions: Mapping[str, Sequence[int]]) -> None:
        """This verifier is about to end: leave everything to others."""
        if self._mode != "off":
            started = time.perf_counter()
            kept = await self._save(sessions)
            took_ms = round((time.perf_counter() - started) * 1000)
            self._log.info("K/V handed over", sessions=len(sessions), tokens=kept * BLOCK, ms=took_ms)

    async def _save(self, sessions: Mapping[str, Sequence[int]]) -> int:
        """Write blocks that are not in Redis yet; returns how many."""
        kept = 0
        try:
            for session, tokens in sessions.items():
                names = await self._run(partial(self._names, session, tokens))
                there = await self._kv.touch(self._kind, names, self._ttl_s) if names else []
                missing = [name for name, is_there in zip(names, there, strict=True) if not is_there]
                for start in range(0, len(missing), AT_ONCE):
                    some = missing[start : start + AT_ONCE]
                    found = await self._run(partial(self._contents, some))
                    blocks = {name: content for name, content in found.items() if content is not None}
                    done = await self._kv.keep(self._kind, blocks, self._ttl_s, self._most)
                    kept += done
                    metrics.HANDOFF_SAVED.inc(done * BLOCK)
                    if done < len(blocks):
                        self._log.warning("K/V not handed over: Redis holds as many as it may", blocks=self._most)
                        return kept
        except BrokersError as error:
            self._log.warning("K/V not handed over", error=str(error))
        return kept

    def _names(self, session: str, tokens: Sequence[int]) -> list[bytes]:
        """Identities of the session's full blocks that the engine holds."""
        if self._engine.cached(session):
            self._engine.attach(session, tokens)  # what has been committed since counts from now on
        return list(takewhile(self._engine.has_block, block_names(tokens)))
