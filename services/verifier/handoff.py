"""Handoff of KV to other verifiers, through Redis.

Full blocks of committed tokens are handed over. Each has a name made of all tokens up to its end, and is stored under
the model's fingerprint, the engine's arithmetic and its layout. A block with the right name therefore has the right
content, bit for bit, whichever verifier and session it comes from. The rest of a session, less than a block, is
computed by the verifier that takes the session over. Blocks expire, and all of them together take no more than a limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile

from services.verifier import metrics
from services.verifier.core.transfer_cost import TransferCost
from services.verifier.engine_thread import EngineThread
from services.verifier.settings import KvHandoff
from shared.engine.blocks import block_names
from shared.errors import BrokersError, EngineError
from shared.kernels.layout import BLOCK
from shared.runtime import logging
from shared.state.kv import KvBlocks

VERSION = 1
"""Version of the content of a block, beside the engine's layout."""
AT_ONCE = 4
"""Blocks per transfer, six megabytes of the default model's. The model may have to wait this long for its thread."""
SAVE_PAUSE_S = 0.05
"""Pause of `save_committed` after each turn, so that a turn saves the new blocks of many sessions."""


class Handoff:
    """Loads and saves the KV of one engine."""

    def __init__(
        self,
        kv: KvBlocks,
        engine_thread: EngineThread,
        fingerprint: str,
        *,
        mode: KvHandoff,
        ttl_s: float,
        limit_bytes: int,
    ) -> None:
        self._kv = kv
        self._thread = engine_thread
        self._engine = engine_thread.engine
        self._mode = mode
        self._ttl_s = ttl_s
        self._kind = f"{VERSION}-{fingerprint}-{self._engine.arithmetic}-{self._engine.layout}"
        self._most_blocks = limit_bytes // self._engine.block_bytes
        self._unsaved: dict[str, list[int]] = {}
        self._has_unsaved = asyncio.Event()
        self._log = logging.get()
        self.transfer_cost = TransferCost()

    async def load(self, sessions: Mapping[str, Sequence[int]]) -> None:
        """Load the blocks of these sessions (committed tokens by session) where that is faster than computing them."""
        if self._mode == "off":
            return
        for session_id, tokens in sessions.items():
            # The last token is computed in any case, for its logits.
            names = block_names(tokens[:-1])
            wanted = await self._thread.run(partial(self._missing, names))
            if not wanted:
                continue
            try:
                await self._load(session_id, (len(names) - len(wanted)) * BLOCK, wanted)
            except BrokersError as error:
                self._log.warning("KV not loaded", session=session_id, error=str(error))
                return

    async def _load(self, session_id: str, held: int, wanted: Sequence[bytes]) -> None:
        stored = await self._kv.touch(self._kind, wanted, self._ttl_s)
        names = [name for name, _ in takewhile(lambda pair: pair[1], zip(wanted, stored, strict=True))]
        size_bytes = len(names) * self._engine.block_bytes
        if not names or not self.transfer_cost.loading_pays(held, len(names) * BLOCK, size_bytes):
            return
        started = time.perf_counter()
        loaded = 0
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            contents = await self._kv.read(self._kind, some)
            adopted = await self._thread.run(partial(self._adopt, some, contents))
            loaded += adopted
            if adopted < len(some):
                break
        if loaded:
            took_ms = (time.perf_counter() - started) * 1000
            self.transfer_cost.record_load(loaded * self._engine.block_bytes, took_ms)
            metrics.HANDOFF_LOADED.inc(loaded * BLOCK)
            self._log.info("KV loaded", session=session_id, tokens=loaded * BLOCK, ms=round(took_ms, 1))

    def _missing(self, names: Sequence[bytes]) -> list[bytes]:
        return [name for name in names if not self._engine.has_block(name)]

    def _contents(self, names: Sequence[bytes]) -> dict[bytes, bytes | None]:
        return {name: self._engine.block(name) for name in names}

    def _adopt(self, names: Sequence[bytes], contents: Sequence[bytes | None]) -> int:
        """Give blocks to the engine; return how many of them, from the first on, it holds now."""
        for done, (name, content) in enumerate(zip(names, contents, strict=True)):
            try:
                if content is None or not (self._engine.adopt(name, content) or self._engine.has_block(name)):
                    return done
            except EngineError as error:
                self._log.warning("KV in Redis ignored", error=str(error))
                return done
        return len(names)

    def on_commit(self, session_id: str, tokens: Sequence[int]) -> None:
        """Queue the new blocks of an active session with these committed tokens for `save_committed`."""
        if self._mode == "write-through" and len(tokens) >= BLOCK:
            self._unsaved[session_id] = list(tokens)
            self._has_unsaved.set()

    async def save_committed(self) -> None:
        """Save the queued blocks, for ever."""
        while True:
            await self._has_unsaved.wait()
            self._has_unsaved.clear()
            unsaved, self._unsaved = self._unsaved, {}
            await self._save(unsaved)
            await asyncio.sleep(SAVE_PAUSE_S)

    async def save_all(self, sessions: Mapping[str, Sequence[int]]) -> None:
        """Save all blocks of these sessions before this verifier ends."""
        if self._mode != "off":
            started = time.perf_counter()
            saved = await self._save(sessions)
            took_ms = round((time.perf_counter() - started) * 1000)
            self._log.info("KV handed over", sessions=len(sessions), tokens=saved * BLOCK, ms=took_ms)

    async def _save(self, sessions: Mapping[str, Sequence[int]]) -> int:
        """Write the blocks that are not in Redis yet; return how many were written."""
        saved = 0
        try:
            for session_id, tokens in sessions.items():
                names = await self._thread.run(partial(self._held_names, session_id, tokens))
                stored = await self._kv.touch(self._kind, names, self._ttl_s) if names else []
                missing = [name for name, is_stored in zip(names, stored, strict=True) if not is_stored]
                for start in range(0, len(missing), AT_ONCE):
                    contents = await self._thread.run(partial(self._contents, missing[start : start + AT_ONCE]))
                    blocks = {name: content for name, content in contents.items() if content is not None}
                    written = await self._kv.keep(self._kind, blocks, self._ttl_s, self._most_blocks)
                    saved += written
                    metrics.HANDOFF_SAVED.inc(written * BLOCK)
                    if written < len(blocks):
                        self._log.warning("KV not handed over: the limit in Redis is reached", blocks=self._most_blocks)
                        return saved
        except BrokersError as error:
            self._log.warning("KV not handed over", error=str(error))
        return saved

    def _held_names(self, session_id: str, tokens: Sequence[int]) -> list[bytes]:
        """Return the names of the session's full blocks that the engine holds."""
        if self._engine.cached(session_id):
            self._engine.attach(session_id, tokens)  # indexes the blocks that were filled since the last attach
        return list(takewhile(self._engine.has_block, block_names(tokens)))
