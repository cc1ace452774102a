"""Continuous batching over the engine's own accounting of blocks, and the link between the two processes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.baseline.core.batching import Batcher, SequenceState, StepPart
from services.baseline.link import Frames, frame
from shared.engine.blocks import BlockPool
from shared.kernels.layout import BLOCK
from shared.messages import Cancel


class Cache:
    """The engine's block accounting, without tensors."""

    def __init__(self, blocks: int) -> None:
        self.pool = BlockPool(blocks)

    @property
    def free_tokens(self) -> int:
        return self.pool.available * BLOCK

    def cached(self, session: str) -> int:
        return self.pool.length(session)

    def attach(self, session: str, tokens: Sequence[int]) -> int:
        return self.pool.attach(session, tokens)

    def release(self, session: str) -> None:
        self.pool.release(session)


@dataclass
class Engine:
    """Runs the batcher's steps and grows the sessions, like the engine's loop."""

    blocks: int
    prefill_tokens: int = 64
    max_running: int = 64
    draft_length: int = 0
    settled: random.Random | None = None
    """Shuffles the order of a step's outcomes."""

    def __post_init__(self) -> None:
        self.cache = Cache(self.blocks)
        self.batcher = Batcher(
            self.cache,
            block_tokens=BLOCK,
            prefill_tokens=self.prefill_tokens,
            max_running=self.max_running,
            draft_length=self.draft_length,
        )
        self.came: list[SequenceState] = []
        self.first_step: dict[str, int] = {}
        self.steps: list[list[tuple[str, int, int, int | None]]] = []
        self.preemptions = 0

    def add(self, prompt: list[int], outputs: int) -> SequenceState:
        sequence = SequenceState(f"s{len(self.came)}", prompt, min(len(prompt) + outputs, self.blocks * BLOCK))
        self.came.append(sequence)
        self.batcher.add(sequence)
        return sequence

    def step(self) -> list[StepPart]:
        before = list(self.batcher.running)
        parts = self.batcher.next_step()
        self.preemptions += sum(sequence not in self.batcher.running for sequence in before)
        self.steps.append([(p.sequence.session_id, p.tokens, p.draft, p.prefill_to) for p in parts])
        fed = {}
        for part in parts:
            self.first_step.setdefault(part.sequence.session_id, len(self.steps))
            held = self.cache.attach(part.sequence.session_id, part.sequence.tokens)
            until = len(part.sequence.tokens) if part.prefill_to is None else part.prefill_to
            assert until - held <= part.tokens
            if new := part.sequence.tokens[held:until] + [-1] * part.draft:
                fed[part.sequence.session_id] = new
        known = set(self.cache.pool.sessions)
        if fed:
            self.cache.pool.grow({session: len(tokens) for session, tokens in fed.items()})
        assert set(self.cache.pool.sessions) == known, "only the batcher preempts"
        for session, tokens in fed.items():
            self.cache.pool.append(session, tokens)
        outcomes = list(parts)
        if self.settled is not None:
            self.settled.shuffle(outcomes)
        for part in outcomes:
            if part.prefill_to is None:
                self._commit(part)
        self.cache.pool.integrity()
        return parts

    def _commit(self, part: StepPart) -> None:
        sequence = part.sequence
        # Depends on the session and its length only, not on the batch.
        accepted = random.Random(f"{sequence.session_id}/{len(sequence.tokens)}").randint(0, part.draft)
        self.cache.pool.truncate(sequence.session_id, len(sequence.tokens) + accepted)
        sequence.tokens += [-1] * accepted  # the tokens that step() fed
        sequence.tokens.append(len(sequence.tokens) % 7)
        if len(sequence.tokens) >= sequence.limit:
            self.batcher.remove(sequence)

    def run(self, most: int) -> None:
        while self.batcher.running or self.batcher.waiting:
            assert self.step(), "a step always computes something"
            assert len(self.steps) <= most


REQUESTS = st.lists(
    st.tuples(st.integers(1, 400), st.integers(1, 60), st.integers(0, 5), st.booleans()), min_size=1, max_size=12
)
"""Prompt tokens, output tokens, steps after the previous request, and whether it shares a prefix with others."""


def filled(engine: Engine, requests: list[tuple[int, int, int, bool]]) -> None:
    """Run all requests to their end."""
    for number, (prompt, outputs, later, shares) in enumerate(requests):
        for _ in range(later):
            engine.step()
        prompt = min(prompt, engine.blocks * BLOCK - 1)
        base = 1000 if shares else 10_000 * (number + 1)
        engine.add([base + i for i in range(prompt)], outputs)
    engine.run(20_000)


@given(REQUESTS, st.integers(2, 24), st.integers(1, 200), st.integers(1, 8), st.integers(0, 8))
def test_all_sessions_end_in_order_within_memory_and_budget(
    requests: list[tuple[int, int, int, bool]], blocks: int, budget: int, most: int, draft: int
) -> None:
    engine = Engine(blocks, prefill_tokens=budget, max_running=most, draft_length=draft)
    filled(engine, requests)  # the pool raises when a step does not fit
    assert all(len(sequence.tokens) == sequence.limit for sequence in engine.came), "no session starves"
    assert engine.cache.free_tokens == blocks * BLOCK, "all memory is free again"
    starts = [engine.first_step[sequence.session_id] for sequence in engine.came]
    assert starts == sorted(starts), "first come, first served"
    for step in engine.steps:
        assert len({session for session, *_ in step}) == len(step) <= most
        assert sum(tokens for _, tokens, _, to in step if tokens > 1 or to is not None) <= budget
        assert all(drafted <= draft for _, _, drafted, _ in step)


@given(REQUESTS, st.integers(2, 24), st.integers(1, 200), st.integers(0, 8), st.integers(0, 1000))
def test_the_order_of_outcomes_changes_nothing(
    requests: list[tuple[int, int, int, bool]], blocks: int, budget: int, draft: int, seed: int
) -> None:
    straight = Engine(blocks, prefill_tokens=budget, draft_length=draft)
    shuffled = Engine(blocks, prefill_tokens=budget, draft_length=draft, settled=random.Random(seed))
    # Without shared prefixes: which of two equal blocks is kept may depend on the order.
    plain = [(prompt, outputs, later, False) for prompt, outputs, later, _ in requests]
    filled(straight, plain)
    filled(shuffled, plain)
    assert straight.steps == shuffled.steps


@given(REQUESTS, st.integers(3, 24), st.data())
def test_a_removed_session_frees_its_blocks_and_delays_no_other(
    requests: list[tuple[int, int, int, bool]], blocks: int, data: st.DataObject
) -> None:
    engine = Engine(blocks)
    for number, (prompt, outputs, later, _) in enumerate(requests):
        engine.add([10_000 * number + i for i in range(min(prompt, blocks * BLOCK - 1))], outputs)
        for _ in range(later):
            engine.step()
        leaving = data.draw(st.sampled_from(engine.came))
        engine.batcher.remove(leaving)
        assert engine.cache.cached(leaving.session_id) == 0
        assert leaving not in [*engine.batcher.running, *engine.batcher.waiting]
    engine.run(20_000)
    assert engine.cache.free_tokens == blocks * BLOCK


def test_every_running_session_decodes_in_every_step_beside_a_long_prompt() -> None:
    engine = Engine(64, prefill_tokens=32)
    for number in range(3):
        engine.add([1000 * number], 50)
    engine.step()
    long = engine.add(list(range(5000, 5300)), 5)
    parts = engine.step()
    assert [(part.sequence.session_id, part.tokens) for part in parts] == [("s0", 1), ("s1", 1), ("s2", 1), ("s3", 32)]
    assert parts[-1].prefill_to == 32
    for _ in range(9):
        parts = engine.step()
    assert (parts[-1].sequence, parts[-1].tokens, parts[-1].prefill_to) == (long, 300 - 9 * 32, None)
    assert [part.tokens for part in engine.step()] == [1, 1, 1, 1]


def test_a_shared_prefix_is_computed_once() -> None:
    engine = Engine(64, prefill_tokens=1000)
    system = list(range(2 * BLOCK))
    engine.add([*system, 7], 40)
    engine.step()
    engine.add([*system, 8, 9], 40)
    assert engine.step()[-1].tokens == 2


def test_the_newest_session_is_preempted_and_computed_again() -> None:
    engine = Engine(6, prefill_tokens=1000)
    for number in range(3):
        engine.add([1000 * number + i for i in range(BLOCK)], 2 * BLOCK)
    engine.run(2000)
    assert engine.preemptions > 0
    ends = {session: number for number, step in enumerate(engine.steps) for session, *_ in step}
    assert ends["s0"] == ends["s1"] < ends["s2"], "two sessions fit; the third started with them"
    first = [number for number, step in enumerate(engine.steps) if any(session == "s0" for session, *_ in step)]
    assert first == list(range(len(first))), "the oldest session decodes in every step"


def test_a_prompt_starts_when_all_of_it_fits() -> None:
    engine = Engine(8, prefill_tokens=1000)
    engine.add(list(range(6 * BLOCK)), 5)
    engine.step()
    waiting = engine.add(list(range(9000, 9000 + 4 * BLOCK)), 5)
    behind = engine.add([5], 5)
    engine.step()
    assert list(engine.batcher.waiting) == [waiting, behind], "a session that would fit does not overtake"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_messages_cross_the_link_in_pieces_of_any_size(size: int) -> None:
    sent = [Cancel(session=f"s{number}", reason="x" * number) for number in range(20)]
    data = b"".join(map(frame, sent))
    frames = Frames()
    got = [message for at in range(0, len(data), size) for message in frames.feed(data[at : at + size])]
    assert got == sent
