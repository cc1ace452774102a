"""A KV cache whose accounting is wrong is dropped as a whole, and sessions go on with the right completion."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import tiny

from services.verifier import metrics
from services.verifier.core.tasks import VerifyTask
from services.verifier.engine_thread import EngineThread
from services.verifier.sessions import SessionTable
from services.verifier.verify import verify
from shared.engine import Engine
from shared.grammar.masks import Grammars
from shared.messages import Sampling
from shared.state.store import Store

PROMPT = [(37 * i + 11) % tiny.VOCAB for i in range(150)]


def errors() -> float:
    value: float = metrics.INTEGRITY_ERRORS._value.get()
    return value


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tiny.make(tmp_path), budget_tokens=640)


@pytest.fixture
def sessions(engine: Engine) -> SessionTable:
    """A table that needs no store: nothing is recalled or swept."""
    return SessionTable(cast("Store", None), EngineThread(engine, ThreadPoolExecutor(1)))


async def test_a_released_session_leaves_no_state_in_its_grammar(engine: Engine) -> None:
    class Forgotten:
        def __init__(self) -> None:
            self.sessions: list[str] = []

        def forget(self, session_id: str) -> None:
            self.sessions.append(session_id)

    forgotten = Forgotten()
    sessions = SessionTable(
        cast("Store", None), EngineThread(engine, ThreadPoolExecutor(1)), cast("Grammars", forgotten)
    )
    decode(engine, "a", PROMPT)
    sessions.update_cached(["a"])
    await sessions.release(["a", "unknown here"])
    assert (forgotten.sessions, sessions.cached) == (["a", "unknown here"], {})


def decode(engine: Engine, session_id: str, tokens: list[int]) -> tuple[list[int], int]:
    """Return the next token of a session and the tokens that were computed for it."""
    task = VerifyTask(session_id, tokens, [], Sampling(), frozenset(), room=10)
    ((outcome,), _) = verify(engine, [task])
    assert outcome.verdict is not None, outcome.error
    return outcome.verdict.tokens, outcome.new_tokens


def forget_a_user(pool: Any) -> None:
    pool._users[pool._sessions["a"].blocks[0]] = 0


def free_a_used_block(pool: Any) -> None:
    pool._free.append(pool._sessions["a"].blocks[-1])


def lose_a_block(pool: Any) -> None:
    pool._sessions["a"].blocks.pop()


def hold_a_block_outside_the_pool(pool: Any) -> None:
    pool._sessions["a"].blocks[-1] = pool.capacity


@pytest.mark.parametrize("corrupt", [forget_a_user, free_a_used_block, lose_a_block, hold_a_block_outside_the_pool])
async def test_a_cache_with_wrong_accounting_is_dropped(engine: Engine, sessions: SessionTable, corrupt: Any) -> None:
    before = errors()
    first, _ = decode(engine, "a", PROMPT)
    decode(engine, "b", PROMPT[:100])
    sessions.update_cached(["a", "b"])
    assert sessions.cached == {"a": 150, "b": 100}
    corrupt(engine._pool)
    await sessions.check_integrity()
    assert errors() == before + 1
    assert (sessions.cached, engine.sessions, engine.free_tokens) == ({}, [], engine.budget_tokens)
    engine.integrity()
    again, computed = decode(engine, "a", PROMPT)
    assert (again, computed) == (first, len(PROMPT)), "the whole prompt is computed again"


async def test_a_cache_with_right_accounting_stays(engine: Engine, sessions: SessionTable) -> None:
    before = errors()
    decode(engine, "a", PROMPT)
    sessions.update_cached(["a"])
    await sessions.check_integrity()
    assert (errors(), sessions.cached) == (before, {"a": 150})
    assert decode(engine, "a", PROMPT)[1] == 1
