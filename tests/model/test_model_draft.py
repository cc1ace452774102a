"""Drafts by a small model: rounds hold exactly the proposed tokens, also where the cache is too small."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

from services.drafter.control import Controller
from services.drafter.sources import Draft, DraftRequest
from services.drafter.sources.model import ModelDrafts
from shared.engine import Engine
from shared.messages import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("draft"))


def drafted(folder: Path, budget_tokens: int, lengths: Sequence[int]) -> list[Draft]:
    source = ModelDrafts(Engine(folder, dtype="float32", budget_tokens=budget_tokens))
    controller = Controller("fixed", 4)
    requests = [
        DraftRequest(
            f"s{length}", list(range(length)), Sampling(), controller.session("model").ahead(4, 0.0), ("model",)
        )
        for length in lengths
    ]
    drafts = source.propose(requests)
    for request, draft in zip(requests, drafts, strict=True):
        assert len(request.round.acceptance) == len(draft.tokens)
    return drafts


def test_requests_that_do_not_fit_together_are_drafted_in_parts(folder: Path) -> None:
    lengths = [10, 20, 30]
    expected = drafted(folder, 2048, lengths)
    assert [len(draft.tokens) for draft in expected] == [4, 4, 4]
    assert drafted(folder, 64, lengths) == expected


def test_a_draft_ends_where_the_cache_is_full(folder: Path) -> None:
    expected = drafted(folder, 2048, [62, 63])
    # The first session needs a second block for the third token that it computes, the other one for the second.
    found = drafted(folder, 128, [62, 63])
    assert [len(draft.tokens) for draft in found] == [2, 2]
    assert [draft.tokens for draft in found] == [draft.tokens[:2] for draft in expected]


def test_a_session_that_never_fits_gets_an_empty_draft(folder: Path) -> None:
    assert [len(draft.tokens) for draft in drafted(folder, 64, [10, 100])] == [4, 0]
