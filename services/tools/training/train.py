"""Training of the draft model on generated texts, in stages. A stopped run resumes from its last checkpoint."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.drafter.hidden.model import HiddenDraft
from services.drafter.hidden.target_parts import TargetParts
from services.drafter.learning.batches import Minibatch, batches
from services.drafter.learning.loss import Losses
from services.drafter.learning.update import LossOptions, optimiser_of, set_rate, update
from services.tools.training.config import Training
from services.tools.training.shards import GeneratedText
from shared.errors import SettingsError
from shared.runtime.files import replacing

CHECKPOINT_S = 60.0
REPORT_S = 10.0
RIDGE_TOKENS = 60_000
"""Tokens that the initial linear map is fitted on."""


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a training. `agreement` and `cross_entropy` are means since the last report, by draft step."""

    stage: int
    tokens: int
    """Answer tokens learned in this stage."""
    of: int
    """Answer tokens of this stage."""
    rate: float
    """Answer tokens per second since the last report."""
    agreement: list[float]
    cross_entropy: list[float]


def frequent_tokens(texts: Sequence[GeneratedText], vocab_size: int, count: int, known: Tensor | None = None) -> Tensor:
    """Return the ids of the most frequent tokens, most frequent first.

    Of equally frequent ones those of `known` come first, as they were frequent in earlier texts, then lower ids.
    """
    seen = torch.zeros(vocab_size, dtype=torch.int64)
    for text in texts:
        seen += torch.bincount(text.tokens.long(), minlength=vocab_size)
    if known is not None:
        seen = 2 * seen + torch.zeros_like(seen).index_fill_(0, known.long(), 1)
    return seen.argsort(descending=True, stable=True)[:count]


def initialise(model: HiddenDraft, texts: Sequence[GeneratedText], parts: TargetParts, seed: int) -> None:
    """Set `spread` from the data, the last norm to the target's, and `fc` to the best linear map to the next state.

    The layers' contribution starts near zero, so that training starts from that map. Raises SettingsError if the
    texts are too short for a fit.
    """
    chosen = list(texts)
    random.Random(seed).shuffle(chosen)
    before, known, after = [], [], []
    count = 0
    with torch.no_grad():
        for text in chosen:
            known.append(model.known(parts.embedding[text.tokens.long()].cpu(), text.bottom)[1:-1])
            before.append(text.hidden[:-2].float())
            after.append(text.hidden[1:-1].float())
            count += len(after[-1])
            if count > RIDGE_TOKENS:
                break
        if count < 2:
            raise SettingsError("the run has no texts to learn from: does the target's context hold prompt and answer?")
        states = torch.cat(before)
        model.spread.copy_(states.std(0).clamp_min(1e-3))
        gain = parts.norm.float().cpu()
        model.norm.weight.copy_(gain)
        inputs = torch.cat([torch.cat(known), states / model.spread], 1)
        wanted = torch.cat(after) / torch.where(gain.abs() < 1e-2, 1e-2, gain)
        gram = inputs.T @ inputs + 1e-2 * count * torch.eye(inputs.shape[1])
        model.fc.weight.copy_(torch.linalg.solve(gram, inputs.T @ wanted).T)
        for layer in model.layers:
            for small in (layer.out, layer.down):
                small.weight.mul_(0.1)  # type: ignore[union-attr,operator]


def train(
    model: HiddenDraft,
    texts: Callable[[], Sequence[GeneratedText]],
    parts: TargetParts,
    settings: Training,
    seed: int,
    checkpoint: Path,
    report: Callable[[TrainingProgress], None],
    until_s: float = math.inf,
) -> None:
    """Run all stages. texts: returns the texts, and is called before each pass, since generation may still go on.
    until_s: time (of `time.monotonic`) at which the training stops, with a checkpoint.

    Raises SettingsError if the gradient stops being a number, if no text has a token to learn from, or if the
    checkpoint has a model of another shape.
    """
    _Trainer(model, texts, parts, settings, checkpoint, report, until_s).run(seed)


class _Trainer:
    """One training: the model, its optimiser and its progress."""

    def __init__(
        self,
        model: HiddenDraft,
        texts: Callable[[], Sequence[GeneratedText]],
        parts: TargetParts,
        settings: Training,
        checkpoint: Path,
        report: Callable[[TrainingProgress], None],
        until_s: float,
    ) -> None:
        self._model = model
        self._until_s = until_s
        self._texts = texts
        self._parts = parts
        self._settings = settings
        self._options = LossOptions(
            settings.random_rows, settings.step_decay, settings.regression, settings.clip, settings.rejection
        )
        self._checkpoint = checkpoint
        self._report = report
        self._frequent = frequent_tokens(texts(), model.config.vocab_size, settings.frequent_rows)
        self._optimiser = optimiser_of(model, fc_rate=settings.fc_rate, weight_decay=settings.weight_decay)
        self._done = 0
        """Tokens learned in the current stage."""

    def run(self, seed: int) -> None:
        stage, self._done = _resume(self._checkpoint, self._model, self._optimiser)
        # A resumed run takes the texts in another order, or it would repeat the first ones.
        order = random.Random(f"{seed} {stage} {self._done}")
        rows_random = torch.Generator().manual_seed(order.getrandbits(63))
        for number in range(stage, len(self._settings.stages)):
            self._stage(number, order, rows_random)
            if self._done < self._settings.stages[number].tokens:
                return  # the time is up
            self._done = 0
            self._save(number + 1)

    def _stage(self, number: int, order: random.Random, rows_random: torch.Generator) -> None:
        stage, settings = self._settings.stages[number], self._settings
        updates = 0
        saved = reported = time.monotonic()
        since: list[tuple[int, list[float], list[float]]] = []
        while self._done < stage.tokens:
            before = self._done
            for batch in batches(self._texts(), settings.batch_tokens, settings.drop_states, order):
                count = int(batch.learned.sum())
                if not count:
                    continue
                _set_rate(self._optimiser, stage.learning_rate, settings, updates, self._done / stage.tokens)
                loss = self._update(batch, stage.steps, rows_random)
                self._done += count
                updates += 1
                since.append((count, loss.agreement, loss.cross_entropy))
                now = time.monotonic()
                if now - reported > REPORT_S or self._done >= stage.tokens:
                    self._report(_progress(number, self._done, stage.tokens, since, now - reported))
                    since, reported = [], now
                if now - saved > CHECKPOINT_S or now >= self._until_s:
                    self._save(number)
                    saved = now
                if now >= self._until_s:
                    return
                if self._done >= stage.tokens:
                    break
            if self._done == before:
                raise SettingsError("no text has a token to learn from: allow longer answers, or more prompts")

    def _update(self, drawn: Minibatch, steps: int, rows_random: torch.Generator) -> Losses:
        """Make one step of the optimiser. Raises SettingsError if the gradient is not a number."""
        try:
            return update(
                self._model,
                self._parts,
                self._optimiser,
                drawn,
                self._frequent,
                self._options,
                steps=steps,
                random=rows_random,
            )
        except FloatingPointError as error:
            raise SettingsError(f"{error}; use a lower learning rate") from error

    def _save(self, stage: int) -> None:
        state: dict[str, Any] = {"model": self._model.state_dict(), "optimiser": self._optimiser.state_dict()}
        with replacing(self._checkpoint) as unfinished:
            torch.save({**state, "stage": stage, "done": self._done}, unfinished)


def _progress(
    stage: int, done: int, of: int, since: Sequence[tuple[int, list[float], list[float]]], seconds: float
) -> TrainingProgress:
    total = sum(count for count, _, _ in since)

    def mean(which: int) -> list[float]:
        columns = zip(*(entry[which] for entry in since), strict=True)
        return [sum(n * v for (n, _, _), v in zip(since, column, strict=True)) / total for column in columns]

    return TrainingProgress(stage, done, of, total / max(seconds, 1e-9), mean(1), mean(2))


def _set_rate(
    optimiser: torch.optim.Optimizer, highest: float, settings: Training, updates: int, progress: float
) -> None:
    cosine = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    set_rate(optimiser, highest * min(1.0, (updates + 1) / settings.warm_up) * cosine)


def _resume(path: Path, model: HiddenDraft, optimiser: torch.optim.Optimizer) -> tuple[int, int]:
    if not path.is_file():
        return 0, 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise SettingsError(
            f"{path} has a model of another shape; delete it to train anew, or restore [model] in the settings"
        ) from error
    optimiser.load_state_dict(state["optimiser"])
    return int(state["stage"]), int(state["done"])
