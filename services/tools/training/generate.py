"""Generation: the target answers prompts, and its hidden states are stored for the training of the draft model.

Continuous batching: when a text ends, the next prompt takes its place at once, and is computed
beside the other texts' next tokens. Texts for training are drawn with ordinary random numbers. Texts for evaluation are
drawn with the noise of serving (`shared.sampling.sampler`, with an assignment's `origin` as seed), so that drafting
them can be repeated exactly without the target.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from services.tools.training import shards
from services.tools.training.answering import AnsweringTarget
from shared.engine import Step
from shared.messages import Sampling
from shared.sampling.sampler import choose

PROMPT_TOKENS = 256
"""Tokens of new prompts in a step, of which the last prompt may have more."""
DRAWN_GROUP = 256
"""Tokens in a group, when a token is drawn."""


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
    target: AnsweringTarget,
    assignments: Iterable[Assignment],
    stop_ids: frozenset[int],
    seed: int,
    *,
    serving_noise: bool = False,
) -> Iterator[shards.GeneratedText]:
    """Yield the texts in the order in which they end, each with its end token.

    An assignment that may grow beyond the target's longest text is left out.
    """
    waiting = iter(assignments)
    random = torch.Generator().manual_seed(seed)
    running: list[_UnfinishedText] = []
    exhausted = False
    while running or not exhausted:
        # Prompts share the steps, so that these take similar times and texts end at different steps.
        fresh = 0
        while fresh < PROMPT_TOKENS and not exhausted and len(running) < target.texts:
            following = next(waiting, None)
            if following is None:
                exhausted = True
            elif len(following.prompt) + len(following.given) + following.max_new <= target.longest:
                text = _UnfinishedText(following)
                target.start(text.name)
                running.append(text)
                fresh += len(text.tokens)
        if not running:
            continue
        logits = target.forward([text.step() for text in running])
        sampled = [text for text in running if not text.assignment.given]
        drawn = iter(_choose(logits, sampled) if serving_noise else _draw(logits, sampled, random))
        still = []
        for text in running:
            if not text.assignment.given:
                text.tokens.append(next(drawn))
            answered = len(text.tokens) - len(text.assignment.prompt)
            if text.assignment.given or text.tokens[-1] in stop_ids or answered >= text.assignment.max_new:
                yield _finished(target, text)
                target.release(text.name)
            else:
                still.append(text)
        running = still


def _finished(target: AnsweringTarget, text: _UnfinishedText) -> shards.GeneratedText:
    held = target.states(text.name, text.fed)
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


@torch.inference_mode()
def _draw(logits: torch.Tensor, texts: Sequence[_UnfinishedText], random: torch.Generator) -> list[int]:
    """Draw a token per row of `logits` by inversion of the cumulated softmax; at temperature 0, the likeliest.

    Changes `logits` of float32. Sums are cumulated over groups of tokens first, and then within the drawn group.
    """
    if not texts:
        return []
    temperatures = torch.tensor([text.assignment.temperature for text in texts], device=logits.device)
    greedy = temperatures == 0
    likeliest = logits[greedy].argmax(-1)
    shares = torch.softmax(logits.float().div_(temperatures.masked_fill(greedy, 1)[:, None]), -1)
    padded = functional.pad(shares, (0, -shares.shape[1] % DRAWN_GROUP))
    groups = padded.view(len(texts), -1, DRAWN_GROUP)
    group, left = _inverted(groups.sum(-1), torch.rand(len(texts), generator=random).to(logits.device))
    within, _ = _inverted(groups[torch.arange(len(texts)), group], left)
    chosen = (group * DRAWN_GROUP + within).clamp_(max=logits.shape[1] - 1)
    chosen[greedy] = likeliest
    return chosen.tolist()


def _inverted(weights: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column of each row in which the cumulated weight reaches this share, and the share of that column's
    weight at which it does."""
    cumulated = weights.double().cumsum(-1)
    wanted = (share.double() * cumulated[:, -1])[:, None]
    column = torch.searchsorted(cumulated, wanted, right=True).clamp_(max=weights.shape[1] - 1)
    own = weights.double().gather(1, column)
    before = cumulated.gather(1, column) - own
    return column[:, 0], ((wanted - before) / own.clamp_min(1e-300)).clamp_(0, 1)[:, 0]


def write_shards(
    texts: Iterable[shards.GeneratedText],
    folder: Path,
    prefix: str,
    shard_tokens: int,
    report: Callable[[int], None],
    until_s: float = math.inf,
) -> None:
    """Write texts into shards of about `shard_tokens` tokens, named after `prefix`. report: gets each text's length.

    until_s: time (of `time.monotonic`) after which no more texts are taken. Those taken before are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = sum(path.name.startswith(f"{prefix}-") for path in shards.files(folder))
    pending: list[shards.GeneratedText] = []
    for text in texts:
        pending.append(text)
        report(len(text.tokens))
        if time.monotonic() >= until_s:
            break
        if sum(len(kept.tokens) for kept in pending) >= shard_tokens:
            shards.save(folder / f"{prefix}-{number:05d}.safetensors", pending)
            pending, number = [], number + 1
    if pending:
        shards.save(folder / f"{prefix}-{number:05d}.safetensors", pending)
