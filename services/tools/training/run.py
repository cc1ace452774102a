"""A training run's folder and its stages: prompts, generation, held-out texts, training. A stopped stage resumes.

prompts.jsonl           the prompts, one a line
texts/*.safetensors     the target's answers with their hidden states (`shards`)
held_out/               answers to prompts kept out of training; `held_out.part` until complete
controller_texts/       further answers to such prompts, from which the controller learns
final/                  answers to the final prompts, which measure a draft that is decided
checkpoint.pt           the draft model in training
"""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from services.drafter.hidden import weights
from services.drafter.hidden.card import HiddenDraftConfig, HiddenDraftFolder
from services.drafter.hidden.model import HiddenDraft
from services.drafter.hidden.target import layer_config, not_plain
from services.drafter.hidden.target_parts import TargetParts, target_parts
from services.drafter.learning.loss import bottom_outputs
from services.tools.training import prompts as corpus
from services.tools.training import shards
from services.tools.training.answering import AnsweringTarget, BatchTarget, EngineTarget, batch_target_fits
from services.tools.training.config import Config
from services.tools.training.generate import Assignment, generate, write_shards
from services.tools.training.train import TrainingProgress, frequent_tokens, initialise, train
from shared.engine import Engine
from shared.engine.engine import DTYPES
from shared.errors import EngineError, SettingsError
from shared.kernels.layout import BLOCK
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.runtime.files import behind_links, replacing

EVALUATED = (0.0, 0.7, 1.0)
"""Temperatures of the texts for evaluation."""
EVALUATED_TOKENS = 128


class TrainingRun:
    """A training run of a draft model for `target`, with its files in `folder`."""

    def __init__(
        self,
        config: Config,
        target: ModelFolder,
        folder: Path,
        start: HiddenDraftFolder | None = None,
        until_s: float = math.inf,
    ) -> None:
        """start: a draft whose weights the training begins with; default: weights fitted to the run's texts. until_s:
        time (of `time.monotonic`) at which generation and training stop, so that another run goes on.
        """
        self.config = config
        self.target = target
        self.folder = created(folder)
        self.start = start
        self._until_s = until_s

    @property
    def time_is_up(self) -> bool:
        """True if the run has to stop: the stage that it is in may be unfinished."""
        return time.monotonic() >= self._until_s

    @property
    def prompts(self) -> Path:
        """File of the prompts."""
        return self.folder / "prompts.jsonl"

    @property
    def checkpoint(self) -> Path:
        """File of the draft model in training."""
        return self.folder / "checkpoint.pt"

    @property
    def texts(self) -> Path:
        """Folder of the texts for training."""
        return self.folder / "texts"

    def write_prompts(self) -> int:
        """Draw the run's prompts if there are none yet; return their number."""
        if not self.prompts.is_file():
            _write_lines(self.prompts, self._assignments())
        return sum(1 for _ in self.prompts.open())

    def _assignments(self) -> Iterator[Assignment]:
        plan, settings = self.config.prompts, self.config.generation
        tokenizer = Tokenizer(self.target)
        drawn = _drawn(self.config.seed, plan.count, held_out=False)
        passages = corpus.free_text(self.config.seed, plan.free_texts)
        rng = random.Random(self.config.seed)
        every = max(1, len(drawn) // max(1, len(passages)))
        origin = 0
        for i, prompt in enumerate(drawn):
            if i % every == 0 and i // every < len(passages):
                ids = tokenizer.encode(passages[i // every])[: settings.max_prompt + settings.max_new - 1]
                if len(ids) > 8:
                    yield Assignment(origin, "text", ids[:1], 1.0, 1, ids[1:])
                    origin += 1
            temperature = rng.choice(settings.temperatures)
            yield Assignment(
                origin, prompt.kind, _encoded(prompt, tokenizer, settings.max_prompt), temperature, settings.max_new
            )
            origin += 1

    def generate_all(self, report: Callable[[int], None]) -> None:
        """Answer the prompts, in one process per worker. Raises EngineError if one of them fails."""
        workers = self.config.generation.workers
        if workers == 1:
            self.generate(0, report)
            return
        context = multiprocessing.get_context("spawn")
        counts = context.SimpleQueue()
        arguments = (self.config.model_dump_json(), self.target.path, self.folder, self._until_s, counts)
        processes = [context.Process(target=_work, args=(i, *arguments), daemon=True) for i in range(workers)]
        for process in processes:
            process.start()
        running = workers
        while running:
            while not counts.empty():
                count = counts.get()
                running -= count == 0
                report(count)
            if any(process.exitcode for process in processes):
                raise EngineError("a generation process failed; its finished texts are kept: run the command again")
            time.sleep(0.2)

    def generate(self, worker: int, report: Callable[[int], None]) -> None:
        """Answer the prompts of one worker's share that have no answer yet."""
        settings = self.config.generation
        done = shards.origins(self.texts)
        mine = [
            assignment
            for assignment in _read_lines(self.prompts)
            if assignment.origin % settings.workers == worker and assignment.origin not in done
        ]
        texts = generate(
            self._answering_target(),
            mine,
            frozenset(self.target.eos_ids),
            self.config.seed * 1_000_003 + worker * 1009 + len(done),
        )
        write_shards(texts, self.texts, f"worker{worker}", settings.shard_tokens, report, self._until_s)

    def with_states(self, groups: Iterable[Sequence[shards.GeneratedText]]) -> Iterator[list[shards.GeneratedText]]:
        """Compute the target's states of texts that have come without them; yield each group when it is computed."""
        target: AnsweringTarget | None = None
        for texts in groups:
            target = target or self._answering_target()
            given = [
                Assignment(
                    text.origin,
                    text.kind,
                    text.tokens[: text.prompt_len].tolist(),
                    text.temperature,
                    0,
                    text.tokens[text.prompt_len :].tolist(),
                )
                for text in texts
            ]
            yield list(generate(target, given, frozenset(), 0))

    @property
    def held_out(self) -> Path:
        """Folder of the texts for evaluation."""
        return self.folder / "held_out"

    @property
    def controller_texts(self) -> Path:
        """Folder of the texts for the controller: other prompts of the same held-out templates."""
        return self.folder / "controller_texts"

    @property
    def final(self) -> Path:
        """Folder of the texts for final figures."""
        return self.folder / "final"

    def evaluation_texts(self, report: Callable[[int], None], *, final: bool = False) -> Path:
        """Answer the prompts for evaluation, or the final ones, unless the run has them; return the texts' folder."""
        folder = self.final if final else self.held_out
        self.generate_held_out(folder, self.config.seed, report, corpus.FINAL if final else True)
        return folder

    def generate_held_out(
        self, folder: Path, seed: int, report: Callable[[int], None], held_out: corpus.HeldOut = True
    ) -> None:
        """Answer prompts kept out of training, each at every temperature of EVALUATED, unless `folder` has them."""
        if not shards.files(folder):
            drawn = _drawn(seed, self.config.prompts.held_out, held_out=held_out)
            self._answer_held_out(folder, drawn, EVALUATED, report)

    def generate_domain(
        self, kind: str, count: int, temperature: float, report: Callable[[int], None]
    ) -> list[shards.GeneratedText]:
        """Answer prompts of one kind that were kept out of training, unless the run has them; return the texts."""
        folder = self.folder / f"{kind}-{count}-{temperature:g}"
        if not shards.files(folder):
            drawn = _drawn(self.config.seed, count, held_out=True, kinds=[kind])
            self._answer_held_out(folder, drawn, [temperature], report)
        return sorted(shards.load_all(folder), key=lambda text: text.origin)

    def _answer_held_out(
        self,
        folder: Path,
        drawn: Sequence[corpus.CorpusPrompt],
        temperatures: Sequence[float],
        report: Callable[[int], None],
    ) -> None:
        """Answer each prompt at each temperature with the noise of serving; rename the folder when it is complete."""
        folder = behind_links(folder)
        unfinished = folder.with_name(f"{folder.name}.part")
        done = shards.origins(unfinished)
        settings = self.config.generation
        tokenizer = Tokenizer(self.target)
        asked: list[Assignment] = []
        for prompt in drawn:
            ids = _encoded(prompt, tokenizer, settings.max_prompt)
            for temperature in temperatures:
                most = min(EVALUATED_TOKENS, settings.max_new)
                asked.append(Assignment(len(asked), prompt.kind, ids, temperature, most))
        missing = [assignment for assignment in asked if assignment.origin not in done]
        target = EngineTarget(self._engine(), settings.sessions)
        texts = generate(target, missing, frozenset(self.target.eos_ids), 0, serving_noise=True)
        write_shards(texts, unfinished, "texts", settings.shard_tokens, report, self._until_s)
        if not self.time_is_up:
            unfinished.replace(folder)

    @property
    def bottom_layers(self) -> int:
        """Number of the target's first layers that the draft runs: none if they are no plain Llama layers."""
        return 0 if not_plain(self.target) else self.config.model.bottom_layers

    def config_of_model(self) -> HiddenDraftConfig:
        """Return the draft model's shape. Raises ModelError or SettingsError if the target lacks these layers."""
        shape = self.config.model
        layer = layer_config(self.target).model_copy(update={"rope_theta": shape.rope_theta})
        layers = self.target.config.get("num_hidden_layers", 0)
        if "bottom_layers" in shape.model_fields_set and shape.bottom_layers and (reason := not_plain(self.target)):
            raise SettingsError(
                f"model.bottom_layers is {shape.bottom_layers}, and a draft cannot run the first layers of "
                f"{self.target.path} ({reason}): set it to 0, or leave it out"
            )
        if self.bottom_layers and shape.bottom_layers > layers:
            raise SettingsError(
                f"model.bottom_layers is {shape.bottom_layers}, {self.target.path} has {layers} layers; set it lower"
            )
        wanted = HiddenDraftConfig(
            layer=layer,
            layers=shape.layers,
            bottom_layers=self.bottom_layers,
            vocab_size=self.target.vocab_size,
        )
        if self.start is not None and (not self.start.fits(self.target) or self.start.card.model != wanted):
            raise SettingsError(
                f"the draft {self.start.path} is for another target than {self.target.path}, or of another shape than "
                "[model] of the settings: name a draft that fits both, or leave out --from"
            )
        return wanted

    def texts_of(self, folder: Path, parts: TargetParts) -> list[shards.GeneratedText]:
        """Return the texts of a folder, with the outputs of the target's first layers if the draft uses them."""
        if not parts.bottom:
            return list(shards.load_all(folder))
        kept = folder / f"bottom-{len(parts.bottom)}"
        found = [shards.with_bottom(path, kept, partial(bottom_outputs, parts)) for path in shards.files(folder)]
        return [text for shard in found for text in shard]

    def parts(self, bottom_layers: int) -> TargetParts:
        """Return the parts of the target that a draft with this many bottom layers uses."""
        return target_parts(self.target, bottom_layers, DTYPES[self.config.target_dtype]).to(self.config.device)

    def train(self, report: Callable[[TrainingProgress], None]) -> HiddenDraft:
        """Train the model, from the checkpoint if there is one, and return it.

        It is not trained to the end if the time is up.
        """
        settings = self.config.training
        torch.set_num_threads(settings.threads)
        torch.manual_seed(self.config.seed)
        parts = self.parts(self.bottom_layers)
        model = HiddenDraft(self.config_of_model())
        if self.start is not None:
            model = weights.load(self.start, torch.float32)[0].train()
        elif not self.checkpoint.is_file():
            initialise(model, self.texts_of(self.texts, parts), parts, self.config.seed)
        model.to(self.config.device)
        train(
            model,
            lambda: self.texts_of(self.texts, parts),
            parts,
            settings,
            self.config.seed,
            self.checkpoint,
            report,
            self._until_s,
        )
        return model.cpu()

    def save(self, model: HiddenDraft, out: Path) -> None:
        """Write the draft, with a head of the texts' most frequent tokens."""
        count = self.config.training.head_rows or self.target.vocab_size
        texts = list(shards.load_all(self.texts))
        known = weights.load(self.start, torch.float32)[1] if self.start is not None else None
        ids = frequent_tokens(texts, self.target.vocab_size, count, known)
        weights.save(out, model, ids, self.target)

    def _answering_target(self) -> AnsweringTarget:
        settings, config = self.config.generation, self.config
        if not batch_target_fits(self.target, config.device, config.target_dtype):
            return EngineTarget(self._engine(), settings.sessions)
        longest = settings.max_prompt + settings.max_new
        return BatchTarget(self.target, texts=settings.sessions, longest=longest, threads=settings.threads)

    def _engine(self) -> Engine:
        settings = self.config.generation
        longest = -(-(settings.max_prompt + settings.max_new) // BLOCK) * BLOCK
        return Engine(
            self.target.path,
            dtype=self.config.target_dtype,
            device=self.config.device,
            threads=settings.threads,
            budget_tokens=settings.sessions * longest,
            keep_hidden=True,
        )


def created(folder: Path) -> Path:
    """Create the folder if it is missing, and return it. Raises SettingsError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{folder} cannot be created as a folder: {error.strerror}") from error
    return folder


def _work(worker: int, config: str, target: Path, folder: Path, until_s: float, counts: SimpleQueue[int]) -> None:
    """Run a worker's process, which puts each text's length and at the end a 0 into `counts`."""
    run = TrainingRun(Config.model_validate_json(config), ModelFolder(target), folder, until_s=until_s)
    run.generate(worker, counts.put)
    counts.put(0)


def _drawn(
    seed: int, count: int, *, held_out: corpus.HeldOut, kinds: Sequence[str] | None = None
) -> list[corpus.CorpusPrompt]:
    """Draw prompts of the corpus. Raises SettingsError if it makes fewer."""
    try:
        return corpus.sample(seed, count, held_out, kinds)
    except ValueError as error:
        raise SettingsError(f"prompts.{'held_out' if held_out else 'count'}: {error}") from error


def _encoded(prompt: corpus.CorpusPrompt, tokenizer: Tokenizer, longest: int) -> list[int]:
    """Return the last `longest` of the prompt's tokens."""
    if prompt.turns is None:
        ids = tokenizer.encode(prompt.text or "")
    else:
        ids = tokenizer.render_chat([asdict(turn) for turn in prompt.turns])
    return ids[-longest:]


def _write_lines(path: Path, assignments: Iterator[Assignment]) -> None:
    with replacing(path) as unfinished, unfinished.open("w") as file:
        for assignment in assignments:
            file.write(json.dumps(asdict(assignment)) + "\n")


def _read_lines(path: Path) -> list[Assignment]:
    with path.open() as file:
        return [Assignment(**json.loads(line)) for line in file]
