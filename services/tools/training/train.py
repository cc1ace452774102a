"""Training the draft model on generated texts, in stages; a stopped run goes on from its last checkpoint."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.drafter.hidden.model import HiddenDraft
from services.drafter.hidden.target import TargetParts
from services.tools.training.config import Training
from services.tools.training.loss import HeadRows, losses, unrolled
from services.tools.training.shards import Text
from shared.errors import SettingsError

CHECKPOINT_S = 120.0
RIDGE_TOKENS = 60_000


@dataclass(frozen=True)
class Progress:
    """Where training stands. `agreement` and `cross_entropy` are means since the last report, by draft step."""

    stage: int
    tokens: int
    of: int
    rate: float
    """Answer tokens per second, lately."""
    agreement: list[float]
    cross_entropy: list[float]


def frequent_tokens(texts: Sequence[Text], vocab_size: int, count: int) -> Tensor:
    """Ids of the most frequent tokens, most frequent first; those never seen follow in order of id."""
    seen = torch.zeros(vocab_size, dtype=torch.int64)
    for text in texts:
        seen += torch.bincount(text.tokens.long(), minlength=vocab_size)
    return seen.argsort(descending=True, stable=True)[:count]


def initialise(model: HiddenDraft, texts: Sequence[Text], parts: TargetParts, seed: int) -> None:
    """Set `spread` from the data, the last norm to the target's, and `fc` to the best linear guess of the next state.

    The layers' own part begins near zero, so that training starts from that guess. Raises SettingsError if the texts
    are too short to guess anything from.
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


@dataclass(frozen=True)
class Minibatch:
    """Texts of similar length, padded at the end: (texts, tokens) and (texts, tokens, size)."""

    tokens: Tensor
    bottom: Tensor | None
    hidden: Tensor
    learned: Tensor
    """Positions that count: the answer's, from its first token to the last one with a known state."""

    def to(self, device: torch.device) -> Minibatch:
        """The same on a device."""
        bottom = None if self.bottom is None else self.bottom.to(device)
        return Minibatch(self.tokens.to(device), bottom, self.hidden.to(device), self.learned.to(device))


def batches(texts: Sequence[Text], tokens: int, drop: float, order: random.Random) -> Iterator[Minibatch]:
    """One pass over the texts in random order, about `tokens` a batch. `drop` is `Training.drop_states`."""
    shuffled = list(texts)
    order.shuffle(shuffled)
    pools = [sorted(shuffled[i : i + 512], key=lambda text: len(text.tokens)) for i in range(0, len(shuffled), 512)]
    groups: list[list[Text]] = []
    for pool in pools:
        group: list[Text] = []
        for text in pool:
            if group and (len(group) + 1) * len(text.tokens) > tokens:
                groups.append(group)
                group = []
            group.append(text)
        groups.append(group)
    order.shuffle(groups)
    for group in groups:
        yield _padded(group, drop, order)


def _padded(group: Sequence[Text], drop: float, order: random.Random) -> Minibatch:
    longest = max(len(text.tokens) for text in group)
    tokens = torch.zeros(len(group), longest, dtype=torch.int64)
    hidden = torch.zeros(len(group), longest, group[0].hidden.shape[1], dtype=torch.bfloat16)
    bottom = torch.zeros_like(hidden) if group[0].bottom is not None else None
    learned = torch.zeros(len(group), longest, dtype=torch.bool)
    for i, text in enumerate(group):
        n = len(text.tokens)
        tokens[i, :n] = text.tokens
        hidden[i, :n] = text.hidden
        if bottom is not None and text.bottom is not None:
            bottom[i, :n] = text.bottom
        first = max(1, text.prompt_len)
        if order.random() < drop:
            # A regulariser: what comes behind is guessed without these states.
            missing = order.randrange(1, max(2, n // 2))
            hidden[i, :missing] = 0
            first = max(first, missing + 1)
        learned[i, first : n - 1] = True
    return Minibatch(tokens, bottom, hidden, learned)


def train(
    model: HiddenDraft,
    texts: Callable[[], Sequence[Text]],
    parts: TargetParts,
    settings: Training,
    seed: int,
    checkpoint: Path,
    report: Callable[[Progress], None],
) -> None:
    """Run all stages. `texts` is asked again at each pass over them, so that generation may still be going on.

    Raises SettingsError if the gradient stops being a number, if no text has a token to learn from, or if the
    checkpoint is of a model of another shape.
    """
    frequent = frequent_tokens(texts(), model.config.vocab_size, settings.frequent_rows)
    others = [parameter for name, parameter in model.named_parameters() if name != "fc.weight"]
    optimiser = torch.optim.AdamW(
        [{"params": others, "scale": 1.0}, {"params": [model.fc.weight], "scale": settings.fc_rate}],
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    stage, done = _resume(checkpoint, model, optimiser)
    # A run that goes on takes the texts in another order than before, or it would see the first ones twice.
    order = random.Random(f"{seed} {stage} {done}")
    drawn = torch.Generator().manual_seed(order.getrandbits(63))
    for number in range(stage, len(settings.stages)):
        plan = settings.stages[number]
        updates = 0
        saved = reported = time.monotonic()
        since: list[tuple[int, list[float], list[float]]] = []
        while done < plan.tokens:
            before = done
            for drawn_batch in batches(texts(), settings.batch_tokens, settings.drop_states, order):
                batch = drawn_batch.to(parts.head.device)
                count = int(batch.learned.sum())
                if not count:
                    continue
                _set_rate(optimiser, plan.learning_rate, settings, updates, done / plan.tokens)
                rows = HeadRows.draw(
                    parts.head,
                    torch.cat([frequent, drawn_batch.tokens[drawn_batch.learned.roll(1, 1)]]),
                    settings.random_rows,
                    drawn,
                )
                with torch.autocast(parts.head.device.type, torch.bfloat16):
                    known = model.known(parts.embedding[batch.tokens], batch.bottom)
                    estimates = unrolled(model, known, batch.hidden, plan.steps)
                    loss = losses(
                        estimates,
                        batch.hidden,
                        batch.learned,
                        rows,
                        model.spread,
                        step_decay=settings.step_decay,
                        regression=settings.regression,
                    )
                optimiser.zero_grad(set_to_none=True)
                loss.total.backward()  # type: ignore[no-untyped-call]
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                if not math.isfinite(float(norm)):
                    raise SettingsError("the gradient is not a number; use a lower learning rate")
                optimiser.step()
                done += count
                updates += 1
                since.append((count, loss.agreement, loss.cross_entropy))
                now = time.monotonic()
                if now - reported > 10 or done >= plan.tokens:
                    report(_progress(number, done, plan.tokens, since, now - reported))
                    since, reported = [], now
                if now - saved > CHECKPOINT_S:
                    _save(checkpoint, model, optimiser, number, done)
                    saved = now
                if done >= plan.tokens:
                    break
            if done == before:
                raise SettingsError("no text has a token to learn from: allow longer answers, or more prompts")
        done = 0
        _save(checkpoint, model, optimiser, number + 1, 0)


def _progress(
    stage: int, done: int, of: int, since: Sequence[tuple[int, list[float], list[float]]], seconds: float
) -> Progress:
    total = sum(count for count, _, _ in since)

    def mean(which: int) -> list[float]:
        columns = zip(*(entry[which] for entry in since), strict=True)
        return [sum(n * v for (n, _, _), v in zip(since, column, strict=True)) / total for column in columns]

    return Progress(stage, done, of, total / max(seconds, 1e-9), mean(1), mean(2))


def _set_rate(
    optimiser: torch.optim.Optimizer, highest: float, settings: Training, updates: int, progress: float
) -> None:
    cosine = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    rate = highest * min(1.0, (updates + 1) / settings.warm_up) * cosine
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]


def _save(path: Path, model: HiddenDraft, optimiser: torch.optim.Optimizer, stage: int, done: int) -> None:
    unfinished = path.with_suffix(".part")
    state: dict[str, Any] = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save({**state, "stage": stage, "done": done}, unfinished)
    os.replace(unfinished, path)


def _resume(path: Path, model: HiddenDraft, optimiser: torch.optim.Optimizer) -> tuple[int, int]:
    if not path.is_file():
        return 0, 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise SettingsError(
            f"{path} is of a model of another shape; delete it to train anew, or restore [model] in the settings"
        ) from error
    optimiser.load_state_dict(state["optimiser"])
    return int(state["stage"]), int(state["done"])
