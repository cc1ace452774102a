"""Log-probabilities are the target's own, with the same bits in any batch, with drafts, in runs and of cached KV."""

from __future__ import annotations

import builders
import pytest
import tiny
import torch

from services.verifier.core.runs import RunTable
from services.verifier.core.tasks import VerifyTask
from services.verifier.verify import PROMPT_ROWS, verify
from shared.engine import Engine, Step
from shared.messages import LogitRules, Logprobs, RunGrant, Sampling
from shared.messages.logprobs import TokenLogprob, pack_logprobs, unpack_logprobs

PROMPT = [5 + i * 7 % 300 for i in range(PROMPT_ROWS + 40)]
TOP = 3
SAMPLING = Sampling(
    temperature=0.9,
    seed=3,
    rules=LogitRules(prompt_len=len(PROMPT), presence_penalty=1.0),
    logprobs=Logprobs(top=TOP, prompt_len=len(PROMPT)),
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny.make(tmp_path_factory.mktemp("target")), budget_tokens=4096)


def task(name: str, tokens: list[int], draft: list[int], sampling: Sampling = SAMPLING) -> VerifyTask:
    return VerifyTask(name, list(tokens), draft, sampling, frozenset([1]), room=20)


def by_torch(engine: Engine, tokens: list[int]) -> list[TokenLogprob]:
    """Of all tokens but the first, one pass over the whole text; the options of sampling change nothing."""
    engine.attach("reference", tokens)
    engine.truncate("reference", 0)
    logits = engine.forward([Step("reference", tokens, rows=len(tokens))]).logits.double()
    engine.release("reference")
    found = []
    for row, token in zip(torch.log_softmax(logits, -1), tokens[1:], strict=False):
        best = row.topk(TOP)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found.append(TokenLogprob(float(row[token]), 1 + int((row > row[token]).sum()), tuple(pairs)))
    return found


def close(found: list[TokenLogprob], expected: list[TokenLogprob]) -> bool:
    return [(one.rank, [token for token, _ in one.top]) for one in found] == [
        (one.rank, [token for token, _ in one.top]) for one in expected
    ] and [value for one in found for value in (one.logprob, *(v for _, v in one.top))] == pytest.approx(
        [value for one in expected for value in (one.logprob, *(v for _, v in one.top))], abs=1e-5
    )


def test_a_first_verdict_brings_those_of_the_prompt(engine: Engine) -> None:
    (outcome,), shapes = verify(engine, [task("s", PROMPT, [])])
    assert outcome.verdict is not None
    assert outcome.logprobs_from == 1
    records = unpack_logprobs(outcome.logprobs, TOP)
    text = [*PROMPT, *outcome.verdict.tokens]
    assert len(records) == len(text) - 1
    assert close(records, by_torch(engine, text))
    assert outcome.new_tokens == len(PROMPT)
    assert sum(shape.new_tokens for shape in shapes) == len(PROMPT)
    engine.integrity()
    (again,), _ = verify(engine, [task("other", PROMPT, [])])
    assert again.logprobs == outcome.logprobs, "although the prompt's KV was cached"
    (chunk,), _ = verify(engine, [VerifyTask("third", PROMPT, [], SAMPLING, frozenset(), room=9, prefill_to=50)])
    assert chunk.logprobs == b""
    (third,), _ = verify(engine, [task("third", PROMPT, [])])
    assert third.logprobs == outcome.logprobs, "although it was computed in chunks before"
    for name in ("s", "other", "third"):
        engine.release(name)


def test_drafts_batches_and_runs_give_the_same_bits(engine: Engine) -> None:
    tokens, plain = list(PROMPT), b""
    for _ in range(10):
        (outcome,), _ = verify(engine, [task("s", tokens, [])])
        assert outcome.verdict is not None
        plain += outcome.logprobs
        tokens += outcome.verdict.tokens
    engine.release("s")
    output = tokens[len(PROMPT) :]

    drafted, at = b"", len(PROMPT)
    while at < len(tokens):
        draft = [*tokens[at : min(at + 3, len(tokens) - 1)], 7, 7]
        others = [task("o1", PROMPT[:9], [1, 2]), task("o2", PROMPT[:30], [], Sampling())]
        outcomes, _ = verify(engine, [others[0], task("s", tokens[:at], draft), others[1]])
        verdict = outcomes[1].verdict
        assert verdict is not None
        drafted += outcomes[1].logprobs
        at += len(verdict.tokens)
        assert outcomes[2].logprobs == b""
    engine.release("s")
    assert drafted[: len(plain)] == plain
    assert len(unpack_logprobs(plain, TOP)) == len(tokens) - 1

    first = task("s", PROMPT, [])
    (outcome,), _ = verify(engine, [first])
    table = RunTable(digests=False)
    run = table.start(builders.job(run=RunGrant(tokens=9, ms=1e9)), first, outcome, 1, 0.0)
    assert run is not None
    run.confirmed = True
    in_run = outcome.logprobs
    while not run.over:
        (step,), _ = verify(engine, [run.task])
        table.record(run, step, 1.0, 1.0)
        if run.over or len(run.unreported) == 4:
            in_run += b"".join(report.commit.logprobs for report in table.due(1e6, between_steps=True))
            run.reporting = False
    engine.release("s")
    assert run.task.tokens[len(PROMPT) :] == output
    assert in_run == plain


def test_sessions_that_ask_for_none_get_none(engine: Engine) -> None:
    outcomes, shapes = verify(engine, [task("s", PROMPT[:20], [3], Sampling(temperature=0.9, seed=3))])
    assert (outcomes[0].logprobs, len(shapes)) == (b"", 1)
    engine.release("s")


def test_records_are_packed_by_position(engine: Engine) -> None:
    wanted = Sampling(logprobs=Logprobs(top=1))
    (outcome,), _ = verify(engine, [task("s", PROMPT[:20], [], wanted)])
    assert outcome.verdict is not None
    assert outcome.logprobs_from == 20
    (record,) = unpack_logprobs(outcome.logprobs, 1)
    assert record.top == ((outcome.verdict.tokens[0], record.logprob),), "greedy"
    assert pack_logprobs([record]) == outcome.logprobs
    engine.release("s")
