"""A twin whose steps a model of random weights computes: the model's time, and the twin's answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from twins import make_twin

from services.tools.twin.random_model import random_model
from services.verifier.core.tasks import VerifyTask
from services.verifier.engine_thread import load_engine
from services.verifier.profile import profile
from services.verifier.settings import VerifierSettings
from services.verifier.verify import verify
from shared.engine.steps import ChoiceRow, Step
from shared.errors import EngineError, ModelError
from shared.messages import Sampling
from shared.twin.computed import ComputedTwinEngine
from shared.twin.folder import TwinFolder, write_twin
from shared.twin.text import SyntheticText

PROMPT = list(range(40, 60))
SEED = 7


def computed_twin(folder: Path, vocab_size: int = tiny.VOCAB) -> TwinFolder:
    """Return a twin whose steps a tiny Llama with random weights computes."""
    make_twin(folder)
    described = folder / "described"
    described.mkdir()
    tiny.LLAMA.save_pretrained(described)
    config = json.loads((described / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "vocab_size": vocab_size}
    (described / "config.json").write_text(json.dumps(config))
    random_model(described / "config.json", folder / "model")
    return write_twin(str(folder / "profile.json"), folder / "words", folder / "computed", computed=folder / "model")


def load(twin: TwinFolder) -> ComputedTwinEngine:
    engine = load_engine(twin.path, VerifierSettings(cache_tokens=1024), keep_hidden=False)
    assert isinstance(engine, ComputedTwinEngine)
    return engine


@pytest.fixture
def twin(tmp_path: Path) -> TwinFolder:
    """The twin of a test."""
    return computed_twin(tmp_path)


def test_a_step_is_computed_and_answers_are_the_twins(twin: TwinFolder) -> None:
    engine, text = load(twin), SyntheticText(twin.spec)
    assert (engine.budget_tokens, engine.max_len, engine.has_logits) == (1024, 1024, False)
    engine.attach("s", PROMPT)
    output = engine.forward([Step("s", PROMPT, rows=1)])
    assert output.logits.shape == (1, tiny.VOCAB)
    assert output.logits.isfinite().all()
    assert output.logits.std() > 0
    [row] = [ChoiceRow(0, Sampling(seed=SEED, temperature=0.7), len(PROMPT), len(PROMPT))]
    assert output.choose([row]) == [text.token(SEED, 0)]
    assert engine.hidden_bits("s", 5, 100).shape == (len(PROMPT) - 5, 1)
    assert output.bits(slice(0, 1)) == b""
    with pytest.raises(EngineError, match="leave logprobs out"):
        output.logprobs(slice(0, 1), [5], 1)


def test_drafts_are_verified_by_the_twins_answers(twin: TwinFolder) -> None:
    engine, text = load(twin), SyntheticText(twin.spec)
    answer = [text.token(SEED, index) for index in range(6)]
    draft = [*answer[:3], text.other(SEED, 3), answer[4]]
    task = VerifyTask("s", PROMPT, draft, Sampling(seed=SEED), frozenset(), 100, prompt_len=len(PROMPT))
    [outcome], [shape] = verify(engine, [task])
    assert outcome.verdict is not None
    assert (outcome.verdict.accepted, outcome.verdict.tokens) == (3, answer[:4])
    assert shape.new_tokens == len(PROMPT) + 5
    assert outcome.cached == len(PROMPT) + 3


def test_its_profile_at_the_start_is_that_of_the_model(twin: TwinFolder) -> None:
    measured = profile(load(twin), budget_s=0.2)
    assert len(measured) > 2
    assert all(one.measured_ms > 0 for one in measured)


def test_a_model_that_is_gone_or_has_too_few_tokens_is_named(twin: TwinFolder, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ModelError, match=r"which is gone; make the twin again"):
        load(twin)
    with pytest.raises(ModelError, match=r"has a vocabulary of 100 tokens"):
        load(computed_twin(tmp_path / "small", vocab_size=100))
