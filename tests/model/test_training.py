"""Training of a draft for a tiny target, from prompts to a folder that the drafter loads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import made_folders
import pytest
import tiny
import torch
from tiny_families import FAMILIES
from transformers import LlamaConfig, Qwen3Config

from services.drafter.control import Controller
from services.drafter.hidden import weights
from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.engine import DraftEngine
from services.drafter.learning import update
from services.drafter.learning.loss import Losses, losses
from services.drafter.sources.hidden import HiddenDrafts
from services.tools.cli.draft_stages import train_draft
from services.tools.training import prompts, shards
from services.tools.training.answering import BatchTarget, EngineTarget
from services.tools.training.config import Config
from services.tools.training.evaluate import Costs, Drafted, Summary, rounds
from services.tools.training.generate import Assignment, generate
from services.tools.training.run import TrainingRun
from services.tools.training.train import TrainingProgress, frequent_tokens
from shared.engine import Engine, Step
from shared.errors import ModelError, SettingsError
from shared.models.folder import ModelFolder

SETTINGS: dict[str, Any] = {
    "seed": 3,
    "target_dtype": "float32",
    "prompts": {"count": 40, "free_texts": 4, "held_out": 11},
    "generation": {"sessions": 8, "max_prompt": 48, "max_new": 24, "shard_tokens": 1000},
    # Two layers are the whole target, so a correct training can reach perfect drafts.
    "model": {"bottom_layers": 2},
    "training": {
        "stages": [
            {"steps": 1, "tokens": 12_000, "learning_rate": 2e-3},
            {"steps": 3, "tokens": 6_000, "learning_rate": 1e-3},
        ],
        "batch_tokens": 512,
        "frequent_rows": 200,
        "random_rows": 50,
        "head_rows": 0,
    },
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = tmp_path_factory.mktemp("target")
    backend = made_folders.byte_level()
    made_folders.write_folder(folder, backend)
    config = LlamaConfig.from_dict({**tiny.LLAMA.to_dict(), "vocab_size": backend.get_vocab_size()})
    tiny.make(folder, config)
    return ModelFolder(folder)


@pytest.fixture(scope="module")
def run(target: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """A run with generated texts."""
    made = TrainingRun(Config.model_validate(SETTINGS), target, tmp_path_factory.mktemp("run"))
    made.write_prompts()
    made.generate_all(lambda _: None)
    made.generate_held_out(made.held_out, 3, lambda _: None)
    return made


@pytest.fixture(scope="module")
def trained(run: TrainingRun) -> tuple[HiddenDraftFolder, list[TrainingProgress]]:
    """The draft, and the progress reported during its training."""
    reported: list[TrainingProgress] = []
    model = run.train(reported.append)
    run.save(model, run.folder / "draft")
    return HiddenDraftFolder.open(run.folder / "draft"), reported


def draft_for(run: TrainingRun, folder: HiddenDraftFolder) -> list[Drafted]:
    # A target of random weights chooses by tokens farther back than the window of a served draft.
    source = HiddenDrafts(DraftEngine(folder, run.target, dtype="float32"), window=1000)
    texts = list(shards.load_all(run.held_out))
    return list(rounds(source, ("hidden",), Controller("fixed", 3), texts))


def test_texts_have_the_states_that_the_target_computes(run: TrainingRun) -> None:
    texts = list(shards.load_all(run.texts))
    assert {text.kind for text in texts} > {"chat", "code", "text"}
    text = max(texts, key=lambda text: len(text.tokens) - text.prompt_len)
    engine = Engine(run.target.path, dtype="float32", keep_hidden=True)
    ids = text.tokens.tolist()
    engine.attach("again", ids)
    engine.forward([Step("again", ids[:-1], rows=0)])
    assert torch.equal(engine.hidden("again", 0, len(ids)).bfloat16(), text.hidden[:-1])


def test_the_batch_target_computes_what_the_engine_computes(run: TrainingRun) -> None:
    texts = sorted(shards.load_all(run.texts), key=lambda text: -len(text.tokens))[:6]
    engine = Engine(run.target.path, dtype="float32", budget_tokens=6 * 128, keep_hidden=True)
    batch = BatchTarget(run.target, texts=3, longest=72, threads=1, dtype=torch.float32)
    serving = EngineTarget(engine, 6)
    # Other texts come and go between steps, so that blocks are used again.
    for pair in (texts[:3], texts[3:]):
        for text in pair:
            batch.start(str(text.origin))
            serving.start(str(text.origin))
        done = [0] * len(pair)
        while any(n < len(text.tokens) for n, text in zip(done, pair, strict=True)):
            steps = [
                Step(str(text.origin), text.tokens[n : n + (24 if n == 0 else 1)].tolist())
                for n, text in zip(done, pair, strict=True)
                if n < len(text.tokens)
            ]
            logits = batch.forward(steps)
            assert logits.shape == (len(steps), run.target.vocab_size)
            torch.testing.assert_close(logits, serving.forward(steps), atol=1e-4, rtol=1e-4)
            done = [min(len(text.tokens), n + (24 if n == 0 else 1)) for n, text in zip(done, pair, strict=True)]
        for text in pair:
            states = batch.states(str(text.origin), len(text.tokens))
            expected = serving.states(str(text.origin), len(text.tokens))
            torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
            batch.release(str(text.origin))


def test_texts_of_the_batch_target_are_the_targets(run: TrainingRun) -> None:
    asked = [Assignment(i, "chat", [5, 6, 7 + i], 0.0, 20) for i in range(9)]
    batch = BatchTarget(run.target, texts=4, longest=32, threads=1, dtype=torch.float32)
    made = {text.origin: text for text in generate(batch, asked, frozenset(), 1)}
    assert sorted(made) == list(range(9)), "4 at once, each in its turn"
    engine = Engine(run.target.path, dtype="float32", keep_hidden=True)
    alone = {text.origin: text for text in generate(EngineTarget(engine, 1), asked, frozenset(), 1)}
    assert all(made[i].tokens.tolist() == alone[i].tokens.tolist() for i in made)
    assert all(len(text.tokens) == 23 and len(text.hidden) == 23 for text in made.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_drawn_as_often_as_the_softmax_says(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(2)
    logits = (torch.randn(1, 700, generator=random) * 2 + 200).to(dtype)
    texts = 8000
    asked = Assignment(0, "chat", [1], 0.7, 1)
    target = _Always(logits, texts)
    drawn = [int(text.tokens[-1]) for text in generate(target, [asked] * texts, frozenset(), 1)]
    shares = torch.softmax(logits[0].float() / 0.7, -1)
    seen = torch.bincount(torch.tensor(drawn), minlength=700) / texts
    spread = (shares * (1 - shares) / texts).sqrt()
    assert ((seen - shares).abs() < 6 * spread + 1 / texts).all()
    assert float((seen - shares).abs().sum()) < 1.5 * float(spread.sum())
    greedy = Assignment(0, "chat", [1], 0.0, 1)
    (text,) = generate(_Always(logits, 1), [greedy], frozenset(), 1)
    assert int(text.tokens[-1]) == int(logits.argmax())


class _Always:
    """A target whose logits never change."""

    longest = 8

    def __init__(self, logits: torch.Tensor, texts: int) -> None:
        self.logits, self.texts = logits, texts

    def start(self, name: str) -> None: ...

    def forward(self, steps: Sequence[Step]) -> torch.Tensor:
        return self.logits.expand(len(steps), -1).clone()

    def states(self, name: str, count: int) -> torch.Tensor:
        return torch.zeros(count, 4)

    def release(self, name: str) -> None: ...


def test_a_resumed_generation_answers_only_the_missing_prompts(run: TrainingRun) -> None:
    before = sorted(shards.origins(run.texts))
    shards.files(run.texts)[-1].unlink()
    assert len(shards.origins(run.texts)) < len(before)
    run.generate_all(lambda _: None)
    origins = [text.origin for text in shards.load_all(run.texts)]
    assert sorted(origins) == before


def test_a_resumed_generation_of_held_out_texts_gives_the_same_texts(run: TrainingRun, tmp_path: Path) -> None:
    folder = tmp_path / "held_out"
    unfinished = tmp_path / "held_out.part"
    unfinished.mkdir()
    kept = shards.files(run.held_out)[0]
    shutil.copy(kept, unfinished)
    count = len(shards.load(kept))
    lengths: list[int] = []
    run.generate_held_out(folder, 3, lengths.append)
    texts = {text.origin: text.tokens.tolist() for text in shards.load_all(folder)}
    assert texts == {text.origin: text.tokens.tolist() for text in shards.load_all(run.held_out)}
    assert len(lengths) == len(texts) - count > 0
    assert not unfinished.exists()


def test_final_texts_lie_apart_from_those_for_evaluation(run: TrainingRun) -> None:
    lengths: list[int] = []
    assert run.evaluation_texts(lengths.append) == run.held_out
    assert not lengths, "the run has these texts"
    final = run.evaluation_texts(lengths.append, final=True)
    asked, others = (
        {tuple(text.tokens[: text.prompt_len].tolist()) for text in shards.load_all(folder)}
        for folder in (final, run.held_out)
    )
    assert len(lengths) == 3 * len(asked) == 33
    assert final != run.held_out
    assert not asked & others


def test_a_target_without_these_layers_is_refused_before_generation(run: TrainingRun, tmp_path: Path) -> None:
    deeper = Config.model_validate(SETTINGS | {"model": {"bottom_layers": 3}})
    with pytest.raises(SettingsError, match="bottom_layers is 3"):
        train_draft(TrainingRun(deeper, run.target, tmp_path / "deeper"), tmp_path / "draft")
    other = made_folders.write_llama(tmp_path / "other", made_folders.byte_level(), model_type="gpt2")
    with pytest.raises(ModelError, match="is not a model that the compiled pass covers"):
        train_draft(TrainingRun(run.config, ModelFolder(other), tmp_path / "run"), tmp_path / "draft")
    assert list((tmp_path / "run").iterdir()) == list((tmp_path / "deeper").iterdir()) == []


def test_a_target_of_another_family_gets_a_draft_without_its_layers(target: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "qwen3"
    made_folders.write_folder(folder, made_folders.byte_level())
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(tiny.LLAMA, name) for name in kept}
    tiny.make(folder, Qwen3Config(**sizes, head_dim=16, vocab_size=target.vocab_size, max_position_embeddings=1024))
    short = {key: value for key, value in SETTINGS.items() if key != "model"}
    stage = {"steps": 1, "tokens": 3_000, "learning_rate": 2e-3}
    config = Config.model_validate(short | {"training": SETTINGS["training"] | {"stages": [stage]}})
    run = TrainingRun(config, ModelFolder(folder), tmp_path / "run")
    run.write_prompts()
    run.generate_all(lambda _: None)
    reported: list[TrainingProgress] = []
    run.save(run.train(reported.append), tmp_path / "draft")
    made = HiddenDraftFolder.open(tmp_path / "draft")
    assert made.fits(run.target)
    assert made.card.model.bottom_layers == 0
    assert reported[-1].agreement[0] > 0.1, "by chance it is 1 of some 560"
    DraftEngine(made, run.target, dtype="float32")
    asked = Config.model_validate(SETTINGS)
    with pytest.raises(SettingsError, match=r"bottom_layers is 2, .*\(model_type 'qwen3'\): set it to 0"):
        TrainingRun(asked, ModelFolder(folder), tmp_path / "run").config_of_model()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "llama-llama3",
        "qwen3",
        "gemma2",
        "gemma3-text-part",
        "mistral3-text-part",
        "qwen3-vl-text-part",
        "granite",
        "olmo3",
        "phi3-long",
    ],
)
def test_targets_of_many_families_get_a_draft(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "target"
    made_folders.write_folder(folder, made_folders.byte_level(merges=10))
    FAMILIES[name](folder)
    stage = {"steps": 1, "tokens": 500, "learning_rate": 1e-3}
    config = Config.model_validate(
        {
            "target_dtype": "float32",
            "prompts": {"count": 6, "free_texts": 2, "held_out": 11},
            "generation": {"sessions": 4, "max_prompt": 32, "max_new": 16, "shard_tokens": 1000},
            "training": SETTINGS["training"] | {"stages": [stage]},
        }
    )
    run = TrainingRun(config, ModelFolder(folder), tmp_path / "run")
    train_draft(run, tmp_path / "draft")
    made = HiddenDraftFolder.open(tmp_path / "draft")
    assert made.fits(run.target)
    DraftEngine(made, run.target, dtype="float32")


def test_an_unusable_folder_is_refused_before_generation(run: TrainingRun, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(SettingsError, match="File exists"):
        TrainingRun(run.config, run.target, taken)
    with pytest.raises(SettingsError, match="File exists"):
        train_draft(TrainingRun(run.config, run.target, tmp_path / "run"), taken)
    assert not list((tmp_path / "run").iterdir())


def test_too_many_prompts_are_refused(run: TrainingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = prompts.Corpus([{"template": [{"id": "only", "kind": "chat", "text": "Hello!"}]}], {})
    monkeypatch.setattr(prompts, "corpus", lambda: few)
    with pytest.raises(SettingsError, match=r"prompts\.count: .* Ask for fewer"):
        TrainingRun(run.config, run.target, tmp_path).write_prompts()


def test_a_run_without_texts_is_refused(run: TrainingRun, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no texts"):
        TrainingRun(run.config, run.target, tmp_path).train(lambda _: None)


@pytest.mark.slow
def test_the_draft_learns_the_targets_choices(
    run: TrainingRun, trained: tuple[HiddenDraftFolder, list[TrainingProgress]]
) -> None:
    folder, reported = trained
    assert [progress.stage for progress in reported][-1] == 1
    assert len(reported[-1].agreement) == 3
    summary = Summary.of(draft_for(run, folder), Costs(50, 1, 5), 3)
    assert summary.by_position[0] > 0.6
    assert summary.tokens_per_round > 1.8


@pytest.mark.parametrize(("supported", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_only_a_device_with_bfloat16_instructions_trains_in_it(
    run: TrainingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: torch.dtype
) -> None:
    """The target's weights are bfloat16 in both cases."""
    computed: set[torch.dtype] = set()

    def watched(estimates: Sequence[torch.Tensor], *others: Any, **options: Any) -> Losses:
        computed.update(estimate.dtype for estimate in estimates)
        return losses(estimates, *others, **options)

    monkeypatch.setattr(update, "computes_bfloat16", lambda _: supported)
    monkeypatch.setattr(update, "losses", watched)
    stages = {"stages": [{"steps": 2, "tokens": 1, "learning_rate": 1e-3}]}
    short = SETTINGS | {"target_dtype": "bfloat16", "training": SETTINGS["training"] | stages}
    made = TrainingRun(Config.model_validate(short), run.target, tmp_path)
    shutil.copytree(run.texts, made.texts, dirs_exist_ok=True)
    made.train(lambda _: None)
    assert computed == {dtype}


@pytest.mark.slow
def test_a_stopped_training_resumes_from_its_checkpoint(
    run: TrainingRun, trained: tuple[HiddenDraftFolder, list[TrainingProgress]]
) -> None:
    again: list[TrainingProgress] = []
    model = run.train(again.append)
    assert again == [], "every stage was done"
    source = torch.load(run.folder / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(source[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_draft_is_trained_further(
    run: TrainingRun, trained: tuple[HiddenDraftFolder, list[TrainingProgress]], tmp_path: Path
) -> None:
    folder, reported = trained
    stage = {"steps": 1, "tokens": 500, "learning_rate": 1e-4}
    more = Config.model_validate(SETTINGS | {"training": SETTINGS["training"] | {"stages": [stage]}})
    further = TrainingRun(more, run.target, tmp_path / "run", folder)
    shutil.copytree(run.texts, further.texts)
    first: list[TrainingProgress] = []
    further.save(further.train(first.append), tmp_path / "draft")
    assert first[0].agreement[0] > 0.8 * reported[-1].agreement[0], "it began where the other ended"
    assert not torch.equal(*(weights.load(one, torch.float32)[0].fc.weight for one in (
        folder, HiddenDraftFolder.open(tmp_path / "draft")
    )))  # fmt: skip
    other = Config.model_validate(SETTINGS | {"model": {"bottom_layers": 1}})
    with pytest.raises(SettingsError, match=r"of another shape than \[model\] .* leave out --from"):
        TrainingRun(other, run.target, tmp_path / "run", folder).config_of_model()


def test_known_tokens_win_among_equally_frequent_ones() -> None:
    text = shards.GeneratedText(torch.tensor([3, 3, 5]), torch.zeros(3, 4), 1, 0, 1.0, "chat")
    assert frequent_tokens([text], 8, 4).tolist() == [3, 5, 0, 1]
    assert frequent_tokens([text], 8, 4, torch.tensor([1, 6])).tolist() == [3, 5, 1, 6]


@pytest.mark.slow
def test_a_checkpoint_of_another_shape_is_refused(
    run: TrainingRun, trained: tuple[HiddenDraftFolder, list[TrainingProgress]]
) -> None:
    two = Config.model_validate(SETTINGS | {"model": {"bottom_layers": 2, "layers": 2}})
    with pytest.raises(SettingsError, match="another shape"):
        TrainingRun(two, run.target, run.folder).train(lambda _: None)


@pytest.mark.slow
def test_a_draft_for_another_vocabulary_is_refused(
    trained: tuple[HiddenDraftFolder, list[TrainingProgress]], tmp_path: Path
) -> None:
    other = made_folders.write_folder(tmp_path, made_folders.byte_level(merges=10), hidden_size=64)
    with pytest.raises(ModelError, match="wisp draft train"):
        DraftEngine(trained[0], ModelFolder(other))


def test_settings_read_back_from_their_file(tmp_path: Path) -> None:
    config = Config.model_validate(SETTINGS)
    path = tmp_path / "settings.toml"
    path.write_text(config.as_toml())
    assert Config.read(path) == config


@pytest.mark.parametrize("text", ["sed = 1", "seed = 'a'", "[training]\nstages = []", "seed = "])
def test_wrong_settings_are_refused_with_the_files_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"settings\.toml"):
        Config.read(path)


def test_a_binary_settings_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(b"seed = \xff")
    with pytest.raises(SettingsError, match=r"settings\.toml"):
        Config.read(path)
