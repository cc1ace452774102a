"""A hidden-state draft that learns from the texts of its sessions.

New texts go into a bounded buffer; every fifth one is held back. `DraftLearner.work` makes a short piece of work at a
time: an update of the candidate weights, or the evaluation of a text. After a few updates the candidate is compared on
the held-back texts with the weights in use: it takes their place if it is better, and they are rolled back if earlier
ones are better. Nothing here reads a clock, so the same texts give the same weights.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from services.drafter.core.judging import HeldBackScore, TextScore
from services.drafter.core.observed import ObservedText
from services.drafter.hidden import weights
from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.model import HiddenDraft
from services.drafter.hidden.target_parts import as_tensor, target_parts
from services.drafter.learning.batches import Minibatch, batches
from services.drafter.learning.head_loss import shaped
from services.drafter.learning.loss import bottom_outputs, unrolled
from services.drafter.learning.reports import DraftWeights, LearningOptions, LearningOutcome, LearningReport
from services.drafter.learning.update import LossOptions, computes_bfloat16, optimiser_of, set_rate, update
from shared.messages import Sampling
from shared.models.folder import ModelFolder
from shared.sampling.sampler import Columns, choose_in_rows

HELD_BACK = 5
"""One of this many texts is held back."""
FEWEST_HELD_BACK = 4
"""Held-back texts before anything is learned."""
LOSS = LossOptions(random_rows=768, step_decay=0.8, regression=0.1, clip=1.0)
State = dict[str, Tensor]


@dataclass(frozen=True)
class _Text:
    """A text of the buffer, as `batches.LearnableText`."""

    number: int
    tokens: Tensor
    hidden: Tensor
    prompt_len: int
    bottom: Tensor | None
    start: int
    sampling: Sampling


@dataclass
class _Served:
    """Weights that were in use, and their scores by text number."""

    state: State
    scores: dict[int, TextScore] = field(default_factory=dict)


class _TextBuffer:
    """Texts up to a number of tokens, oldest first."""

    def __init__(self, most: int) -> None:
        self.texts: deque[_Text] = deque()
        self._most, self._tokens = most, 0

    def add(self, text: _Text) -> None:
        """Add a text; drop the oldest ones beyond the limit."""
        self.texts.append(text)
        self._tokens += len(text.tokens)
        while self._tokens > self._most and len(self.texts) > 1:
            self._tokens -= len(self.texts.popleft().tokens)


class DraftLearner:
    """The weights of one draft, the texts that it learns from, and its optimiser. Not thread-safe."""

    def __init__(
        self,
        draft: HiddenDraftFolder,
        target: ModelFolder,
        options: LearningOptions,
        version: int = 0,
        kept: HiddenDraftFolder | None = None,
    ) -> None:
        """version: number of the last version of earlier processes. kept: learned weights to go on from. Raises
        ModelError."""
        self._options = options
        self._model, self.head_ids = weights.load(draft, torch.float32)
        shipped = _copied(self._model.state_dict())
        self._earlier = [_Served(shipped)]
        """The shipped weights, and those in use before the current ones."""
        self.version = version
        if kept is not None:
            self._model.load_state_dict(weights.load(kept, torch.float32)[0].state_dict())
        self._current = _Served(_copied(self._model.state_dict()))
        parts = target_parts(target, draft.card.model.bottom_layers, torch.bfloat16)
        fast = computes_bfloat16(parts.head.device)
        self._parts = parts if fast else replace(parts, bottom=parts.bottom.float())
        self._head = parts.head[self.head_ids].float()
        self._columns = Columns.of(self.head_ids.numpy())
        held_back = options.buffer_tokens // HELD_BACK
        self._learned = _TextBuffer(options.buffer_tokens - held_back)
        self._held_back = _TextBuffer(held_back)
        self._order = random.Random(options.seed)
        self._rows_random = torch.Generator().manual_seed(options.seed)
        self._seen = self._updates = self._learned_tokens = 0
        self._owed = 0.0
        """Tokens still to learn, repetitions included."""
        self._running: Iterator[LearningReport | None] | None = None
        self._begin_candidate()

    def add(self, text: ObservedText) -> None:
        """Add a text to the buffer. Ignores one with states that are not finite."""
        hidden = torch.cat([as_tensor(text.states.copy()), torch.zeros(1, text.states.shape[1], dtype=torch.bfloat16)])
        if not torch.isfinite(hidden).all():
            return
        tokens = torch.from_numpy(text.tokens.astype(np.int64))
        bottom = bottom_outputs(self._parts, tokens).to(torch.bfloat16) if len(self._parts.bottom) else None
        made = _Text(self._seen, tokens, hidden, text.prompt_len, bottom, text.start, text.sampling)
        self._seen += 1
        if self._seen % HELD_BACK == 0:
            self._held_back.add(made)
        else:
            self._learned.add(made)
            self._owed += self._options.passes * text.answer_tokens

    @property
    def has_work(self) -> bool:
        """True if the new texts are worth another comparison, or one is under way."""
        options = self._options
        enough = self._owed >= options.updates * options.batch_tokens
        return self._running is not None or (enough and len(self._held_back.texts) >= FEWEST_HELD_BACK)

    def work(self) -> LearningReport | None:
        """Make one piece of work; return the comparison that it ends."""
        if self._running is None:
            self._running = self._cycle()
        report = next(self._running)
        if report is not None:
            self._running = None
        return report

    def current(self) -> HiddenDraft:
        """Return a model of the weights in use, which shares them."""
        return self._with(self._current.state)

    def candidate(self) -> HiddenDraft:
        """Return a model of the learning weights, which shares them."""
        return self._with(self._model.state_dict())

    def _cycle(self) -> Iterator[LearningReport | None]:
        drawn = 0
        while drawn < self._options.updates:
            for batch in batches(
                list(self._learned.texts), self._options.batch_tokens, self._options.drop_states, self._order
            ):
                drawn += 1
                if count := int(batch.learned.sum()):
                    self._update(batch, count)
                    yield None
                if drawn == self._options.updates:
                    break
        texts = list(self._held_back.texts)
        candidate = _Served(_copied(self._model.state_dict()))
        scores: list[HeldBackScore] = []
        for served in (candidate, self._current, *self._earlier):
            model = self._with(served.state)
            for text in texts:
                if text.number not in served.scores:
                    served.scores[text.number] = self._score(model, text)
                    yield None
            served.scores = {text.number: served.scores[text.number] for text in texts}
            scores.append(HeldBackScore(tuple(served.scores.values())))
        yield self._decide(candidate, scores)

    def _update(self, batch: Minibatch, count: int) -> None:
        options = self._options
        self._since_begin += 1
        rate = options.rate * min(1.0, self._since_begin / options.updates)
        set_rate(self._optimiser, rate)
        try:
            update(
                self._model,
                self._parts,
                self._optimiser,
                batch,
                self._certain(),
                LOSS,
                steps=options.draft_steps,
                random=self._rows_random,
            )
        except FloatingPointError:
            self._begin_candidate()
        shipped = self._earlier[0].state
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.lerp_(shipped[name], min(1.0, rate * options.pull))
        self._updates += 1
        self._learned_tokens += count
        self._owed -= count

    def _certain(self) -> Tensor:
        return torch.tensor(sorted({token for text in self._learned.texts for token in text.tokens.tolist()}))

    def _begin_candidate(self) -> None:
        """Let the candidate begin at the weights in use, with a new optimiser."""
        self._model.load_state_dict(self._current.state)
        self._optimiser = optimiser_of(self._model, fc_rate=self._options.fc_rate, weight_decay=0.0)
        self._since_begin = 0

    @torch.no_grad()
    def _score(self, model: HiddenDraft, text: _Text) -> TextScore:
        """Draft at every position of a text as a drafter would, with the text's own noise.

        Rules and grammars are left out, which change the score of all weights alike."""
        known = model.known(self._parts.embedding[text.tokens], text.bottom)
        steps = self._options.judged_steps
        estimates = unrolled(model, known[None], text.hidden[None].float(), steps)
        first, stop = max(1, text.prompt_len), len(text.tokens) - 1
        right = np.zeros((steps, stop + steps), np.bool_)
        tokens = text.tokens.numpy()
        for step, estimate in enumerate(estimates):
            logits = shaped(estimate[0, first:stop] @ self._head.T, self._parts.logits).numpy()
            positions = range(text.start + first + 1, text.start + stop + 1)
            chosen = choose_in_rows(logits, [text.sampling] * len(positions), positions, self._columns)
            right[step, first:stop] = np.array(chosen) == tokens[first + 1 : stop + 1]
        accepted = np.ones(stop - first, np.bool_)
        total = 0
        for step in range(steps):
            accepted &= right[step, first + step : stop + step]
            total += int(accepted.sum())
        return TextScore(stop - first, int(right[0, first:stop].sum()), total)

    def _with(self, state: State) -> HiddenDraft:
        """Return a model that shares these weights."""
        with torch.device("meta"):  # no time for random weights
            model = HiddenDraft(self._model.config)
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(requires_grad=False)

    def _decide(self, candidate: _Served, scores: Sequence[HeldBackScore]) -> LearningReport:
        candidate_score, current_score, *earlier_scores = scores
        score, outcome, returning = current_score, LearningOutcome.UNDECIDED, None
        for earlier, earlier_score in zip(self._earlier, earlier_scores, strict=True):
            if self.version and earlier_score.beats(current_score) and earlier_score.accepted > score.accepted:
                score, returning = earlier_score, earlier
        if candidate_score.beats(score):
            score, outcome = candidate_score, LearningOutcome.TAKEN
            self._earlier[1:] = [self._current]
            self._current = candidate
        elif returning is not None:
            outcome = LearningOutcome.ROLLED_BACK
            self._current = returning
            del self._earlier[1:]
            self._begin_candidate()
        elif current_score.beats(candidate_score):
            outcome = LearningOutcome.REJECTED
            self._begin_candidate()
        changed = outcome in (LearningOutcome.TAKEN, LearningOutcome.ROLLED_BACK)
        self.version += changed
        return LearningReport(
            outcome,
            self.version,
            self._updates,
            self._learned_tokens,
            score.acceptance,
            earlier_scores[0].acceptance,
            _bits(self._current.state) if changed else None,
        )


def _copied(state: State) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _bits(state: State) -> DraftWeights:
    return {name: tensor.to(torch.bfloat16).view(torch.uint16).numpy() for name, tensor in state.items()}
