"""Generation: the target answers prompts, and its hidden states are stored for the training of the draft model.

Continuous batching on the serving engine: when a text ends, the next prompt takes its place at once, and is computed
beside the other texts' next tokens. Texts for training are drawn with ordinary random numbers. Texts for evaluation are
drawn with the noise of serving (`shared.sampling.sampler`, with an assignment's `origin` as seed), so that drafting
them can be repeated exactly without the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from services.tools.training import shards
from shared.engine import Engine, Step
from shared.kernels.layout import BLOCK
from shared.messages import Sampling
from shared.sampling.sampler import choose


@dataclass(frozen=True)
class Assignment:
    """A prompt to answer with at most `max_new` tokens. If `given` is not empty, it is the continuation."""

    origin: int
    kind: str
    prompt: Sequence[int]
    temperature: float
    max_new: int
    given: Sequence[int] = ()


class _UnfinishedText:
    """A text in generation, of which the engine has computed `fed` tokens."""

    def __init__(self, assignment: Assignment) -> None:
        self.name = str(assignment.origin)
        self.assignment = assignment
        self.tokens = [*assignment.prompt, *assignment.given]
        self.fed = 0

    def step(self) -> Step:
        new = self.tokens[self.fed :]
        self.fed = len(self.tokens)
        return Step(self.name, new, rows=0 if self.assignment.given else 1)


def generate(
    engine: Engine,
    assignments: Iterable[Assignment],
    stop_ids: frozenset[int],
    seed: int,
    sessions: int,
    *,
    serving_noise: bool = False,
) -> Iterator[shards.GeneratedText]:
    """Yield the texts in the order in which they end, each with its end token. `engine` has to keep hidden states.

    An assignment that may grow beyond the model's context or its share of the cache is left out.
    """
    waiting = iter(assignments)
    random = torch.Generator().manual_seed(seed)
    running: list[_UnfinishedText] = []
    most = min(engine.max_len, engine.budget_tokens // sessions // BLOCK * BLOCK)
    exhausted = False
    while running or not exhausted:
        # At most one new prompt per step, so that steps take similar times and texts end at different steps.
        if not exhausted and len(running) < sessions:
            following = next(waiting, None)
            if following is None:
                exhausted = True
            elif len(following.prompt) + len(following.given) + following.max_new <= most:
                fresh = _UnfinishedText(following)
                engine.attach(fresh.name, fresh.tokens)
                engine.truncate(fresh.name, 0)
                running.append(fresh)
        if not running:
            continue
        logits = engine.forward([text.step() for text in running]).logits
        sampled = [text for text in running if not text.assignment.given]
        drawn = iter(_choose(logits, sampled) if serving_noise else _draw(logits, sampled, random))
        still = []
        for text in running:
            if not text.assignment.given:
                text.tokens.append(next(drawn))
            answered = len(text.tokens) - len(text.assignment.prompt)
            if text.assignment.given or text.tokens[-1] in stop_ids or answered >= text.assignment.max_new:
                yield _finished(engine, text)
                engine.release(text.name)
            else:
                still.append(text)
        running = still


def _finished(engine: Engine, text: _UnfinishedText) -> shards.GeneratedText:
    held = engine.hidden(text.name, 0, text.fed).cpu()
    return shards.GeneratedText(
        # The engine has not computed the last token, so it has no state.
        torch.tensor(text.tokens, dtype=torch.int32),
        torch.cat([held, held.new_zeros(len(text.tokens) - len(held), held.shape[1])]),
        len(text.assignment.prompt),
        text.assignment.origin,
        text.assignment.temperature,
        text.assignment.kind,
    )


def sampling(origin: int, temperature: float) -> Sampling:
    """Return the sampling parameters of a text that is drawn with the noise of serving."""
    return Sampling(temperature=temperature, seed=origin)


def _choose(logits: torch.Tensor, texts: Sequence[_UnfinishedText]) -> list[int]:
    parameters = [sampling(text.assignment.origin, text.assignment.temperature) for text in texts]
    return choose(logits, parameters, [len(text.tokens) for text in texts]) if texts else []


def _draw(logits: torch.Tensor, texts: Sequence[_UnfinishedText], random: torch.Generator) -> list[int]:
    """Draw a token per row of `logits` by inversion of the cumulated softmax; at temperature 0, the likeliest."""
    if not texts:
        return []
    temperatures = [text.assignment.temperature for text in texts]
    scale = torch.tensor([1 / (t or 1.0) for t in temperatures], device=logits.device)[:, None]
    cumulated = torch.softmax(logits.float() * scale, -1).cumsum_(-1)
    threshold = torch.rand(len(texts), 1, generator=random).to(logits.device) * cumulated[:, -1:]
    sampled = torch.searchsorted(cumulated, threshold, right=True).clamp_(max=logits.shape[1] - 1)[:, 0]
    greedy = torch.tensor([t == 0 for t in temperatures], device=logits.device)
    return torch.where(greedy, logits.argmax(-1), sampled).tolist()


def write_shards(
    texts: Iterable[shards.GeneratedText], folder: Path, prefix: str, shard_tokens: int, report: Callable[[int], None]
) -> None:
    """Write texts into shards of about `shard_tokens` tokens, named after `prefix`. report: gets each text's length."""
    folder.mkdir(parents=True, exist_ok=True)
    number = sum(path.name.startswith(f"{prefix}-") for path in shards.files(folder))
    pending: list[shards.GeneratedText] = []
    for text in texts:
        pending.append(text)
        report(len(text.tokens))
        if sum(len(kept.tokens) for kept in pending) >= shard_tokens:
            shards.save(folder / f"{prefix}-{number:05d}.safetensors", pending)
            pending, number = [], number + 1
    if pending:
        shards.save(folder / f"{prefix}-{number:05d}.safetensors", pending)
