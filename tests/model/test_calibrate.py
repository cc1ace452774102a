"""`wisp calibrate`: the times of an architecture, measured with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from services.tools.local.progress import Progress
from services.tools.twin.calibrate import batches_for, calibrate, config_of
from services.tools.twin.random_model import random_model
from shared import cost
from shared.engine import Engine, Step
from shared.errors import ModelError
from shared.twin.files import load_target
from shared.twin.profile import MeasuredProfile, parse_target


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config.json of a tiny model."""
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    tiny.LLAMA.save_pretrained(folder)
    made = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(made | {"architectures": ["LlamaForCausalLM"]}))
    return folder / "config.json"


def test_random_weights_of_an_architecture_can_be_computed(config: Path, tmp_path: Path) -> None:
    count = random_model(config, tmp_path / "random")
    assert count > 10_000
    engine = Engine(tmp_path / "random", budget_tokens=256)
    engine.attach("s", [])
    assert engine.forward([Step("s", [1, 2, 3])]).logits.isfinite().all()


def test_no_architecture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelError, match="makes no causal language model"):
        random_model(tmp_path / "config.json", tmp_path / "random")


def test_batches_fit_the_memory_and_the_context() -> None:
    batches = batches_for(4096, 1000)
    assert batches
    for batch in batches:
        assert batch.jobs * (batch.context + batch.new) <= 4096
        assert batch.context + batch.new <= 1000
    assert {(batch.jobs, batch.new) for batch in batches} >= {(1, 1), (1, 9), (8, 5), (1, 256)}
    assert batches[0].jobs * batches[0].new == 1


@pytest.mark.slow
def test_a_calibration_becomes_a_profile(config: Path, tmp_path: Path) -> None:
    profile = calibrate(config, "tiny", "bfloat16", "cpu", 1, 4096, 3.0, Progress())
    assert profile.kv_tokens == 4096
    assert profile.facts["threads"] == 1
    assert profile.facts["dtype"] == "bfloat16"
    assert len(profile.batches) > 20
    one, many = (profile.time_ms(cost.shape_of([(1, 65, 1)] * jobs)) for jobs in (1, 32))
    assert 0 < one < many
    assert all(min(batch.times_ms) > 0 for batch in profile.batches)
    path = tmp_path / "mine.json"
    path.write_text(profile.model_dump_json())
    assert load_target(str(path)) == profile
    more = calibrate(config, "tiny", "bfloat16", "cpu", 1, 4096, 1.0, Progress(), profile)
    first, again = profile.batches[0].times_ms, more.batches[0].times_ms
    assert again[: len(first)] == first
    assert len(again) > len(first)


@pytest.mark.slow
def test_the_command_writes_a_profile_that_names_machine_and_model(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer

    from services.tools.twin.calibrate import main

    app = typer.Typer()
    app.command()(main)
    path = tmp_path / "out" / "mine.json"
    options = ["--seconds", "1", "--cache-tokens", "2048", "--out", str(path)]
    done = CliRunner().invoke(app, [str(config), *options])
    assert done.exit_code == 0, done.output
    profile = parse_target(path.read_text(), "mine")
    assert isinstance(profile, MeasuredProfile)
    assert "tiny-llama in bfloat16" in profile.description
    assert profile.facts["weights"] > 10_000


def test_a_model_is_named_by_its_folder_or_its_configuration(config: Path) -> None:
    for given in (config, config.parent):
        assert config_of(str(given), Progress()) == (config, "tiny-llama")
