"""Traces: texts of a real target, and at each position what a real draft proposes for the next tokens.

A trace is one file of numpy arrays (.npz). Texts lie one after the other; `starts` has where each begins. Row i of a
chain belongs to answer token i: the draft after all answer tokens before it. So a round may begin anywhere. There are
three chains: `hidden` (the draft model alone), `lookup` (copies alone) and `combined`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
from numpy.typing import NDArray

from shared.errors import ModelError, quoted
from shared.runtime.files import replacing
from shared.sampling.noise import noise_key

DEPTH = 8
"""Draft tokens at each position."""
CHAINS = ("hidden", "lookup", "combined")
STATISTICS = ("confidence", "entropy", "margin", "spread")
PRESENT, COPIED, AGREED, CONTESTED = 1, 2, 4, 8
"""Bits of a draft token's flags: there is one; lookup proposed it; another source agrees or proposes another token."""
VERSION = 1
_OF_TEXTS: Mapping[str, tuple[type[np.generic], tuple[str | int, ...]]] = {
    "starts": (np.int64, ("starts",)),
    "prompt_len": (np.int32, ("texts",)),
    "seed": (np.int64, ("texts",)),
    "temperature": (np.float32, ("texts",)),
    "kind": (np.int32, ("texts",)),
    "tokens": (np.int32, ("tokens",)),
}
_OF_CHAINS: Mapping[str, tuple[type[np.generic], tuple[str | int, ...]]] = {
    "tokens": (np.int32, ("tokens", DEPTH)),
    "statistics": (np.float16, ("tokens", DEPTH, len(STATISTICS))),
    "support": (np.uint8, ("tokens", DEPTH)),
    "flags": (np.uint8, ("tokens", DEPTH)),
}
_SHAPES = {**_OF_TEXTS, **{f"{chain}_{part}": shape for chain in CHAINS for part, shape in _OF_CHAINS.items()}}
"""Type and shape of each array of a file."""


@dataclass(frozen=True)
class DraftChain:
    """Draft tokens of one source: (answer tokens, `DEPTH`)."""

    tokens: NDArray[np.int32]
    statistics: NDArray[np.float16]
    """(answer tokens, `DEPTH`, `STATISTICS`)."""
    support: NDArray[np.uint8]
    flags: NDArray[np.uint8]


@dataclass(frozen=True)
class Trace:
    """Texts and their drafts."""

    facts: Mapping[str, Any]
    """The models, the vocabulary's fingerprint (`vocabulary`), the command and the date."""
    starts: NDArray[np.int64]
    """(texts + 1)."""
    prompt_len: NDArray[np.int32]
    seed: NDArray[np.int64]
    temperature: NDArray[np.float32]
    kind: NDArray[np.int32]
    """Index into `facts["kinds"]`."""
    tokens: NDArray[np.int32]
    """Answer tokens of all texts."""
    chains: Mapping[str, DraftChain]

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.starts) - 1

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Index after the last token of each answer token's text."""
        return np.repeat(self.starts[1:], np.diff(self.starts))

    def correct(self, chain: str) -> NDArray[np.bool_]:
        """Return for each draft token whether it is the answer's: (answer tokens, `DEPTH`)."""
        drafted = self.chains[chain]
        at = np.arange(len(self.tokens))[:, None] + np.arange(DEPTH)
        inside = at < self.ends[:, None]
        answer = self.tokens[np.minimum(at, len(self.tokens) - 1)]
        right: NDArray[np.bool_] = (drafted.tokens == answer) & inside & (drafted.flags & PRESENT > 0)
        return right

    def judged(self, chain: str) -> NDArray[np.bool_]:
        """Return the draft tokens whose predecessors are all correct and that have an answer token to compare with."""
        right = self.correct(chain)
        at = np.arange(len(self.tokens))[:, None] + np.arange(DEPTH)
        before = np.concatenate([np.ones((len(right), 1), bool), np.cumprod(right[:, :-1], 1).astype(bool)], 1)
        judged: NDArray[np.bool_] = before & (at < self.ends[:, None]) & (self.chains[chain].flags & PRESENT > 0)
        return judged

    def first_acceptance(self, chain: str) -> float:
        """Return the share of first draft tokens that are accepted, where there is one."""
        judged = self.judged(chain)[:, 0]
        return float(self.correct(chain)[judged, 0].mean()) if judged.any() else float("nan")


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace. An interrupted write leaves no file."""
    arrays: dict[str, Any] = {
        name: getattr(trace, name) for name in ("starts", "prompt_len", "seed", "temperature", "kind", "tokens")
    }
    for name, chain in trace.chains.items():
        arrays |= {f"{name}_{part}": getattr(chain, part) for part in DraftChain.__dataclass_fields__}
    facts = json.dumps({"version": VERSION, **trace.facts})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, facts=np.array(facts), **arrays)


def load_trace(path: Path) -> Trace:
    """Read a trace. Raises ModelError if the file holds none."""
    try:
        if path.is_file() and not is_zipfile(path):
            raise ValueError("it is no .npz file, or was cut off")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return _trace_of(arrays)
    except Exception as error:  # numpy, zipfile and zlib raise errors of many kinds for damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ModelError(f"{path} holds no trace ({reason}); `wisp trace record` makes one") from error


def _trace_of(arrays: dict[str, NDArray[Any]]) -> Trace:
    """Return the trace of a file's arrays. Raises ValueError unless they are complete and fit together."""
    if missing := ({"facts"} | _SHAPES.keys()) - arrays.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    facts = json.loads(str(arrays["facts"]))
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        version = facts.get("version") if isinstance(facts, dict) else None
        raise ValueError(f"version {quoted(version)}, not {VERSION}")
    starts, tokens = arrays["starts"], arrays["tokens"]
    bounds, count = (len(array) if array.ndim else 0 for array in (starts, tokens))
    sizes = {"starts": bounds, "texts": bounds - 1, "tokens": count}
    for name, (kind, shape) in _SHAPES.items():
        wanted = tuple(sizes[size] if isinstance(size, str) else size for size in shape)
        found = arrays[name]
        if found.dtype != kind or found.shape != wanted:
            raise ValueError(f"{name} has the shape {found.shape} of {found.dtype}, not {wanted} of {kind.__name__}")
    if sizes["texts"] < 1 or starts[0] != 0 or starts[-1] != len(tokens) or (np.diff(starts) < 1).any():
        raise ValueError(f"starts must rise from 0 to the {len(tokens)} tokens, with at least one text")
    for name, (kind, _) in _SHAPES.items():
        if issubclass(kind, np.floating) and not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} has numbers that are not finite")
        if name.endswith("tokens") and (arrays[name] < 0).any():
            raise ValueError(f"{name} has negative token ids")
    chains = {
        name: DraftChain(**{part: arrays[f"{name}_{part}"] for part in DraftChain.__dataclass_fields__})
        for name in CHAINS
    }
    return Trace(facts=facts, chains=chains, **{name: arrays[name] for name in _OF_TEXTS})


class TraceText:
    """The answers of a trace, by seed: texts in a random order, one after the other."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._chained: dict[int, list[tuple[int, int]]] = {}
        """By seed: output index at which a text begins, and its first token's place."""

    def token(self, seed: int, index: int) -> int:
        """Return output token `index` of the answer with this seed."""
        return int(self._trace.tokens[self.place(seed, index)])

    def other(self, seed: int, index: int) -> int:
        """Return a token that output token `index` is not."""
        tokens = self._trace.tokens
        place, right = self.place(seed, index), self.token(seed, index)
        return next((int(tokens[place - back]) for back in range(1, 64) if tokens[place - back] != right), right ^ 1)

    def place(self, seed: int, index: int) -> int:
        """Return the place of output token `index` in the trace."""
        chained = self._chained.get(seed)
        if chained is None:
            if len(self._chained) > 4096:
                self._chained.clear()
            chained = self._chained[seed] = []
        starts = self._trace.starts
        while not chained or index >= chained[-1][0] + self._length(chained[-1][1]):
            begins = chained[-1][0] + self._length(chained[-1][1]) if chained else 0
            text = noise_key(seed, len(chained)) % self._trace.texts
            chained.append((begins, int(starts[text])))
        begins, first = next(one for one in reversed(chained) if one[0] <= index)
        return first + index - begins

    def _length(self, first: int) -> int:
        return int(self._trace.ends[first]) - first
