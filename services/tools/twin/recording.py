"""Recording of traces: known texts of a target, and the drafts that a real source makes at each of their positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.drafter.control import Controller, ControlWeights, DraftToken
from services.drafter.sources import DraftRequest, DraftSource, LookupDrafts, States
from services.tools.training.generate import sampling
from services.tools.training.shards import GeneratedText
from shared.twin.trace import (
    AGREED,
    CHAINS,
    CONTESTED,
    COPIED,
    DEPTH,
    PRESENT,
    STATISTICS,
    DraftChain,
    Trace,
    load_trace,
    save_trace,
)

TOGETHER = 32
"""Texts that are drafted for in one call."""
NAMES = {"hidden": ("hidden",), "lookup": ("lookup",), "combined": ("hidden", "lookup")}
"""Sources that may propose tokens, by chain."""


@dataclass
class _RecordedText:
    """A text with the drafts recorded so far."""

    name: str
    text: GeneratedText
    tokens: list[int]

    def states(self, source: DraftSource, length: int) -> States | None:
        """Return the hidden states that a drafter has after `length` committed tokens."""
        if length == self.text.prompt_len:
            return None
        start = max(0, source.starts_at(self.name, length) - 1)
        return States(start, self.text.hidden[start : length - 1].float().numpy())


def record_chain(source: DraftSource, name: str, texts: Sequence[GeneratedText], weights: ControlWeights) -> DraftChain:
    """Return the drafts of a source after each part of the answers of these texts, one text after the other."""
    controller = Controller("fixed", DEPTH, weights)
    count = sum(len(text.tokens) - text.prompt_len for text in texts)
    chain = DraftChain(
        np.zeros((count, DEPTH), np.int32),
        np.zeros((count, DEPTH, len(STATISTICS)), np.float16),
        np.zeros((count, DEPTH), np.uint8),
        np.zeros((count, DEPTH), np.uint8),
    )
    first = 0
    active: list[tuple[_RecordedText, int]] = []
    for number, text in enumerate(texts):
        active.append((_RecordedText(f"{name}-{number}", text, text.tokens.tolist()), first))
        first += len(text.tokens) - text.prompt_len
    index = 0
    while active := [one for one in active if index < len(one[0].tokens) - one[0].text.prompt_len]:
        requests = [_request(one, name, index, controller, source) for one, _ in active]
        for (_, begins), request, draft in zip(active, requests, source.propose(requests), strict=True):
            for depth, (token_id, drafted) in enumerate(zip(draft.tokens, request.round.drafted, strict=False)):
                _put(chain, begins + index, depth, token_id, drafted.token)
        index += 1
    for number in range(len(texts)):
        source.close(f"{name}-{number}")
    return chain


def _request(one: _RecordedText, name: str, index: int, controller: Controller, source: DraftSource) -> DraftRequest:
    """Return the request for a draft after `index` answer tokens."""
    length = one.text.prompt_len + index
    round_ = controller.session(*NAMES[name]).ahead(DEPTH, one.text.temperature)
    states = one.states(source, length) if name != "lookup" else None
    noise = sampling(one.text.origin, one.text.temperature)
    return DraftRequest(one.name, one.tokens[:length], noise, round_, NAMES[name], states, one.text.prompt_len)


def _put(chain: DraftChain, row: int, depth: int, token_id: int, token: DraftToken) -> None:
    chain.tokens[row, depth] = token_id
    chain.statistics[row, depth] = [getattr(token, name) for name in STATISTICS]
    chain.support[row, depth] = token.support
    chain.flags[row, depth] = (
        PRESENT | COPIED * (token.support > 0) | AGREED * token.agreed | CONTESTED * token.contested
    )


def record(
    texts: Sequence[GeneratedText],
    source: Callable[[], DraftSource],
    weights: ControlWeights,
    facts: Mapping[str, Any],
    parts: Path,
    report: Callable[[int], None],
) -> Trace:
    """Return the trace of texts. Parts of it are stored in a folder, from which a stopped recording continues.

    source: makes a draft source of the pair. report: gets the number of texts that are done.
    """
    parts.mkdir(parents=True, exist_ok=True)
    kinds = sorted({text.kind for text in texts})
    found = []
    for first in range(0, len(texts), TOGETHER):
        some = texts[first : first + TOGETHER]
        path = parts / f"{first:06}.npz"
        if not path.is_file():
            chains = {}
            for name in CHAINS:
                made = LookupDrafts() if name == "lookup" else source()
                chains[name] = record_chain(made, name, some, weights)
            save_trace(_trace(some, chains, kinds, facts), path)
        found.append(load_trace(path))
        report(first + len(some))
    return joined(found, {**facts, "kinds": kinds})


def _trace(
    texts: Sequence[GeneratedText], chains: Mapping[str, DraftChain], kinds: Sequence[str], facts: Mapping[str, Any]
) -> Trace:
    answers = [text.tokens[text.prompt_len :].numpy().astype(np.int32) for text in texts]
    return Trace(
        facts={**facts, "kinds": list(kinds)},
        starts=np.concatenate([[0], np.cumsum([len(answer) for answer in answers])]).astype(np.int64),
        prompt_len=np.array([text.prompt_len for text in texts], np.int32),
        seed=np.array([text.origin for text in texts], np.int64),
        temperature=np.array([text.temperature for text in texts], np.float32),
        kind=np.array([kinds.index(text.kind) for text in texts], np.int32),
        tokens=np.concatenate(answers),
        chains=chains,
    )


def joined(traces: Sequence[Trace], facts: Mapping[str, Any]) -> Trace:
    """Return one trace of several."""
    offsets = np.cumsum([0, *(len(trace.tokens) for trace in traces)])
    starts = [trace.starts[:-1] + offset for trace, offset in zip(traces, offsets, strict=False)]

    def of(name: str) -> Any:
        return np.concatenate([getattr(trace, name) for trace in traces])

    return Trace(
        facts=facts,
        starts=np.concatenate([*starts, offsets[-1:]]).astype(np.int64),
        **{name: of(name) for name in ("prompt_len", "seed", "temperature", "kind", "tokens")},
        chains={
            name: DraftChain(
                *(
                    np.concatenate([getattr(trace.chains[name], part) for trace in traces])
                    for part in DraftChain.__dataclass_fields__
                )
            )
            for name in CHAINS
        },
    )
