"""A training run that goes on on an empty machine, from pieces of its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import made_folders
import pytest
import tiny
import torch
from transformers import LlamaConfig

from services.drafter.hidden.card import HiddenDraftFolder
from services.tools.cli.draft_stages import train_draft
from services.tools.training import carried, shards
from services.tools.training.carried import CONTENTS, CarriedRun
from services.tools.training.config import Config
from services.tools.training.run import TrainingRun
from services.tools.training.train import TrainingProgress
from shared.errors import SettingsError
from shared.models.folder import ModelFolder

CONFIG = Config.model_validate(
    {
        "target_dtype": "float32",
        "prompts": {"count": 40, "free_texts": 4, "held_out": 11},
        "generation": {"sessions": 4, "max_prompt": 32, "max_new": 16, "shard_tokens": 1000},
        "training": {
            "stages": [{"steps": 1, "tokens": 500, "learning_rate": 1e-3}],
            "batch_tokens": 128, "frequent_rows": 200, "random_rows": 50, "head_rows": 0,
        },
    }
)  # fmt: skip
NO_TIME = 0.0
"""A time that is over: a stage stops after the first text or the first update."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = tmp_path_factory.mktemp("target")
    backend = made_folders.byte_level()
    made_folders.write_folder(folder, backend)
    tiny.make(folder, LlamaConfig.from_dict({**tiny.LLAMA.to_dict(), "vocab_size": backend.get_vocab_size()}))
    return ModelFolder(folder)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of at most 100,000 bytes."""
    monkeypatch.setattr(carried, "PIECE_BYTES", 100_000)


@pytest.fixture
def generated(target: ModelFolder, tmp_path: Path) -> TrainingRun:
    """A run with all its texts, whose pieces are in the folder `carry`."""
    run = TrainingRun(CONFIG, target, tmp_path / "first")
    run.write_prompts()
    run.generate_all(lambda _: None)
    CarriedRun(tmp_path / "carry", run).keep()
    return run


@pytest.mark.slow
def test_a_run_is_finished_by_machines_that_start_empty(target: ModelFolder, tmp_path: Path) -> None:
    carry, draft = tmp_path / "carry", tmp_path / "draft"
    train_draft(TrainingRun(CONFIG, target, tmp_path / "first", until_s=NO_TIME), draft, carry)
    kept = list(shards.load_all(tmp_path / "first" / "texts"))
    assert 0 < len(kept) < 40
    assert not list(draft.iterdir())
    shutil.rmtree(tmp_path / "first")
    second = TrainingRun(CONFIG, target, tmp_path / "second")
    train_draft(second, draft, carry)
    texts = list(shards.load_all(second.texts))
    assert len({text.origin for text in texts}) == len(texts) > 40
    again = {text.origin: text.tokens.tolist() for text in texts}
    assert {text.origin: again[text.origin] for text in kept} == {text.origin: text.tokens.tolist() for text in kept}
    assert HiddenDraftFolder.open(draft).fits(target)
    assert all(piece.stat().st_size <= 100_000 for piece in carry.iterdir() if piece.name != CONTENTS)


def test_states_are_computed_again_with_the_same_bits(generated: TrainingRun, tmp_path: Path) -> None:
    other = TrainingRun(CONFIG, generated.target, tmp_path / "second")
    assert CarriedRun(tmp_path / "carry", other).restore() == len(shards.origins(generated.texts))
    assert other.prompts.read_bytes() == generated.prompts.read_bytes()
    before, after = (
        {text.origin: text for text in shards.load_all(run.texts)} for run in (generated, other)
    )  # fmt: skip
    assert before.keys() == after.keys()
    for origin, text in before.items():
        restored = after[origin]
        assert torch.equal(restored.tokens, text.tokens)
        assert torch.equal(restored.hidden[:-1], text.hidden[:-1])
        found, wanted = ((one.prompt_len, one.kind, one.temperature) for one in (restored, text))
        assert found == wanted


def test_the_time_of_a_run_limits_the_computing_of_states_too(generated: TrainingRun, tmp_path: Path) -> None:
    carry, folder = tmp_path / "carry", tmp_path / "second"
    late = TrainingRun(CONFIG, generated.target, folder, until_s=NO_TIME)
    train_draft(late, tmp_path / "draft", carry)
    assert not shards.files(late.texts)
    in_time = TrainingRun(CONFIG, generated.target, folder)
    assert CarriedRun(carry, in_time).restore() == len(shards.origins(generated.texts)), "nothing was lost"


def test_training_goes_on_from_the_carried_checkpoint(generated: TrainingRun, tmp_path: Path) -> None:
    carry = tmp_path / "carry"
    CarriedRun(carry, TrainingRun(CONFIG, generated.target, tmp_path / "second")).restore()
    second = TrainingRun(CONFIG, generated.target, tmp_path / "second", until_s=NO_TIME)
    pieces = CarriedRun(carry, second)
    second.train(lambda _: None)
    learned = torch.load(second.checkpoint, weights_only=True)["done"]
    assert 0 < learned < 500
    pieces.keep()
    first_pieces = set(carry.glob("checkpoint*"))
    assert len(first_pieces) > 1
    third = TrainingRun(CONFIG, generated.target, tmp_path / "third")
    pieces = CarriedRun(carry, third)
    pieces.restore()
    assert third.checkpoint.read_bytes() == second.checkpoint.read_bytes()
    reported: list[TrainingProgress] = []
    third.train(reported.append)
    assert reported[-1].tokens >= 500
    pieces.keep()
    assert not first_pieces & set(carry.glob("checkpoint*")), "pieces of an old checkpoint go"


def test_other_pieces_than_those_of_the_run_are_refused(generated: TrainingRun, tmp_path: Path) -> None:
    carry = tmp_path / "carry"
    other = TrainingRun(CONFIG.model_copy(update={"seed": 9}), generated.target, tmp_path / "other")
    with pytest.raises(SettingsError, match=r"a run with another target, seed, \[prompts\] or \[model\]"):
        CarriedRun(carry, other)
    empty = TrainingRun(CONFIG, generated.target, tmp_path / "empty")
    piece = next(carry.glob("texts-*"))
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    with pytest.raises(SettingsError, match="is damaged: copy it again"):
        CarriedRun(carry, empty).restore()
    piece.unlink()
    with pytest.raises(SettingsError, match=r"No such file.*: copy it again"):
        CarriedRun(carry, empty).restore()
    (carry / CONTENTS).write_text("{")
    with pytest.raises(SettingsError, match=r"carried\.json is damaged"):
        CarriedRun(carry, empty)


def test_the_shipped_settings_for_a_gpu_are_read() -> None:
    config = Config.read(Path(carried.__file__).with_name("gpu.toml"))
    assert config.device == "cuda"
    assert config.generation.max_new * config.prompts.count > 20_000_000
