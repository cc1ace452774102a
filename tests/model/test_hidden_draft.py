"""Drafts by hidden states, alone and with copies: their tokens, their sessions, missing states, and prepared drafts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from services.drafter.control import Controller, DraftRound, DraftToken
from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.engine import DraftEngine, DraftStep
from services.drafter.hidden.forward import Floats
from services.drafter.sources import AheadRequest, Draft, DraftRequest, PreparedDraft, States, hidden
from services.drafter.sources.hidden import HiddenDrafts
from services.drafter.sources.model import _statistics_on_device
from services.drafter.sources.statistics import row_statistics
from services.verifier.core.tasks import VerifyTask
from services.verifier.verify import verify
from shared.engine import Engine, Step
from shared.messages import Sampling
from shared.models.bfloat16 import to_floats
from shared.models.folder import ModelFolder
from shared.sampling.sampler import choose

GREEDY = Sampling()
SAMPLINGS = [
    GREEDY,
    Sampling(temperature=1.0, seed=11),
    Sampling(temperature=1.0, seed=12),
    Sampling(temperature=0.7, top_k=20, seed=-13),
    Sampling(temperature=1.3, top_p=0.8, seed=14),
]
ALONE, COMBINED = ("hidden",), ("hidden", "lookup")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return tiny.target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def folder(target: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> HiddenDraftFolder:
    return tiny.hidden_draft(tmp_path_factory.mktemp("draft"), target)


@pytest.fixture
def fresh(folder: HiddenDraftFolder, target: ModelFolder) -> Callable[..., HiddenDrafts]:
    """Makes independent sources."""

    def make(budget_tokens: int = 2048, window: int = 1000) -> HiddenDrafts:
        return HiddenDrafts(DraftEngine(folder, target, dtype="float32", budget_tokens=budget_tokens), window)

    return make


def tokens_of(name: str, count: int) -> list[int]:
    random = np.random.default_rng(list(name.encode()))
    return random.integers(tiny.VOCAB, size=count).tolist()  # type: ignore[no-any-return]


def states_of(name: str, start: int, stop: int) -> States | None:
    """Return random states of a session's positions, the same at every call."""
    rows = np.random.default_rng([7, *name.encode()]).standard_normal((500, 64), np.float32)
    return States(start, rows[start:stop]) if stop > start else None


def round_of(length: int, names: Sequence[str] = ALONE) -> DraftRound:
    return Controller("fixed", 64).session(*names).ahead(length, temperature=0.0)


def request(
    name: str,
    tokens: Sequence[int],
    length: int = 4,
    *,
    known: int = 0,
    names: tuple[str, ...] = ALONE,
    sampling: Sampling = GREEDY,
) -> DraftRequest:
    """known: number of tokens whose states the source has already read."""
    states = states_of(name, max(0, known - 1), len(tokens) - 1)
    return DraftRequest(name, tokens, sampling, round_of(length, names), names, states)


def seen(source: HiddenDrafts, name: str) -> int:
    """Return how many of a session's tokens are computed and held."""
    session = source._sessions.get(name)
    return 0 if session is None else source._seen(name, session)


def one(source: HiddenDrafts, request_: DraftRequest) -> list[int]:
    return source.propose([request_])[0].tokens


def prepared(
    source: HiddenDrafts, asked: DraftRequest, made: Draft, length: int = 2, most: int = 64
) -> dict[tuple[int, ...], list[int]]:
    """Return the drafts prepared during a round, by the tokens that it brings."""
    request_ = AheadRequest(asked, made, lambda _: round_of(length, asked.sources), most)
    (found,) = source.ahead([request_])
    return {tuple(draft.tokens): draft.draft.tokens for draft in found}


def by_hand(source: HiddenDrafts, tokens: Sequence[int], assumed: Sequence[int], length: int) -> list[int]:
    """Return a greedy draft after tokens whose states are known, and then some whose states are estimated."""
    engine = source._engine
    states = states_of("a", 0, len(tokens) - 1)
    assert states is not None
    before = np.concatenate([np.zeros((1, 64), np.float32), states.rows])
    engine.open("by hand")
    estimate = engine.forward([DraftStep("by hand", tokens, before)])
    drafted: list[int] = []
    for token in assumed:
        estimate = engine.forward([DraftStep("by hand", [token], estimate)])
    while len(drafted) < length:
        drafted.append(int(engine.head_ids[engine.logits(estimate).argmax()]))
        estimate = engine.forward([DraftStep("by hand", drafted[-1:], estimate)])
    return drafted


def force(source: HiddenDrafts, monkeypatch: pytest.MonkeyPatch, token: int | None) -> None:
    """Make the model certain of a token, or uncertain of all."""

    def logits(estimates: Floats) -> Floats:
        found = np.zeros((len(estimates), tiny.VOCAB), np.float32)
        if token is not None:
            found[:, token] = 50.0
        return found

    monkeypatch.setattr(source._engine, "logits", logits)


# Several sessions, round by round.


def test_sessions_drafted_together_get_the_same_as_each_alone(fresh: Callable[..., HiddenDrafts]) -> None:
    asked = [
        (name, tokens_of(name, length), draft_length, sampling)
        for name, length, draft_length, sampling in zip(
            "abcde", (3, 64, 65, 130, 9), (4, 1, 7, 0, 4), SAMPLINGS, strict=True
        )
    ]
    requests = [request(name, tokens, n, sampling=sampling) for name, tokens, n, sampling in asked]
    together = fresh().propose(requests)
    assert [len(draft.tokens) for draft in together] == [4, 1, 7, 0, 4]
    assert [draft.steps.get("hidden", 0) for draft in together] == [4, 1, 7, 0, 4]
    for draft, (name, tokens, n, sampling) in zip(together, asked, strict=True):
        assert one(fresh(), request(name, tokens, n, sampling=sampling)) == draft.tokens


def test_after_a_rejection_the_next_draft_equals_that_of_a_new_source(fresh: Callable[..., HiddenDrafts]) -> None:
    source = fresh()
    tokens = tokens_of("a", 60)
    for committed in ([], [3], [9, 9, 9, 9, 9, 9, 9], [1, 2]):
        known, tokens = len(tokens) if committed else 0, [*tokens, *committed]
        assert one(source, request("a", tokens, known=known)) == one(fresh(), request("a", tokens))
        assert seen(source, "a") == len(tokens)


def test_a_session_that_lost_tokens_is_drafted_for_from_the_rest(fresh: Callable[..., HiddenDrafts]) -> None:
    source = fresh()
    tokens = tokens_of("a", 60)
    one(source, request("a", tokens))
    assert one(source, request("a", tokens[:50], known=49)) == one(fresh(), request("a", tokens[:50]))


def test_a_session_with_missing_states_gets_no_draft_and_keeps_its_cache(
    fresh: Callable[..., HiddenDrafts],
) -> None:
    source = fresh()
    tokens = tokens_of("a", 30)
    one(source, request("a", tokens))
    later = [*tokens, 5, 6, 7]
    for states in (None, states_of("a", 30, 32), states_of("a", 29, 31), states_of("a", 29, 33)):
        asked = DraftRequest("a", later, GREEDY, round_of(4), ALONE, states)
        others = request("b", tokens_of("b", 10))
        missing, other = source.propose([asked, others])
        assert (missing.tokens, missing.steps) == ([], {})
        assert len(other.tokens) == 4
        assert seen(source, "a") == 30
        source.close("b")
    assert one(source, request("a", later, known=30)) == one(fresh(), request("a", later))


def test_states_read_before_are_ignored(fresh: Callable[..., HiddenDrafts]) -> None:
    source = fresh()
    one(source, request("a", tokens_of("a", 30)))
    longer = [*tokens_of("a", 30), 1, 2]
    assert one(source, request("a", longer, known=0)) == one(fresh(), request("a", longer))


def test_an_evicted_session_recovers_with_all_its_states(fresh: Callable[..., HiddenDrafts]) -> None:
    source = fresh(budget_tokens=128)
    a, b = tokens_of("a", 50), tokens_of("b", 90)
    first = one(source, request("a", a))
    assert seen(source, "a") == 50
    one(source, request("b", b))
    assert (seen(source, "a"), seen(source, "b")) == (0, 90)
    assert one(source, request("a", [*a, 3], known=50)) == []
    assert seen(source, "a") == 0
    assert one(source, request("a", a)) == first


def test_of_a_long_text_only_the_end_is_computed(fresh: Callable[..., HiddenDrafts]) -> None:
    source = fresh(window=16)
    tokens = tokens_of("a", 60)
    assert source.starts_at("a", 60) == 44
    (draft,) = source.propose([request("a", tokens, known=44)])
    assert (len(draft.tokens), draft.computed, source._engine.length("a")) == (4, 16, 16 + 3)
    longer = [*tokens, 1, 2, 3]
    assert source.starts_at("a", 63) == 60, "what was computed is kept"
    assert source.propose([request("a", longer, known=60)])[0].computed == 3
    assert source.starts_at("a", 63 + 16) == 63, "so many tokens are missing that all held are dropped"
    much_longer = [*longer, *tokens_of("more", 30)]
    asked = request("a", much_longer, known=93 - 16)
    assert one(source, asked) == one(fresh(window=16), request("a", much_longer, known=93 - 16))
    assert (source.starts_at("a", 40), source.starts_at("a", 90)) == (24, 89), "also after a loss of tokens"


def test_a_window_that_holds_the_text_changes_nothing(fresh: Callable[..., HiddenDrafts]) -> None:
    tokens = tokens_of("a", 30)
    assert one(fresh(window=30), request("a", tokens)) == one(fresh(), request("a", tokens))


def test_a_draft_ahead_continues_one_whose_beginning_was_left_out(fresh: Callable[..., HiddenDrafts]) -> None:
    source = fresh(window=16)
    tokens = tokens_of("a", 60)
    asked = request("a", tokens, 3, known=44)
    made = source.propose([asked])[0]
    longer = one(fresh(window=16), request("a", tokens, 6, known=44))
    assert prepared(source, asked, made)[*longer[:4]] == longer[4:]


def test_requests_that_do_not_fit_together_are_drafted_in_parts(fresh: Callable[..., HiddenDrafts]) -> None:
    source = fresh(budget_tokens=128)
    texts = {name: tokens_of(name, length) for name, length in (("a", 40), ("b", 40), ("c", 40), ("long", 200))}
    a, b, c, long = source.propose([request(name, tokens, 1) for name, tokens in texts.items()])
    assert long.tokens == []
    for name, draft in (("a", a), ("b", b), ("c", c)):
        assert draft.tokens == one(fresh(), request(name, texts[name], 1))


def test_broken_states_of_a_session_leave_other_drafts_intact(fresh: Callable[..., HiddenDrafts]) -> None:
    tokens = tokens_of("sound", 20)
    expected = one(fresh(), request("sound", tokens))
    source = fresh()
    broken = replace(request("broken", tokens), states=States(0, np.full((19, 64), np.nan, np.float32)))
    drafts = source.propose([broken, request("sound", tokens)])
    assert [draft.tokens for draft in drafts] == [[], expected]
    assert (seen(source, "broken"), seen(source, "sound")) == (0, 20)
    assert one(source, request("broken", tokens)) == one(fresh(), request("broken", tokens))


def test_closing_a_session_frees_its_cache(fresh: Callable[..., HiddenDrafts]) -> None:
    source = fresh()
    one(source, request("a", tokens_of("a", 30)))
    source.close("a")
    source.close("unknown")
    assert (seen(source, "a"), source._engine.length("a")) == (0, 0)


def test_nothing_is_computed_for_a_round_without_draft_tokens(
    fresh: Callable[..., HiddenDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fresh()
    monkeypatch.setattr(source._engine, "forward", None)
    assert one(source, request("a", tokens_of("a", 30), 0, names=COMBINED)) == []


# The choice of tokens.


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_tokens_of_the_head_are_chosen_with_the_sessions_noise(
    target: ModelFolder, tmp_path: Path, sampling: Sampling
) -> None:
    head_ids = sorted(set(tokens_of("head", 60)))
    engine = DraftEngine(tiny.hidden_draft(tmp_path, target, head_ids=head_ids), target, dtype="float32")
    source = HiddenDrafts(engine, window=1000)
    asked = request("a", tokens_of("a", 30), 8, sampling=sampling)
    found = one(source, asked)
    assert len(found) == 8
    assert set(found) <= set(head_ids)
    engine.truncate("a", 0)
    assert asked.states is not None
    before = np.concatenate([np.zeros((1, 64), np.float32), asked.states.rows])
    estimate = engine.forward([DraftStep("a", asked.tokens, before)])
    for position, token in enumerate(found, 30):
        logits = torch.full((1, tiny.VOCAB), -math.inf)
        logits[:, head_ids] = torch.from_numpy(engine.logits(estimate))
        assert choose(logits, [sampling], [position]) == [token]
        estimate = engine.forward([DraftStep("a", [token], estimate)])


@dataclass
class Session:
    """A text that grows by the tokens that the target commits."""

    name: str
    sampling: Sampling
    tokens: list[int]
    known: int = 0
    rows: list[np.ndarray] = field(default_factory=list)

    def request(self, length: int) -> DraftRequest:
        start = max(0, self.known - 1)
        states = States(start, np.array(self.rows[start:])) if len(self.rows) > start else None
        return DraftRequest(self.name, list(self.tokens), self.sampling, round_of(length), ALONE, states)


def test_with_exact_states_every_draft_and_every_bonus_token_is_right(
    folder: HiddenDraftFolder, target: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every sampling: the draft's choice equals the target's, with the same noise at the same position. The same
    holds for the draft made ahead and its bonus token."""
    judge = Engine(target.path, budget_tokens=2048, keep_hidden=True)
    oracle = Engine(target.path, budget_tokens=2048, keep_hidden=True)
    engine = DraftEngine(folder, target)
    compute = engine.forward
    texts: dict[str, list[int]] = {}

    def true_states(steps: Sequence[DraftStep]) -> Floats:
        found = []
        for step in steps:
            texts[step.session_id] = [*texts.get(step.session_id, [])[: engine.length(step.session_id)], *step.tokens]
            text = texts[step.session_id]
            held = min(oracle.attach(step.session_id, text), len(text) - 1)
            oracle.truncate(step.session_id, held)
            oracle.forward([Step(step.session_id, text[held:], rows=1)])
            found.append(oracle.hidden(step.session_id, len(text) - 1, len(text))[0].float().numpy())
        compute(steps)
        return np.stack(found)

    begin = engine.branch

    def branch(session_id: str, name: str, length: int) -> None:
        texts[name] = texts[session_id][:length]
        begin(session_id, name, length)

    monkeypatch.setattr(engine, "forward", true_states)
    monkeypatch.setattr(engine, "branch", branch)
    source = HiddenDrafts(engine, window=1000)
    sessions = [Session(f"s{i}", sampling, tokens_of(f"s{i}", 20 + 30 * i)) for i, sampling in enumerate(SAMPLINGS)]
    following: list[list[PreparedDraft]] = [[] for _ in sessions]
    for round_ in range(5):
        requests = [session.request(4) for session in sessions]
        drafts = source.propose(requests)
        assert all(len(draft.tokens) == (4 if round_ else 0) for draft in drafts)
        if round_ > 1:
            for session, draft, made in zip(sessions, drafts, following, strict=True):
                (fitting,) = [one for one in made if one.tokens == session.tokens[-len(one.tokens) :]]
                assert fitting.draft.tokens == draft.tokens[:3]
        for request_ in requests:
            request_.round.acceptance[:] = [0.99] * request_.round.kept  # so that no rejection is likelier
        following = source.ahead(
            [
                AheadRequest(request_, draft, lambda _: round_of(3), most=4)
                for request_, draft in zip(requests, drafts, strict=True)
            ]
        )
        tasks = [
            VerifyTask(s.name, s.tokens, draft.tokens, s.sampling, frozenset(), room=99, hidden_from=len(s.rows))
            for s, draft in zip(sessions, drafts, strict=True)
        ]
        outcomes, _ = verify(judge, tasks)
        for session, draft, outcome, made in zip(sessions, drafts, outcomes, following, strict=True):
            assert outcome.verdict is not None
            assert outcome.verdict.accepted == len(draft.tokens)
            session.known = seen(source, session.name)
            session.tokens += outcome.verdict.tokens
            for part in outcome.hidden:
                session.rows += list(to_floats(np.frombuffer(part.rows, np.uint16).reshape(part.count, part.size)))
            if round_:
                assert session.tokens[-5:] in [one.tokens for one in made]
            else:
                assert made == [], "without states there is nothing to continue"


# Copies beside the model. The text repeats itself: 8 follows 5 6 7.

REPEATING = [5, 6, 7, 8, 9, 5, 6, 7]


def combined(length: int, states: bool = True) -> DraftRequest:
    found = states_of("a", 0, len(REPEATING) - 1) if states else None
    return DraftRequest("a", REPEATING, GREEDY, round_of(length, COMBINED), COMBINED, found)


def marks(token: DraftToken) -> tuple[str, bool, bool]:
    return token.source, token.agreed, token.contested


def test_where_model_and_lookup_agree_copying_continues(
    fresh: Callable[..., HiddenDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fresh()
    force(source, monkeypatch, 8)
    asked = combined(4)
    assert source.propose([asked]) == [Draft([8, 9, 5, 6], {"hidden": 1}, computed=8)]
    assert [marks(token) for token in asked.round.kept_tokens] == [("lookup", True, False)] * 4
    assert [token.support for token in asked.round.kept_tokens] == [3, 4, 5, 6], "each copy lengthens the match"


def test_where_model_and_lookup_differ_the_likelier_token_is_taken(
    fresh: Callable[..., HiddenDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    sure, unsure = fresh(), fresh()
    force(sure, monkeypatch, 9)
    asked = combined(4)
    assert one(sure, asked) == [9, 9, 9, 9], "5 follows 9 in the text, but the model is certain"
    first, *others = map(marks, asked.round.kept_tokens)
    assert first == ("hidden", False, True)
    assert others == [("hidden", False, True), ("lookup", True, False), ("lookup", True, False)], "9 follows 9 now"
    force(unsure, monkeypatch, None)
    asked = combined(4)
    assert unsure.propose([asked]) == [Draft([8, 9, 5, 6], {"hidden": 1}, computed=8)]
    first, *others = map(marks, asked.round.kept_tokens)
    assert first == ("lookup", False, True)
    assert others == [("lookup", False, False)] * 3


def test_copies_continue_a_draft_of_the_model(
    fresh: Callable[..., HiddenDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fresh()
    chosen = iter([300, 5, 6])

    def logits(estimates: Floats) -> Floats:
        found = np.zeros((len(estimates), tiny.VOCAB), np.float32)
        found[:, next(chosen)] = 50.0
        return found

    monkeypatch.setattr(source._engine, "logits", logits)
    asked = combined(6)
    expected = Draft([300, 5, 6, 7, 300, 5], {"hidden": 3}, computed=8)
    assert source.propose([asked]) == [expected], "300 followed the latest 5 6 7"
    assert [token.source for token in asked.round.kept_tokens] == ["hidden"] * 2 + ["lookup"] * 4
    assert [token.contested for token in asked.round.kept_tokens] == [True] + [False] * 5


@pytest.mark.parametrize(("why", "copies"), [("no states", [8, 9, 5]), ("no room", [5, 6, 7])])
def test_a_session_that_the_model_cannot_draft_for_gets_copies(
    fresh: Callable[..., HiddenDrafts], why: str, copies: list[int]
) -> None:
    source = fresh(budget_tokens=64)
    if why == "no states":
        asked = combined(3, states=False)
    else:
        states = states_of("a", 0, 79)
        asked = DraftRequest("a", REPEATING * 10, GREEDY, round_of(3, COMBINED), COMBINED, states)
    assert source.propose([asked]) == [Draft(copies, {})], "the longest match is copied"
    assert [marks(token) for token in asked.round.kept_tokens] == [("lookup", False, False)] * 3


def test_draft_tokens_carry_the_models_statistics(
    fresh: Callable[..., HiddenDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fresh()
    logits = torch.linspace(0, 9, tiny.VOCAB)
    monkeypatch.setattr(source._engine, "logits", lambda estimates: logits.expand(len(estimates), -1).numpy())
    asked = request("a", tokens_of("a", 9), 1)
    assert one(source, asked) == [tiny.VOCAB - 1]
    (token,) = asked.round.kept_tokens
    shares = torch.softmax(logits.double(), -1)
    expected = DraftToken(
        "hidden",
        confidence=shares[-1].item(),
        entropy=-(shares * shares.log()).sum().item(),
        margin=(shares[-1] - shares[-2]).item(),
        spread=logits.std().item(),
    )
    for name in ("confidence", "entropy", "margin", "spread"):
        assert getattr(token, name) == pytest.approx(getattr(expected, name), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 5])
def test_statistics_are_the_same_on_an_accelerator(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 700, generator=generator) * 4 - 9
    columns = torch.randint(700, (rows,), generator=generator)
    found = torch.tensor([row_statistics(*one) for one in zip(logits.numpy(), columns.tolist(), strict=True)])
    expected = torch.tensor(_statistics_on_device(logits, columns))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# While a round is in flight.


@pytest.mark.parametrize("names", [ALONE, COMBINED])
@pytest.mark.parametrize("sampling", SAMPLINGS[:2])
def test_a_prepared_draft_continues_like_a_longer_draft(
    fresh: Callable[..., HiddenDrafts], sampling: Sampling, names: tuple[str, ...]
) -> None:
    source = fresh()
    tokens = [*tokens_of("a", 9), *REPEATING]
    asked = request("a", tokens, 3, sampling=sampling, names=names)
    made = source.propose([asked])[0]
    found = prepared(source, asked, made)
    longer = one(fresh(), request("a", tokens, 6, sampling=sampling))
    if names == ALONE:
        assert found[*longer[:4]] == longer[4:]
    assert all(len(draft) == 2 for draft in found.values())
    assert seen(source, "a") == len(tokens), "tokens computed from estimates do not count as seen"
    assert source._engine._pool.sessions == ["a"], "no branch is left"
    after = [*tokens, 1, 2]
    assert one(source, request("a", after, known=len(tokens))) == one(fresh(), request("a", after))


@pytest.mark.parametrize("length", [20, 62, 127])
def test_drafts_are_prepared_for_rejections_too(fresh: Callable[..., HiddenDrafts], length: int) -> None:
    """At the end of a block of the cache, and away from it."""
    source, tokens = fresh(budget_tokens=1 << 15), tokens_of("a", length)
    asked = request("a", tokens, 3)
    made = source.propose([asked])[0]
    found = prepared(source, asked, made, most=200)
    accepted = {len(outcome) - 1 for outcome in found}
    assert accepted == {0, 1, 2, 3}
    for count in accepted:
        first = next(outcome for outcome in found if len(outcome) == count + 1)
        assert list(first[:count]) == made.tokens[:count]
        assert first[count] not in made.tokens[count : count + 1], "a rejected token does not follow"
        assert found[first] == by_hand(fresh(), tokens, first, 2)
    assert list(prepared(source, asked, made, most=5)) == list(found)[:5], "again, and the likeliest ones only"


def test_after_a_prepared_draft_the_next_one_is_prepared_from_true_states(fresh: Callable[..., HiddenDrafts]) -> None:
    source, tokens = fresh(), tokens_of("a", 20)
    asked = request("a", tokens, 3)
    made = source.propose([asked])[0]
    outcome, draft = next(iter(prepared(source, asked, made).items()))
    following = request("a", [*tokens, *outcome], known=len(tokens))
    for count in range(len(draft)):
        following.round.add(DraftToken("hidden", 0.5 - count / 10))
    found = prepared(source, following, Draft(draft))
    last = next(tail for tail in found if list(tail[:2]) == draft)
    assert found[last] == by_hand(fresh(), following.tokens, last, 2)
    assert seen(source, "a") == len(following.tokens)


def test_preparing_first_computes_copied_tokens(
    fresh: Callable[..., HiddenDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fresh()
    force(source, monkeypatch, 8)
    asked = combined(3)
    made = source.propose([asked])[0]
    assert (made.tokens, source._engine.length("a")) == ([8, 9, 5], len(REPEATING))
    monkeypatch.undo()
    found = prepared(source, replace(asked, sources=ALONE), made)
    last = next(outcome for outcome in found if list(outcome[:3]) == made.tokens)
    assert found[last] == by_hand(fresh(), REPEATING, last, 2)


def test_sessions_that_the_source_has_not_computed_get_no_prepared_draft(fresh: Callable[..., HiddenDrafts]) -> None:
    source = fresh()
    tokens = tokens_of("a", 20)
    asked = request("a", tokens)
    made = source.propose([asked])[0]
    assert prepared(source, request("b", tokens), Draft()) == {}
    without_states = replace(request("a", [*tokens, 4, 5]), states=None)
    assert prepared(source, without_states, Draft()) == {}
    assert prepared(source, asked, made)


def test_preparing_ends_when_it_is_no_longer_wanted(fresh: Callable[..., HiddenDrafts]) -> None:
    source = fresh()
    asked = request("a", tokens_of("a", 20))
    made = source.propose([asked])[0]
    answers = [True] * 16
    one_step = AheadRequest(asked, made, lambda _: round_of(4), 3, lambda: bool(answers and answers.pop()))
    (found,) = source.ahead([one_step])
    assert found
    assert {len(draft.draft.tokens) for draft in found} < {1, 2, 3}, "shorter drafts than asked for"
    assert source.ahead([replace(one_step, wanted=lambda: False)]) == [[]]


@pytest.mark.parametrize("asked_before", [1, 2, 3, 5])
def test_preparing_ends_before_its_drafts_begin(
    fresh: Callable[..., HiddenDrafts], monkeypatch: pytest.MonkeyPatch, asked_before: int
) -> None:
    """Copied tokens have to be computed first, and likely outcomes chosen: other sessions' drafts wait for neither."""
    source = fresh()
    asked = request("a", tokens_of("a", 20), 1)
    made = source.propose([asked])[0]
    copied = replace(made, tokens=[*made.tokens, *tokens_of("copied", 12)])
    asked = replace(asked, round=round_of(len(copied.tokens)))
    for _ in copied.tokens:
        asked.round.add(DraftToken("hidden", 0.5))
    work: list[int] = []
    forward, choose_likely = source._engine.forward, hidden.likely_choices
    monkeypatch.setattr(source._engine, "forward", lambda steps: work.append(1) or forward(steps))
    monkeypatch.setattr(hidden, "likely_choices", lambda *args: work.append(1) or choose_likely(*args))
    answers = [True] * asked_before
    one_call = AheadRequest(asked, copied, lambda _: round_of(4), 3, lambda: bool(answers and answers.pop()))
    assert source.ahead([one_call]) == [[]]
    assert len(work) < asked_before
    assert source.ahead([replace(one_call, wanted=lambda: True)]) != [[]], "what was computed is of use later"


def test_preparing_evicts_no_session(fresh: Callable[..., HiddenDrafts]) -> None:
    source = fresh(budget_tokens=256)
    asked = [request(name, tokens_of(name, 62), 1) for name in ("a", "b")]
    made = source.propose(asked)
    aheads = [AheadRequest(r, draft, lambda _: round_of(2), 8) for r, draft in zip(asked, made, strict=True)]
    found = source.ahead(aheads)
    assert sum(map(len, found)) == 1, "two blocks are left, and a branch may need both"
    assert (seen(source, "a"), seen(source, "b")) == (62, 62)
