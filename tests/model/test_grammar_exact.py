"""Grammars in the verifier: drafts, batches, runs and forced tokens change no token, and answers parse."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import builders
import pytest

from services.drafter.control import Controller
from services.drafter.sources import DraftRequest, LookupDrafts
from services.drafter.sources.model import ModelDrafts
from services.tools.bench.support.tiny import EOS, tiny_model
from services.verifier.core.runs import RunTable
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from services.verifier.verify import verify
from shared.engine import Engine, Step
from shared.errors import GrammarError
from shared.grammar import build
from shared.grammar.masks import Grammars
from shared.grammar.token_masks import DraftGrammar
from shared.messages import Finish, Grammar, LogitRules, RunGrant, Sampling, TokenBias
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.sampling.sampler import choose_in_rows

LENGTH = 200
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "colours"],
}
GRAMMARS = {
    "schema": build.json_schema(SCHEMA),
    "choice": build.choice(["one of these", "one of those", "another"]),
    "regex": build.regex(r"[a-f]{2,6}-(x|yz){1,9}!"),
}
CASES = [(name, temperature) for name in GRAMMARS for temperature in (0.0, 1.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("target") / "tiny")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder, budget_tokens=8192)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(ModelFolder(folder))


@pytest.fixture
def grammars(folder: Path) -> Grammars:
    return Grammars.of(ModelFolder(folder))


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("Tell me about Ada.")


def sampling(prompt: Sequence[int], name: str, temperature: float, seed: int = 7, **rules: Any) -> Sampling:
    return Sampling(
        temperature=temperature,
        seed=seed,
        grammar=Grammar(text=GRAMMARS[name], prompt_len=len(prompt)),
        rules=LogitRules(prompt_len=len(prompt), **rules) if rules else None,
    )


def plain(engine: Engine, folder: Path, prompt: Sequence[int], params: Sampling) -> list[int]:
    """Decode token by token, each mask computed by a new state; no chains, no forced tokens."""
    assert params.grammar is not None
    tokens = list(prompt)
    free = params.model_copy(update={"grammar": None})
    engine.attach("plain", tokens)
    grammars = Grammars.of(ModelFolder(folder))
    while len(tokens) < len(prompt) + LENGTH and tokens[-1] != EOS:
        logits = engine.forward([Step("plain", tokens[engine.cached("plain") :], rows=1)]).logits[0].float().numpy()
        logits = logits.copy()
        grammars.session("plain", params.grammar).after(tokens[len(prompt) :]).apply(logits, None)
        grammars.forget("plain")
        tokens += choose_in_rows(logits[None], [free], [len(tokens)])
    engine.release("plain")
    return tokens[len(prompt) :]


def task(name: str, prompt: Sequence[int], tokens: Sequence[int], draft: Sequence[int], params: Sampling) -> VerifyTask:
    room = len(prompt) + LENGTH - len(tokens)
    return VerifyTask(name, list(tokens), list(draft), params, frozenset([EOS]), room=room)


def round_of(engine: Engine, grammars: Grammars, *tasks: VerifyTask, most_forced: int = 64) -> list[VerifyOutcome]:
    return verify(engine, tasks, grammars=grammars, most_forced=most_forced)[0]


def assert_in_grammar(text: str, name: str) -> None:
    if name == "schema":
        value = json.loads(text)
        assert list(value) == list(SCHEMA["properties"])
        assert len(value["name"]) <= 8
        assert 0 <= value["age"] <= 150
        assert set(value["colours"]) <= {"red", "green", "blue"}
    elif name == "choice":
        assert text in ("one of these", "one of those", "another")
    else:
        assert text.endswith("!")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", GRAMMARS)
def test_answers_of_a_random_model_are_in_the_grammar(
    engine: Engine, grammars: Grammars, tokenizer: Tokenizer, prompt: list[int], name: str, seed: int
) -> None:
    params = sampling(prompt, name, 1.0, seed)
    tokens, finish = list(prompt), None
    while finish is None:
        (outcome,) = round_of(engine, grammars, task(f"{name}{seed}", prompt, tokens, [], params))
        assert outcome.verdict is not None, outcome.error
        tokens += outcome.verdict.tokens
        finish = outcome.verdict.finish
    engine.release(f"{name}{seed}")
    assert finish is Finish.STOP
    assert_in_grammar(tokenizer.decode(tokens[len(prompt) :]), name)


@pytest.mark.parametrize(("name", "temperature"), CASES)
def test_drafts_batches_and_a_lost_state_change_no_token(
    engine: Engine, folder: Path, grammars: Grammars, prompt: list[int], name: str, temperature: float
) -> None:
    """Round by round beside other sessions, with drafts that are partly right; the state dies now and then."""
    params = sampling(prompt, name, temperature)
    expected = plain(engine, folder, prompt, params)
    assert expected[-1] == EOS
    others = [Sampling(temperature=0.9, seed=1), sampling(prompt, "schema", 0.9), sampling(prompt, "choice", 0.0)]
    chance = random.Random(f"{name}{temperature}")
    tokens, accepted, finish = list(prompt), 0, None
    while finish is None:
        ahead = expected[len(tokens) - len(prompt) :]
        right = chance.randrange(4)
        draft = [*ahead[:right], *(chance.randrange(3, 259) for _ in range(2))]
        beside = [task(f"o{i}", prompt, prompt, ahead[:2], other) for i, other in enumerate(others)]
        if chance.random() < 0.3:
            grammars = Grammars.of(ModelFolder(folder))
            engine.release("s")
        mine = task("s", prompt, tokens, draft, params)
        outcome = round_of(engine, grammars, beside[0], mine, *beside[1:], most_forced=chance.choice([0, 3, 64]))[1]
        verdict = outcome.verdict
        assert verdict is not None, outcome.error
        assert min(right, len(ahead)) <= verdict.accepted <= outcome.verified <= len(draft)
        accepted += verdict.accepted
        tokens += verdict.tokens
        finish = verdict.finish
    assert tokens[len(prompt) :] == expected
    assert accepted
    for session_id in ("s", "o0", "o1", "o2"):
        engine.release(session_id)


@pytest.mark.parametrize(("name", "temperature"), CASES)
def test_runs_have_the_same_tokens_in_fewer_steps(
    engine: Engine, folder: Path, grammars: Grammars, prompt: list[int], name: str, temperature: float
) -> None:
    params = sampling(prompt, name, temperature)
    expected = plain(engine, folder, prompt, params)
    first = task("run", prompt, prompt, [], params)
    (outcome,) = round_of(engine, grammars, first)
    table = RunTable(digests=False)
    run = table.start(builders.job(run=RunGrant(tokens=1000, ms=1e6)), first, outcome, 1, 0.0)
    assert run is not None
    steps = 1
    while not run.over:
        (outcome,) = round_of(engine, grammars, run.task)
        table.record(run, outcome, 1.0, 1.0)
        steps += 1
    engine.release("run")
    assert run.task.tokens[len(prompt) :] == expected
    assert run.finish is Finish.STOP
    assert steps < 0.8 * len(expected)


def test_forced_tokens_need_no_rounds(engine: Engine, folder: Path, grammars: Grammars, prompt: list[int]) -> None:
    """Of JSON with fixed keys, rounds without drafts bring the free tokens only."""
    counts = {}
    for most_forced in (0, 64):
        tokens, rounds, finish = list(prompt), 0, None
        params = sampling(prompt, "schema", 1.0)
        while finish is None:
            now = task(f"f{most_forced}", prompt, tokens, [], params)
            (outcome,) = round_of(engine, grammars, now, most_forced=most_forced)
            assert outcome.verdict is not None
            assert outcome.verdict.accepted == outcome.verified == 0, "forced tokens are no drafts"
            tokens += outcome.verdict.tokens
            finish = outcome.verdict.finish
            rounds += 1
        counts[most_forced] = rounds, tokens
        engine.release(f"f{most_forced}")
    assert counts[0][1] == counts[64][1]
    assert counts[0][0] == len(counts[0][1]) - len(prompt)
    assert counts[64][0] < 0.6 * counts[0][0]


def test_rules_apply_within_the_grammar(
    engine: Engine, grammars: Grammars, tokenizer: Tokenizer, prompt: list[int]
) -> None:
    (o,) = tokenizer.encode("o")
    (a,) = tokenizer.encode("a")
    for rules, text in (
        ({"logit_bias": [TokenBias(token=a, bias=100.0)]}, "another"),
        ({"bad_words": [[a]]}, "one of th"),
        ({"logit_bias": [TokenBias(token=o, bias=100.0), TokenBias(token=5, bias=100.0)]}, "one of th"),
    ):
        params = sampling(prompt, "choice", 0.0, **rules)
        tokens, finish = list(prompt), None
        while finish is None:
            (outcome,) = round_of(engine, grammars, task("r", prompt, tokens, [], params))
            assert outcome.verdict is not None, outcome.error
            tokens += outcome.verdict.tokens
            finish = outcome.verdict.finish
        engine.release("r")
        answer = tokenizer.decode(tokens[len(prompt) :])
        assert answer.startswith(text)
        assert_in_grammar(answer, "choice")


def test_digests_cover_the_choices_that_logits_decide(
    engine: Engine, folder: Path, grammars: Grammars, prompt: list[int]
) -> None:
    """A replay verifies the tokens of a run as one draft and has to find the same digest."""
    params = sampling(prompt, "schema", 1.0)
    expected = plain(engine, folder, prompt, params)
    first = task("live", prompt, prompt, [], params)
    ((outcome,), _) = verify(engine, [first], digests=True, grammars=grammars)
    table = RunTable(digests=True)
    run = table.start(builders.job(run=RunGrant(tokens=1000, ms=1e6)), first, outcome, 1, 0.0)
    assert run is not None
    run.confirmed = True
    start = run.length
    while not run.over:
        ((outcome,), _) = verify(engine, [run.task], digests=True, grammars=grammars)
        table.record(run, outcome, 1.0, 1.0)
    (report,) = table.due(0.0, between_steps=False)
    engine.release("live")
    replayed = task("replay", prompt, [*prompt, *expected[: start - len(prompt)]], run.task.tokens[start:-1], params)
    ((outcome,), _) = verify(engine, [replayed], digests=True, grammars=grammars)
    engine.release("replay")
    assert outcome.verdict is not None
    assert outcome.verdict.tokens == run.task.tokens[start:]
    assert outcome.logits_digest == report.logits_digest


def test_a_session_whose_tokens_left_its_grammar_fails_alone(
    engine: Engine, grammars: Grammars, prompt: list[int]
) -> None:
    bad = task("bad", prompt, [*prompt, 200], [], sampling(prompt, "schema", 0.0))
    good = task("good", prompt, prompt, [], sampling(prompt, "schema", 0.0))
    refused, served = round_of(engine, grammars, bad, good)
    assert isinstance(refused.error, GrammarError)
    assert served.verdict is not None
    engine.release("good")


def test_a_full_cache_is_no_reason_to_refuse_forced_tokens(folder: Path, grammars: Grammars, prompt: list[int]) -> None:
    """They are no part of what was planned: without room for them they are chosen one by one."""
    small = Engine(folder, budget_tokens=64)
    prompt = prompt[:1] * 60
    params = sampling(prompt, "schema", 0.0)
    (outcome,) = round_of(small, grammars, task("s", prompt, prompt, [], params))
    assert outcome.verdict is not None, outcome.error
    assert len(outcome.verdict.tokens) >= 1


def test_sessions_without_a_grammar_have_their_drafts_verified(
    engine: Engine, grammars: Grammars, prompt: list[int]
) -> None:
    free = Sampling(temperature=0.7, seed=3)
    (alone,) = round_of(engine, grammars, task("a", prompt, prompt, [], free))
    engine.release("a")
    assert alone.verdict is not None
    (right,) = alone.verdict.tokens
    bound = task("g", prompt, prompt, [], sampling(prompt, "schema", 0.7))
    draft = [right, (right + 1) % 250, 9]
    _, beside = round_of(engine, grammars, bound, task("b", prompt, prompt, draft, free))
    assert beside.verdict is not None
    assert (beside.verdict.tokens[0], beside.verified) == (right, 3)
    assert beside.verdict.accepted <= 2
    assert len(beside.verdict.tokens) == beside.verdict.accepted + 1
    (again,) = round_of(engine, grammars, task("c", prompt, [*prompt, right], [], free))
    assert again.verdict is not None
    assert beside.verdict.tokens[1] == again.verdict.tokens[0]
    for session_id in ("g", "b", "c"):
        engine.release(session_id)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", GRAMMARS)
def test_a_model_drafts_what_it_would_choose_itself(
    engine: Engine, folder: Path, grammars: Grammars, prompt: list[int], name: str, temperature: float
) -> None:
    """With the target as its own draft, every token of the answer is drafted: drafts have the session's masks."""
    params = sampling(prompt, name, temperature)
    assert params.grammar is not None
    expected = plain(engine, folder, prompt, params)
    source = ModelDrafts(Engine(folder, budget_tokens=1024))
    round_ = Controller("fixed", len(expected)).session("model").ahead(len(expected), temperature)
    masks = DraftGrammar(grammars.session("draft", params.grammar), len(prompt))
    (draft,) = source.propose([DraftRequest("s", prompt, params, round_, ("model",), grammar=masks)])
    assert draft.tokens == expected


def test_copies_end_where_the_grammar_does_not_allow_them(grammars: Grammars, tokenizer: Tokenizer) -> None:
    text = tokenizer.encode('{"name": "Ada", "age": 200} {"na')
    params = sampling(text[:-4], "schema", 0.0)
    assert params.grammar is not None
    drafts = {}
    for masks in (None, DraftGrammar(grammars.session("copy", params.grammar), len(text) - 4)):
        round_ = Controller("fixed", 40).session("lookup").ahead(40, 0.0)
        request = DraftRequest("s", text, params, round_, ("lookup",), grammar=masks)
        drafts[masks is None] = tokenizer.decode(LookupDrafts().propose([request])[0].tokens)
    assert drafts[True].startswith('me": "Ada", "age": 200} {"name')
    assert drafts[False] == 'me": "Ada", "age": 20', "200 is over the schema's maximum"
