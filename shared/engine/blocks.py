"""Accounting of the KV cache: the assignment of tokens to blocks, without the tensors.

A block holds `BLOCK` consecutive tokens of one session. Three rules make sharing, rollback and eviction simple:

- A full block of committed tokens is *indexed* under a hash chained over all tokens up to its end. Sessions that begin
  with the same tokens refer to the same blocks, counted once.
- A block that is indexed or has several users is never written. A session rolled back into one gets a copy (or takes
  it out of the index if it is the only user) before its next token is written; so rollback itself only moves a length.
- A block that no session uses any more stays in the index, *reclaimable*, until its room is needed: least recently used
  first, and within a session the end before the beginning, since a beginning is of use to more sessions.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.errors import CacheFull, NotAttached, TooLong
from shared.kernels.layout import BLOCK


@dataclass(slots=True)
class CachedSession:
    """A session in the cache: KV of `tokens`, in `blocks`; `hashes` of the leading blocks that are indexed."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Growth:
    """Room made for one call: blocks to copy `(source, target)` before the first write, and the former block tables."""

    copies: tuple[tuple[int, int], ...]
    former: dict[str, list[int]]


def chained_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return a block's identity: 16 bytes over that of the block before it (`b""` for the first) and its own tokens."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def block_names(tokens: Sequence[int]) -> list[bytes]:
    """Return the identities (`chained_hash`) of the full blocks of a session with these tokens."""
    names: list[bytes] = []
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        names.append(chained_hash(names[-1] if names else b"", tokens[end - BLOCK : end]))
    return names


def agreement(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


class BlockPool:
    """Blocks `0..capacity-1`, each free, in use by one or more sessions, or reclaimable.

    Not thread-safe. Raises only from `grow`, and then nothing has changed.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: blocks in all, at least 1."""
        self.capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._users = [0] * capacity
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._reclaimable: OrderedDict[int, None] = OrderedDict()
        self._sessions: OrderedDict[str, CachedSession] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Blocks available without evicting a session: free and reclaimable ones."""
        return len(self._free) + len(self._reclaimable)

    @property
    def sessions(self) -> Sequence[str]:
        """Known sessions, least recently used first."""
        return list(self._sessions)

    def length(self, session_id: str) -> int:
        """Return the number of the session's tokens whose KV is held; 0 if it is unknown or was evicted."""
        known = self._sessions.get(session_id)
        return len(known.tokens) if known else 0

    def table(self, session_id: str) -> list[int]:
        """Return the session's blocks in order of position. The caller must not change the list."""
        return self._require(session_id).blocks

    def attach(self, session_id: str, tokens: Sequence[int]) -> int:
        """Attach a session with its committed tokens; return how many of them are held (see `Engine.attach`)."""
        committed = list(tokens)
        known = self._sessions.setdefault(session_id, CachedSession())
        self._sessions.move_to_end(session_id)
        self._shorten(known, agreement(known.tokens, committed))
        self._index(known)
        self._share(known, committed)
        self._shorten(known, max(len(committed) - 1, 0))
        return len(known.tokens)

    def grow(self, wanted: dict[str, int]) -> Growth:
        """Make room for `wanted[session]` more tokens in each session, evicting idle sessions if necessary.

        Raises NotAttached, TooLong (one session exceeds the whole pool) or CacheFull (the sessions of this call
        together do).
        """
        copies: list[tuple[str, int]] = []
        new = 0
        mine: set[int] = set()
        for name, count in wanted.items():
            known = self._require(name)
            have = len(known.tokens)
            total = blocks_for(have + count)
            if total > self.capacity:
                raise TooLong(
                    f"session {name} needs {have + count} tokens of KV cache, the whole cache holds "
                    f"{self.capacity * BLOCK}; shorten the prompt or raise the cache budget"
                )
            new += total - len(known.blocks)
            if have % BLOCK and self._users[known.blocks[-1]] > 1:
                copies.append((name, known.blocks[-1]))
                new += 1
            mine.update(known.blocks)
        if new > self.capacity - len(mine):
            raise CacheFull(
                f"this call needs {new} more blocks of {BLOCK} tokens beside the {len(mine)} its {len(wanted)} "
                f"sessions hold, the cache has {self.capacity}; send fewer sessions at once or raise the cache budget"
            )
        for name in wanted:
            self._sessions.move_to_end(name)
        idle = (name for name, known in list(self._sessions.items()) if known.blocks and name not in wanted)
        while self.available < new:
            self.release(next(idle))
        former = {name: list(self._sessions[name].blocks) for name in wanted}
        return Growth(self._extend(wanted, dict(copies)), former)

    def append(self, session_id: str, tokens: Sequence[int]) -> None:
        """Record that the KV of these tokens is now held, in the room made by `grow`."""
        self._require(session_id).tokens.extend(tokens)

    def undo(self, growth: Growth) -> None:
        """Return the room that `grow` made, when nothing was written there."""
        for name, blocks in growth.former.items():
            known = self._sessions[name]
            for block in reversed(known.blocks[len(blocks) :]):
                self._drop(block)
            del known.blocks[len(blocks) :]

    def branch(self, session_id: str, branch: str, length: int) -> None:
        """Begin a new session with the first `length` tokens of one. They share blocks until one writes."""
        known = self._require(session_id)
        blocks = known.blocks[: blocks_for(length)]
        for block in blocks:
            self._use(block)
        self._sessions[branch] = CachedSession(known.tokens[:length], blocks)

    def indexed(self, name: bytes) -> int | None:
        """Return the block with this identity, or None."""
        return self._block_of.get(name)

    def adopt(self, name: bytes) -> int | None:
        """Return a reclaimable block for content of this identity that was computed elsewhere.

        None if the identity is held already, or there is no room without evicting a session.
        """
        if name in self._block_of or not self.available:
            return None
        block = self._take()
        self._users[block] = 0
        self._block_of[name] = block
        self._hash_of[block] = name
        self._reclaimable[block] = None
        return block

    def truncate(self, session_id: str, length: int) -> None:
        """Drop all tokens from `length` on, if the session is known and holds more."""
        if known := self._sessions.get(session_id):
            self._shorten(known, max(length, 0))

    def release(self, session_id: str) -> None:
        """Drop a session. Its full blocks stay reclaimable under their hashes."""
        if known := self._sessions.pop(session_id, None):
            self._index(known)
            for block in reversed(known.blocks):
                self._drop(block)

    def integrity(self) -> None:
        """Check that every block is accounted for exactly once and every count is right. Raises AssertionError."""
        users = [0] * self.capacity
        for name, known in self._sessions.items():
            if len(known.blocks) != blocks_for(len(known.tokens)):
                raise AssertionError(f"session {name}: {len(known.tokens)} tokens in {len(known.blocks)} blocks")
            if not all(0 <= block < self.capacity for block in known.blocks):
                raise AssertionError(f"session {name}: blocks {known.blocks} of a pool of {self.capacity}")
            parent = b""
            for i, digest in enumerate(known.hashes):
                parent = chained_hash(parent, known.tokens[i * BLOCK : (i + 1) * BLOCK])
                if digest != parent or self._hash_of.get(known.blocks[i]) != digest:
                    raise AssertionError(f"session {name}: block {i} is not indexed under the hash of its tokens")
            for block in known.blocks:
                users[block] += 1
        if users != self._users:
            raise AssertionError(f"reference counts are {self._users}, sessions use {users}")
        if {b: h for h, b in self._block_of.items()} != self._hash_of:
            raise AssertionError("the two directions of the prefix index differ")
        used = [block for block in range(self.capacity) if users[block]]
        if sorted([*self._free, *self._reclaimable, *used]) != list(range(self.capacity)):
            raise AssertionError(
                f"{len(self._free)} free, {len(self._reclaimable)} reclaimable and {len(used)} used blocks "
                f"are not the {self.capacity} there are"
            )
        if any(block not in self._hash_of for block in self._reclaimable) or any(
            b in self._hash_of for b in self._free
        ):
            raise AssertionError("a free block is indexed, or a reclaimable one is not")

    def _require(self, session_id: str) -> CachedSession:
        known = self._sessions.get(session_id)
        if known is None:
            raise NotAttached(session_id)
        return known

    def _index(self, known: CachedSession) -> None:
        """Index the full blocks of a session whose tokens are all committed. Of two equal blocks one is kept."""
        for i in range(len(known.hashes), len(known.tokens) // BLOCK):
            parent = known.hashes[-1] if known.hashes else b""
            digest = chained_hash(parent, known.tokens[i * BLOCK : (i + 1) * BLOCK])
            block, stored = known.blocks[i], self._block_of.get(digest)
            if stored is None:
                self._block_of[digest] = block
                self._hash_of[block] = digest
            elif stored != block:
                self._use(stored)
                known.blocks[i] = stored
                self._drop(block)
            known.hashes.append(digest)

    def _share(self, known: CachedSession, committed: list[int]) -> None:
        """Append stored whole blocks, but never the last committed token, whose logits are still needed."""
        while True:
            i = len(known.hashes)
            end = (i + 1) * BLOCK
            if end >= len(committed) or len(known.tokens) >= end:
                return
            digest = chained_hash(known.hashes[-1] if known.hashes else b"", committed[i * BLOCK : end])
            stored = self._block_of.get(digest)
            if stored is None:
                return
            self._use(stored)
            for block in known.blocks[i:]:  # a part of the same block, computed by the session itself
                self._drop(block)
            known.blocks[i:] = [stored]
            known.tokens[i * BLOCK :] = committed[i * BLOCK : end]
            known.hashes.append(digest)

    def _extend(self, wanted: dict[str, int], copied: dict[str, int]) -> tuple[tuple[int, int], ...]:
        copies = []
        for name, count in wanted.items():
            known = self._sessions[name]
            source = copied.get(name)
            if source is not None:
                target = self._take()
                copies.append((source, target))
                known.blocks[-1] = target
                self._drop(source)
            elif len(known.tokens) % BLOCK:
                self._unindex(known.blocks[-1])
            while len(known.blocks) < blocks_for(len(known.tokens) + count):
                known.blocks.append(self._take())
        return tuple(copies)

    def _shorten(self, known: CachedSession, length: int) -> None:
        if length >= len(known.tokens):
            return
        del known.tokens[length:]
        del known.hashes[length // BLOCK :]
        keep = blocks_for(length)
        for block in reversed(known.blocks[keep:]):
            self._drop(block)
        del known.blocks[keep:]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._reclaimable.popitem(last=False)
            self._unindex(block)
        self._users[block] = 1
        return block

    def _use(self, block: int) -> None:
        self._reclaimable.pop(block, None)
        self._users[block] += 1

    def _drop(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            if block in self._hash_of:
                self._reclaimable[block] = None
            else:
                self._free.append(block)

    def _unindex(self, block: int) -> None:
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]


def blocks_for(tokens: int) -> int:
    """Return the number of blocks for this many tokens."""
    return -(-tokens // BLOCK)
