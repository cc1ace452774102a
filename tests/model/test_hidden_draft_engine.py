"""The packed, cached draft engine computes the same as the dense form of its model, after any history."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from services.drafter.hidden import weights
from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.engine import DraftEngine, DraftStep
from services.drafter.hidden.forward import Floats
from services.drafter.hidden.target_parts import target_parts
from services.drafter.learning.loss import bottom_outputs, unrolled
from shared.errors import CacheFull, EngineError, ModelError, NotAttached, TooLong
from shared.models.folder import ModelFolder

SHAPES = [(0, 1), (1, 1), (2, 2)]
"""Numbers of the target's layers and of the draft's own."""
STEPS = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return tiny.target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def draft(request: pytest.FixtureRequest, target: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bottom_layers, layers = request.param
    made = tiny.hidden_draft(tmp_path_factory.mktemp("draft"), target, layers=layers, bottom_layers=bottom_layers)
    return made.path


@dataclass
class Text:
    """Tokens with random states, and the dense estimates of draft steps 1 to `STEPS` at every position."""

    tokens: list[int]
    states: Tensor
    estimates: list[Tensor]

    def before(self, start: int, stop: int) -> Floats:
        """Return the states before the tokens from `start` to `stop`."""
        return torch.cat([torch.zeros(1, self.states.shape[1]), self.states])[start:stop].numpy()

    def step(self, name: str, start: int, stop: int) -> DraftStep:
        return DraftStep(name, self.tokens[start:stop], self.before(start, stop))


@pytest.fixture(scope="module")
def texts(draft: Path, target: ModelFolder) -> dict[str, Text]:
    """Three texts of different lengths, one of them longer than two blocks of cache."""
    folder = HiddenDraftFolder.open(draft)
    model, _ = weights.load(folder, torch.float32)
    parts = target_parts(target, folder.card.model.bottom_layers, torch.float32)
    found = {}
    generator = torch.Generator().manual_seed(4)
    for name, length in (("a", 20), ("b", 70), ("c", 140)):
        tokens = torch.randint(tiny.VOCAB, (length,), generator=generator)
        states = torch.randn(length, 64, generator=generator)
        with torch.inference_mode():
            bottom = bottom_outputs(parts, tokens)[None] if parts.bottom else None
            known = model.known(parts.embedding[tokens][None], bottom)
            found[name] = Text(tokens.tolist(), states, [e[0] for e in unrolled(model, known, states[None], STEPS)])
    return found


@pytest.fixture
def engine(draft: Path, target: ModelFolder, texts: dict[str, Text]) -> DraftEngine:
    made = DraftEngine(HiddenDraftFolder.open(draft), target, dtype="float32", budget_tokens=640)
    for name in texts:
        made.open(name)
    return made


def same(found: Floats, expected: Floats | Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(found), torch.as_tensor(expected), rtol=1e-3, atol=1e-3)


def test_chunks_draft_steps_and_truncations_match_the_dense_form(engine: DraftEngine, texts: dict[str, Text]) -> None:
    chance = random.Random(1)
    held = dict.fromkeys(texts, 0)
    rounds = 0
    while going := [name for name, text in texts.items() if held[name] < len(text.tokens) - STEPS]:
        stops = {n: min(held[n] + chance.randint(1, 30), len(texts[n].tokens) - STEPS) for n in going}
        found = engine.forward([texts[n].step(n, held[n], stops[n]) for n in going])
        for extra in range(STEPS):
            expected = torch.stack([texts[n].estimates[extra][stops[n] - 1 + extra] for n in going])
            same(found, expected)
            if extra < STEPS - 1:
                steps = [
                    DraftStep(n, [texts[n].tokens[stops[n] + extra]], row[None])
                    for n, row in zip(going, found, strict=True)
                ]
                found = engine.forward(steps)
        for name in going:
            assert engine.length(name) == stops[name] + STEPS - 1
            engine.truncate(name, stops[name])
        held |= stops
        rounds += 1
    assert rounds > 5


def test_packed_sessions_get_the_same_as_each_alone(engine: DraftEngine, texts: dict[str, Text]) -> None:
    together = engine.forward([text.step(name, 0, len(text.tokens)) for name, text in texts.items()])
    for row, (name, text) in zip(together, texts.items(), strict=True):
        engine.truncate(name, 0)
        same(engine.forward([text.step(name, 0, len(text.tokens))])[0], row)


def test_logits_are_those_of_the_head_tokens(target: ModelFolder, tmp_path: Path) -> None:
    head_ids = [3, 500, 7, 64]
    made = DraftEngine(tiny.hidden_draft(tmp_path, target, head_ids=head_ids), target, dtype="float32")
    assert made.head_ids.tolist() == sorted(head_ids)
    estimates = np.random.default_rng(0).standard_normal((2, 64), np.float32)
    head = target_parts(target, 0, torch.float32).head
    same(made.logits(estimates), (torch.from_numpy(estimates) @ head.T)[:, sorted(head_ids)])


def filled(engine: DraftEngine, lengths: Sequence[int]) -> list[DraftStep]:
    for i in range(len(lengths)):
        engine.open(f"s{i}")
    return [DraftStep(f"s{i}", [5] * length, np.zeros((length, 64), np.float32)) for i, length in enumerate(lengths)]


def test_idle_sessions_are_evicted_and_a_failed_step_changes_nothing(draft: Path, target: ModelFolder) -> None:
    engine = DraftEngine(HiddenDraftFolder.open(draft), target, budget_tokens=128)
    first, second, third = filled(engine, [60, 60, 10])
    engine.forward([first])
    with pytest.raises(CacheFull):
        engine.forward([first, second, third])
    with pytest.raises(TooLong):
        engine.forward(filled(engine, [129]))
    assert [engine.length(f"s{i}") for i in range(3)] == [60, 0, 0]
    engine.forward([second, third])
    assert [engine.length(f"s{i}") for i in range(3)] == [0, 60, 10], "the idle session was evicted"
    with pytest.raises(NotAttached):
        engine.forward([first])


def test_a_step_without_a_state_for_each_token_is_refused(engine: DraftEngine) -> None:
    for steps in (
        [],
        [DraftStep("a", [], np.zeros((0, 64), np.float32))],
        [DraftStep("a", [1, 2], np.zeros((1, 64), np.float32))],
    ):
        with pytest.raises(EngineError, match="one state for each"):
            engine.forward(steps)


def test_a_draft_for_another_target_is_refused(draft: Path, target: ModelFolder, tmp_path: Path) -> None:
    other = tiny.target(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}}')
    with pytest.raises(ModelError, match="wisp draft train"):
        DraftEngine(HiddenDraftFolder.open(draft), ModelFolder(other.path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_weights_load_unchanged(draft: Path, dtype: torch.dtype) -> None:
    model, head_ids = weights.load(HiddenDraftFolder.open(draft), dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.spread.dtype == torch.float32, "states are divided by it before they are rounded"
    assert head_ids.tolist() == list(range(tiny.VOCAB))


def test_angles_are_exact_in_every_number_format(draft: Path) -> None:
    positions = torch.tensor([1, 1000])
    layers = [weights.load(HiddenDraftFolder.open(draft), d)[0].layers[0] for d in (torch.float32, torch.bfloat16)]
    (exact, _), (rounded, _) = (layer.rotation(positions) for layer in layers)  # type: ignore[operator]
    assert torch.equal(exact, rounded)


def test_a_damaged_draft_is_refused(draft: Path, target: ModelFolder, tmp_path: Path) -> None:
    made = tiny.hidden_draft(tmp_path, target)
    other = HiddenDraftFolder.open(draft).card.model.model_copy(update={"layers": 3})
    with pytest.raises(ModelError, match="does not fit"):
        weights.load(HiddenDraftFolder(made.path, made.card.model_copy(update={"model": other})), torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelError, match="does not fit"):
        weights.load(made, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="does not fit"):
        weights.load(made, torch.float32)
