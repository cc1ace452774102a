"""The verifier returns the target's hidden states bit for bit, whatever happened to the session before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from services.verifier.verify import verify
from shared.engine import Engine, Step
from shared.messages import Finish, HiddenFormat, Sampling
from shared.models.hidden_states import Bits

SAMPLING = Sampling(temperature=1.0, seed=5)
PROMPT = [(37 * i + 11) % tiny.VOCAB for i in range(150)]


@pytest.fixture(scope="module", params=["tiny", pytest.param("default target", marks=pytest.mark.big_model)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "tiny":
        return tiny.make(tmp_path_factory.mktemp("tiny"))
    target: Path = request.getfixturevalue("target_folder")
    return target


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    engine = Engine(folder, budget_tokens=640, keep_hidden=True)
    assert engine.batch_invariant
    return engine


@pytest.fixture(autouse=True)
def _empty_cache(engine: Engine) -> None:
    engine.integrity()
    for session in engine.sessions:
        engine.release(session)


def task(session: str, tokens: Sequence[int], draft: Sequence[int] = (), hidden_from: int | None = 0) -> VerifyTask:
    return VerifyTask(session, list(tokens), list(draft), SAMPLING, frozenset(), room=100, hidden_from=hidden_from)


def rows(outcome: VerifyOutcome) -> Bits:
    """Bits of the hidden states in an outcome."""
    size = outcome.hidden[0].size
    return np.concatenate([np.frombuffer(part.rows, np.uint16).reshape(-1, size) for part in outcome.hidden])


def one(engine: Engine, asked: VerifyTask) -> VerifyOutcome:
    ((outcome,), _) = verify(engine, [asked])
    assert outcome.verdict is not None
    return outcome


def wrong(token: int) -> int:
    return (token + 1) % tiny.VOCAB


@pytest.fixture(scope="module")
def text(folder: Path) -> list[int]:
    """The prompt and the target's continuation."""
    engine = Engine(folder, budget_tokens=256)
    tokens = list(PROMPT)
    while len(tokens) < 180:
        verdict = one(engine, task("s", tokens, hidden_from=None)).verdict
        assert verdict is not None
        tokens += verdict.tokens
    return tokens


@pytest.fixture(scope="module")
def truth(folder: Path, text: list[int]) -> Bits:
    """Rows of a fresh prefill of that text, in an engine of its own."""
    engine = Engine(folder, budget_tokens=256, keep_hidden=True)
    engine.attach("fresh", [])
    engine.forward([Step("fresh", text, 0)])
    return engine.hidden("fresh", 0, len(text)).view(torch.uint16).numpy()


def test_after_accepted_and_rejected_drafts(engine: Engine, text: list[int], truth: Bits) -> None:
    outcome = one(engine, task("s", text[:150], [*text[150:152], wrong(text[152]), 7]))
    assert outcome.verdict is not None
    assert outcome.verdict.accepted == 2
    assert np.array_equal(rows(outcome), truth[:152]), "prompt and accepted draft tokens only"
    outcome = one(engine, task("s", text[:153], text[153:157], hidden_from=152))
    assert outcome.hidden[0].start == 152
    assert np.array_equal(rows(outcome), truth[152:157])
    outcome = one(engine, task("s", text[:158], [wrong(text[158])], hidden_from=157))
    assert np.array_equal(rows(outcome), truth[157:158])
    outcome = one(engine, task("s", text[:159], hidden_from=3))
    assert np.array_equal(rows(outcome), truth[3:159]), "a drafter that lost its rows asks for all again"


def test_a_copy_of_a_round_returns_the_same_rows(engine: Engine, text: list[int], truth: Bits) -> None:
    for _ in range(2):
        outcome = one(engine, task("s", text[:150], text[150:153], hidden_from=120))
        assert np.array_equal(rows(outcome), truth[120:153])


def test_a_prompt_in_chunks_returns_all_rows_at_the_end(engine: Engine, text: list[int], truth: Bits) -> None:
    for stop in (40, 100):
        ((chunk,), _) = verify(engine, [replace(task("s", text[:150]), prefill_to=stop)])
        assert not chunk.hidden
    assert np.array_equal(rows(one(engine, task("s", text[:150]))), truth[:150])


def test_on_a_shared_prefix_of_a_session_that_did_not_ask(engine: Engine, text: list[int], truth: Bits) -> None:
    quiet = one(engine, task("quiet", text[:150], text[150:152], hidden_from=None))
    assert not quiet.hidden
    one(engine, task("quiet", text[:153], hidden_from=None))
    outcome = one(engine, task("s", text[:150], text[150:152]))
    assert outcome.new_tokens < 30, "the prefix was shared"
    assert np.array_equal(rows(outcome), truth[:152])


def test_after_eviction_and_prefill_again(engine: Engine, text: list[int], truth: Bits) -> None:
    one(engine, task("s", text[:150]))
    for i in range(4):  # use the whole budget
        engine.attach(f"filler-{i}", [i])
        engine.forward([Step(f"filler-{i}", [i, *PROMPT[1:]], 0)])
    assert engine.cached("s") == 0
    outcome = one(engine, task("s", text[:151], text[151:153], hidden_from=0))
    assert np.array_equal(rows(outcome), truth[:153])


def test_in_a_mixed_batch(engine: Engine, text: list[int], truth: Bits) -> None:
    one(engine, task("old", text[:150], hidden_from=None))
    tasks = [
        task("new", text[:64]),
        task("old", text[:151], [text[151], wrong(text[152])], hidden_from=140),
        task("quiet", text[:30], hidden_from=None),
        replace(task("chunk", PROMPT[::-1]), prefill_to=20),
        replace(task("int8", text[:20]), hidden_format=HiddenFormat.INT8),
    ]
    (new, old, quiet, chunk, small), _ = verify(engine, tasks)
    assert np.array_equal(rows(new), truth[:64])
    assert np.array_equal(rows(old), truth[140:152])
    assert not quiet.hidden
    assert not chunk.hidden
    assert len(small.hidden[0].rows) == 20 * engine.hidden_size
    assert len(small.hidden[0].scales) == 20 * 4


@pytest.mark.parametrize("position", [150, 151, 10**6, 2**63, 2**64 - 1])
def test_rows_beyond_the_session_are_not_returned(engine: Engine, text: list[int], position: int) -> None:
    outcome = one(engine, task("s", text[:150], hidden_from=position))
    assert not outcome.hidden
    assert outcome.error is None


def test_a_session_that_ended_returns_no_rows(engine: Engine, text: list[int]) -> None:
    outcome = one(engine, replace(task("s", text[:150], text[150:153]), room=2))
    assert outcome.verdict is not None
    assert outcome.verdict.finish is Finish.LENGTH
    assert not outcome.hidden


def test_an_engine_without_hidden_states_still_verifies(folder: Path, text: list[int]) -> None:
    outcome = one(Engine(folder, budget_tokens=256), task("s", text[:150], text[150:152]))
    assert outcome.verdict is not None
    assert outcome.verdict.accepted == 2
    assert not outcome.hidden


def test_a_float32_target_returns_bfloat16(tmp_path: Path) -> None:
    engine = Engine(tiny.make(tmp_path), dtype="float32", budget_tokens=256, keep_hidden=True)
    outcome = one(engine, task("s", PROMPT))
    assert np.array_equal(rows(outcome), engine.hidden("s", 0, 150).bfloat16().view(torch.uint16).numpy())
