"""Drafts by a small model with another vocabulary than the target's: both have learned the same few lines."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from services.drafter.control import Controller
from services.drafter.drafting import load_drafting
from services.drafter.settings import DrafterSettings
from services.drafter.sources import Draft, DraftRequest, pairing
from services.drafter.sources.translated import TranslatedDrafts
from services.tools.bench.support import pair
from services.tools.training.answering import EngineTarget
from services.tools.training.evaluate import Costs, Summary, rounds
from services.tools.training.generate import Assignment, generate
from services.tools.training.shards import GeneratedText
from shared.engine import Engine
from shared.messages import LogitRules, Sampling
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

pytestmark = pytest.mark.slow

LINES = [
    "The international train leaves the station every morning at 10:45, and arrives in Köln before noon.",
    "def internationals(people):\n    return [each for each in people if each.country is not None]",
    "Straßenbahnen, señoras, déjà vu — naïve façades; the weather in 東京 is fine today 🙂 as ever.",
]
STEPS = 150


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = tmp_path_factory.mktemp("target")
    pair.byte_level(folder, LINES * 4, 340)
    return ModelFolder(pair.trained(folder, LINES * 20, steps=STEPS, batch=4))


@pytest.fixture(scope="module", params=["byte-level", "sentence-piece"])
def draft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = tmp_path_factory.mktemp("draft")
    if request.param == "byte-level":
        pair.byte_level(folder, LINES * 4, 450)
    else:
        pair.sentence_piece(folder, LINES * 4, 500)
    return ModelFolder(pair.trained(folder, LINES * 20, steps=STEPS, batch=4, seed=1))


@pytest.fixture(scope="module")
def texts(target: ModelFolder) -> list[GeneratedText]:
    """The target's continuations of the lines' beginnings, greedy and at temperature 1."""
    engine = Engine(target.path, dtype="float32", budget_tokens=4096, keep_hidden=True)
    prompts = [Tokenizer(target).encode_plain(line)[:6] for line in LINES]
    assignments = [
        Assignment(seed, "line", prompt, temperature, 48)
        for seed, (prompt, temperature) in enumerate((prompt, t) for prompt in prompts for t in (0.0, 1.0))
    ]
    return list(generate(EngineTarget(engine, 6), assignments, frozenset(), 0, serving_noise=True))


def source_of(draft: ModelFolder, target: ModelFolder, budget_tokens: int = 4096) -> TranslatedDrafts:
    engine = Engine(draft.path, dtype="float32", budget_tokens=budget_tokens)
    return TranslatedDrafts(engine, pairing.translation(draft, target))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_most_drafts_of_a_text_that_both_know_are_accepted(
    draft: ModelFolder, target: ModelFolder, texts: list[GeneratedText], temperature: float
) -> None:
    chosen = [text for text in texts if text.temperature == temperature]
    drafted = list(rounds(source_of(draft, target), ("model",), Controller("fixed", 4), chosen))
    summary = Summary.of(drafted, Costs(1, 0, 0))
    # Both models are trained anew, and by other bits on another CPU.
    assert summary.tokens_per_round > 1.5, "drafts that are never right make 1"
    assert summary.by_position[0] > 0.25


def requests_for(tokens: Sequence[Sequence[int]], sampling: Sampling | None = None) -> list[DraftRequest]:
    controller = Controller("fixed", 4)
    return [
        DraftRequest(
            f"s{i}", each, sampling or Sampling(), controller.session("model").ahead(4, 0.0), ("model",), prompt_len=1
        )
        for i, each in enumerate(tokens)
    ]


def drafts_of(source: TranslatedDrafts, requests: Sequence[DraftRequest]) -> list[Draft]:
    drafts = source.propose(requests)
    for request, draft in zip(requests, drafts, strict=True):
        assert len(request.round.acceptance) == len(draft.tokens)
    return drafts


def test_a_draft_depends_on_no_other_session_and_on_no_earlier_round(
    draft: ModelFolder, target: ModelFolder, texts: list[GeneratedText]
) -> None:
    known = [text.tokens.tolist() for text in texts]
    together, alone = source_of(draft, target), source_of(draft, target)
    for length in (8, 9, 13, 30, 11):  # the last one goes back
        requests = requests_for([tokens[:length] for tokens in known])
        found = drafts_of(together, requests)
        expected = []
        for request in requests_for([tokens[:length] for tokens in known]):
            expected += drafts_of(alone, [request])
            alone.close(request.session_id)
        assert [draft.tokens for draft in found] == [draft.tokens for draft in expected]
        assert any(draft.tokens for draft in found)


def test_requests_that_do_not_fit_together_are_drafted_in_turn(
    draft: ModelFolder, target: ModelFolder, texts: list[GeneratedText]
) -> None:
    known = [text.tokens.tolist()[:20] for text in texts[:3]]
    expected = drafts_of(source_of(draft, target), requests_for(known))
    assert any(draft.tokens for draft in expected)
    assert drafts_of(source_of(draft, target, 64), requests_for(known)) == expected


def test_drafts_follow_the_rules_of_a_session(
    draft: ModelFolder, target: ModelFolder, texts: list[GeneratedText]
) -> None:
    known = [text.tokens.tolist()[:20] for text in texts]
    free = drafts_of(source_of(draft, target), requests_for(known))
    usual = {token for each in free for token in each.tokens}
    allowed = sorted(set(range(target.vocab_size)) - usual)
    sampling = Sampling(rules=LogitRules(prompt_len=1, allowed_token_ids=allowed))
    ruled = drafts_of(source_of(draft, target), requests_for(known, sampling))
    drafted = {token for each in ruled for token in each.tokens}
    assert drafted
    assert drafted <= set(allowed)


def test_a_text_that_ends_inside_a_character_is_drafted_for(draft: ModelFolder, target: ModelFolder) -> None:
    tokenizer = Tokenizer(target)
    source = source_of(draft, target)
    end = next(token for token in range(target.vocab_size) if tokenizer.token_bytes(token) == b"\xf0")
    tokens = [*tokenizer.encode_plain("the weather is fine today "), end]
    [found] = drafts_of(source, requests_for([tokens]))
    text = b"".join(tokenizer.token_bytes(token) for token in [end, *found.tokens])
    assert not found.tokens or text.startswith("🙂".encode()[: len(text)])
    source.close("s0")
    assert not source._texts


def test_a_drafter_loads_a_draft_model_with_another_vocabulary(draft: ModelFolder, target: ModelFolder) -> None:
    settings = DrafterSettings(target=target.path, draft_source="model", draft_model=draft.path)
    drafting = load_drafting(settings)
    assert isinstance(drafting.sources["model"], TranslatedDrafts)
    assert drafting.vocabularies["model"] == target.vocab_fingerprint
