"""The accounting of KV blocks: sharing, rollback, eviction, and that nothing is ever lost or written under another's
feet."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared.engine.blocks import BlockPool, blocks_for
from shared.errors import CacheFull, EngineError, NotAttached, TooLong
from shared.kernels.layout import BLOCK


def feed(pool: BlockPool, session: str, tokens: list[int]) -> None:
    pool.grow({session: len(tokens)})
    pool.append(session, tokens)


def test_a_shared_prefix_is_counted_once() -> None:
    pool = BlockPool(20)
    prompt = list(range(3 * BLOCK + 10))
    pool.attach("first", [])
    feed(pool, "first", prompt)
    pool.attach("first", [*prompt, 1])
    assert pool.available == 16
    for i in range(8):
        assert pool.attach(str(i), prompt) == 3 * BLOCK
        assert pool.table(str(i)) == pool.table("first")[:3]
    assert pool.available == 16


def test_prompts_computed_side_by_side_end_up_in_the_same_blocks() -> None:
    pool = BlockPool(8)
    prompt = list(range(2 * BLOCK))
    for name in "ab":
        pool.attach(name, [])
    pool.grow({"a": len(prompt), "b": len(prompt)})
    for name in "ab":
        pool.append(name, prompt)
    assert pool.available == 4
    for name in "ab":
        pool.attach(name, [*prompt, 7])
    assert pool.table("a") == pool.table("b")
    assert pool.available == 6


def test_only_whole_agreeing_blocks_are_shared() -> None:
    pool = BlockPool(8)
    prompt = list(range(2 * BLOCK + 5))
    pool.attach("a", [])
    feed(pool, "a", prompt)
    pool.release("a")
    other = list(prompt)
    other[BLOCK + 3] = 999
    assert pool.attach("b", other) == BLOCK
    assert pool.attach("c", prompt[: BLOCK - 1]) == 0


def test_a_rejected_draft_is_not_offered_to_others() -> None:
    pool = BlockPool(8)
    prompt = list(range(BLOCK - 4))
    pool.attach("a", [])
    feed(pool, "a", prompt)
    feed(pool, "a", [1000] * 8)
    pool.truncate("a", len(prompt))
    pool.attach("a", [*prompt, 5])
    assert pool.attach("b", [*prompt, *[1000] * 8]) == 0


def test_an_indexed_block_is_copied_before_a_rolled_back_session_writes() -> None:
    pool = BlockPool(8)
    prompt = list(range(2 * BLOCK))
    pool.attach("a", [])
    feed(pool, "a", prompt)
    pool.attach("a", [*prompt, 1])
    pool.attach("b", [*prompt, 1])
    shared = pool.table("b")[1]
    pool.truncate("b", BLOCK + 10)
    growth = pool.grow({"b": 1})
    ((source, target),) = growth.copies
    assert source == shared == pool.table("a")[1]
    assert target == pool.table("b")[1] != shared
    pool.append("b", [77])
    pool.integrity()


def test_at_least_one_token_is_left_to_feed() -> None:
    pool = BlockPool(8)
    prompt = list(range(2 * BLOCK))
    pool.attach("a", [])
    feed(pool, "a", prompt)
    assert pool.attach("a", prompt) == 2 * BLOCK - 1
    assert pool.attach("b", prompt) == BLOCK


def test_eviction_takes_the_least_recently_used_session_and_its_end_first() -> None:
    pool = BlockPool(4)
    for name, base in (("old", 0), ("new", 5000)):
        pool.attach(name, [])
        feed(pool, name, list(range(base, base + 2 * BLOCK)))
    pool.attach("old", list(range(2 * BLOCK)))
    pool.attach("third", [])
    feed(pool, "third", [1] * BLOCK)
    assert pool.length("new") == 0
    assert pool.length("old") == 2 * BLOCK - 1
    assert pool.attach("new", list(range(5000, 5000 + 2 * BLOCK))) == BLOCK


def test_a_call_that_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(4)
    for name in "abc":
        pool.attach(name, [])
        feed(pool, name, [ord(name)] * 10)
    before = {name: (pool.length(name), list(pool.table(name))) for name in "abc"}
    with pytest.raises(CacheFull, match="raise the cache budget"):
        pool.grow({"a": BLOCK, "b": BLOCK, "c": BLOCK})
    with pytest.raises(TooLong, match="raise the cache budget"):
        pool.grow({"c": 4 * BLOCK})
    with pytest.raises(NotAttached, match="attach it"):
        pool.grow({"a": 1, "stranger": 1})
    assert {name: (pool.length(name), list(pool.table(name))) for name in "abc"} == before
    pool.integrity()


class Operations(RuleBasedStateMachine):
    """Random operations against a model that is a dict of token lists. Few token values and long runs, so that prefixes
    meet."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7)
        self.content: dict[tuple[int, int], int] = {}
        """Token whose KV lie at (block, offset), as the engine would have written them."""

    names = st.sampled_from("abcd")
    runs = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 80)), max_size=4).map(
        lambda parts: [token for token, count in parts for _ in range(count)]
    )

    @rule(name=names, tokens=runs)
    def attach(self, name: str, tokens: list[int]) -> None:
        held = self.pool.attach(name, tokens)
        assert held == self.pool.length(name) <= max(len(tokens) - 1, 0)
        assert self.read(name) == tokens[:held]

    @rule(wanted=st.dictionaries(names, runs.filter(bool), min_size=1))
    def forward(self, wanted: dict[str, list[int]]) -> None:
        before = {name: self.read(name) for name in wanted if name in self.pool.sessions}
        try:
            growth = self.pool.grow({name: len(tokens) for name, tokens in wanted.items()})
        except EngineError:
            assert {name: self.read(name) for name in before} == before
            return
        for source, target in growth.copies:
            for offset in range(BLOCK):
                self.content[target, offset] = self.content.get((source, offset), -1)
        for name, tokens in wanted.items():
            for i, token in enumerate(tokens, start=self.pool.length(name)):
                self.content[self.pool.table(name)[i // BLOCK], i % BLOCK] = token
        for name, tokens in wanted.items():
            self.pool.append(name, tokens)
            assert self.read(name) == before[name] + tokens

    @rule(wanted=st.dictionaries(names, st.integers(1, 200), min_size=1))
    def failed_forward(self, wanted: dict[str, int]) -> None:
        try:
            growth = self.pool.grow(wanted)
        except EngineError:
            return
        for source, target in growth.copies:
            for offset in range(BLOCK):
                self.content[target, offset] = self.content.get((source, offset), -1)
        self.pool.undo(growth)

    @rule(name=names, length=st.integers(0, 300))
    def truncate(self, name: str, length: int) -> None:
        before = self.pool.length(name)
        self.pool.truncate(name, length)
        assert self.pool.length(name) == min(before, length)

    @rule(name=names, branch=names, length=st.integers(0, 300))
    def branch(self, name: str, branch: str, length: int) -> None:
        if name not in self.pool.sessions or branch in self.pool.sessions:
            return
        self.pool.branch(name, branch, length)
        assert self.read(branch) == self.read(name)[:length]

    @rule(name=names)
    def release(self, name: str) -> None:
        self.pool.release(name)
        assert self.pool.length(name) == 0

    def read(self, name: str) -> list[int]:
        """The session's tokens as its blocks have them."""
        return [self.content[self.pool.table(name)[i // BLOCK], i % BLOCK] for i in range(self.pool.length(name))]

    @invariant()
    def nothing_is_lost_or_overwritten(self) -> None:
        self.pool.integrity()
        for name in self.pool.sessions:
            assert self.read(name) == self.pool._sessions[name].tokens
            assert len(self.pool.table(name)) == blocks_for(self.pool.length(name))


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
