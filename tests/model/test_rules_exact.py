"""Options on logits: drafts, batches, chunks and runs give the tokens of plain decoding, for every option."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import builders
import pytest
import tiny

from services.drafter.control import Controller
from services.drafter.hidden.engine import DraftEngine
from services.drafter.sources import DraftRequest, States
from services.drafter.sources.hidden import HiddenDrafts
from services.drafter.sources.model import ModelDrafts
from services.verifier.core.runs import RunTable
from services.verifier.core.tasks import VerifyTask
from services.verifier.verify import verify
from shared.engine import Engine, Step
from shared.errors import NoTokenAllowed
from shared.messages import Finish, LogitRules, ReasoningBudget, RunGrant, Sampling, TokenBias
from shared.sampling.rules import LogitsProcessor
from shared.sampling.sampler import choose_in_rows

PROMPT = [7, 8, 9, 7, 8, 9, 7, 8]
LENGTH = 24
EOS = 1

OPTIONS: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.3},
    "bias": {"logit_bias": [TokenBias(token=t, bias=b) for t, b in ((5, 6.0), (9, -100.0), (20, 4.0))]},
    "min_p": {"min_p": 0.2},
    "min_tokens": {
        "min_tokens": 12,
        "withheld_ids": [EOS, 30],
        "logit_bias": [TokenBias(token=EOS, bias=12.0), TokenBias(token=30, bias=9.0)],
    },
    "bad_words": {"bad_words": [[5, 6], [40], [8]], "logit_bias": [TokenBias(token=5, bias=5.0)]},
    "allowed": {"allowed_token_ids": list(range(3, 60))},
    "reasoning": {"reasoning": ReasoningBudget(most=5, opening=None, closing=40)},
    "opened reasoning": {
        "reasoning": ReasoningBudget(most=3, opening=5, blank=list(range(100)), closing=9),
        "logit_bias": [TokenBias(token=5, bias=4.0)],
    },
    "all": {
        "presence_penalty": 0.4,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.1,
        "logit_bias": [TokenBias(token=9, bias=3.0)],
        "min_p": 0.05,
        "min_tokens": 4,
        "withheld_ids": [EOS],
        "bad_words": [[9, 9]],
        "allowed_token_ids": list(range(200)),
        "reasoning": ReasoningBudget(most=4, opening=None, closing=11),
    },
}
TEMPERATURES = (0.0, 0.9)


def sampling(option: str, temperature: float, top_k: int = 0) -> Sampling:
    rules = LogitRules(prompt_len=len(PROMPT), **OPTIONS[option])
    return Sampling(temperature=temperature, top_k=top_k, seed=99, rules=rules)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder, budget_tokens=4096, keep_hidden=True)


def plain(engine: Engine, params: Sampling, stop_ids: frozenset[int] = frozenset([EOS])) -> list[int]:
    """Decode token by token; each position's rules are computed anew from all tokens before it."""
    tokens = list(PROMPT)
    engine.attach("plain", tokens)
    while len(tokens) < len(PROMPT) + LENGTH and tokens[-1] not in stop_ids:
        logits = engine.forward([Step("plain", tokens[engine.cached("plain") :], rows=1)]).logits
        row = LogitsProcessor(params, tokens).apply(logits[0].float().numpy())
        tokens += choose_in_rows(row[None], [replace_rules(params)], [len(tokens)])
    engine.release("plain")
    return tokens[len(PROMPT) :]


def replace_rules(params: Sampling) -> Sampling:
    return params.model_copy(update={"rules": None})


def task(name: str, tokens: Sequence[int], draft: Sequence[int], params: Sampling) -> VerifyTask:
    room = len(PROMPT) + LENGTH - len(tokens)
    return VerifyTask(name, list(tokens), list(draft), params, frozenset([EOS]), room=room)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("option", OPTIONS)
def test_drafts_and_batches_change_no_token(engine: Engine, option: str, temperature: float) -> None:
    """Beside sessions with other options, with drafts that are partly right, round by round."""
    params = sampling(option, temperature, top_k=50 if option == "all" else 0)
    expected = plain(engine, params)
    others = [Sampling(temperature=0.9, seed=1), *(sampling(other, 0.9) for other in ("presence", "bias"))]
    chance = random.Random(f"{option}{temperature}")
    tokens, accepted = list(PROMPT), 0
    finish = None
    while finish is None:
        ahead = expected[len(tokens) - len(PROMPT) :]
        right = chance.randrange(5)
        draft = [*ahead[:right], *(chance.randrange(tiny.VOCAB) for _ in range(3))]
        batch = [task(f"o{i}", PROMPT, ahead[:2], other) for i, other in enumerate(others)]
        outcomes, _ = verify(engine, [batch[0], task("s", tokens, draft, params), *batch[1:]])
        verdict = outcomes[1].verdict
        assert verdict is not None
        assert verdict.accepted >= min(right, len(ahead) - 1)
        tokens += verdict.tokens
        accepted += verdict.accepted
        finish = verdict.finish
    for name in ("s", "o0", "o1", "o2"):
        engine.release(name)
    assert tokens[len(PROMPT) :] == expected
    assert accepted > 0
    without = params.model_copy(update={"rules": LogitRules(prompt_len=len(PROMPT))})
    greedy_min_p = option == "min_p" and temperature == 0
    assert (expected == plain(engine, without)) == greedy_min_p, "other options change this text"


@pytest.mark.parametrize("option", OPTIONS)
def test_a_prompt_in_chunks_and_a_run_have_the_same_tokens(engine: Engine, option: str) -> None:
    params = sampling(option, 0.9)
    expected = plain(engine, params)
    verify(engine, [replace(task("s", PROMPT, [], params), prefill_to=4)])
    first = task("s", PROMPT, [], params)
    (outcome,), _ = verify(engine, [first])
    table = RunTable(digests=False)
    run = table.start(builders.job(run=RunGrant(tokens=100, ms=1e6)), first, outcome, 1, 0.0)
    assert outcome.verdict is not None
    if run is None:  # the first token ends this text
        assert outcome.verdict.finish is not None
        assert outcome.verdict.tokens == expected
        return
    while not run.over:
        (outcome,), _ = verify(engine, [run.task])
        table.record(run, outcome, 1.0, 1.0)
    engine.release("s")
    assert run.task.tokens[len(PROMPT) :] == expected
    assert run.finish in (Finish.STOP, Finish.LENGTH)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_model_drafts_what_it_would_choose_itself(
    engine: Engine, folder: Path, option: str, temperature: float
) -> None:
    """With the target as its own draft, all tokens are accepted: drafts have the session's rules."""
    params = sampling(option, temperature)
    expected = plain(engine, params)
    source = ModelDrafts(Engine(folder, budget_tokens=1024))
    round_ = Controller("fixed", LENGTH).session("model").ahead(LENGTH, temperature)
    (draft,) = source.propose([DraftRequest("s", PROMPT, params, round_, ("model",))])
    assert draft.tokens[: len(expected)] == expected[: len(draft.tokens)]
    assert len(draft.tokens) == LENGTH


def test_a_hidden_draft_follows_the_rules(engine: Engine, tmp_path: Path) -> None:
    target = tiny.target(tmp_path / "target")
    small = tiny.hidden_draft(tmp_path / "draft", target, head_ids=range(100))
    source = HiddenDrafts(DraftEngine(small, target, dtype="float32", budget_tokens=1024))
    mine = Engine(target.path, budget_tokens=1024, keep_hidden=True)
    mine.attach("s", PROMPT)
    mine.forward([Step("s", PROMPT, rows=1)])
    states = States(0, mine.hidden("s", 0, len(PROMPT) - 1).float().numpy())

    def drafted(params: Sampling) -> list[int]:
        round_ = Controller("fixed", 6).session("hidden").ahead(6, params.temperature)
        (draft,) = source.propose([DraftRequest("s", PROMPT, params, round_, ("hidden",), states)])
        source.close("s")
        return draft.tokens

    free = drafted(Sampling(temperature=0.9, seed=99))
    assert len(free) == 6
    allowed = sorted(set(range(100)) - set(free))
    only = LogitRules(prompt_len=len(PROMPT), allowed_token_ids=allowed)
    assert set(drafted(Sampling(temperature=0.9, seed=99, rules=only))) <= set(allowed)
    outside = LogitRules(prompt_len=len(PROMPT), allowed_token_ids=[400])
    assert len(drafted(Sampling(temperature=0.9, seed=99, rules=outside))) == 6, "not one that the target can accept"


def test_a_session_without_an_allowed_token_fails_alone(engine: Engine) -> None:
    rules = LogitRules(prompt_len=len(PROMPT), allowed_token_ids=[5], bad_words=[[5]])
    bad = task("bad", PROMPT, [5, 6], Sampling(rules=rules))
    good = [task(name, PROMPT, [], Sampling()) for name in ("first", "second", "third")]
    (refused, *served), shapes = verify(engine, [bad, *good])
    assert isinstance(refused.error, NoTokenAllowed)
    assert len({tuple(outcome.verdict.tokens) for outcome in served if outcome.verdict is not None}) == 1
    assert all(outcome.verdict is not None for outcome in served)
    assert len(shapes) == 1, "the others are computed once"
    assert shapes[0].rows == 6
    assert engine.cached("bad") == 0
    for one in good:
        engine.release(one.session_id)


def test_rules_behind_the_end_of_a_text_do_not_fail_it(engine: Engine) -> None:
    """Once the text ends within a draft, nothing more is chosen."""
    rules = LogitRules(prompt_len=len(PROMPT), allowed_token_ids=[EOS], bad_words=[[EOS, EOS]])
    (outcome,), _ = verify(engine, [task("s", PROMPT, [EOS, EOS], Sampling(rules=rules))])
    assert outcome.verdict is not None
    assert (outcome.verdict.tokens, outcome.verdict.finish) == ([EOS], Finish.STOP)
    engine.release("s")
