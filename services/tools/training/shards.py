"""Generated texts on disk: token ids beside the target's final hidden states, in shards of safetensors.

A shard holds whole texts, one after the other:

    tokens       int32 (tokens,)           prompt and answer of each text
    hidden       bfloat16 (tokens, size)   the target's state after its last norm at each token
    starts       int64 (texts + 1,)        where each text begins, and the end of the last
    prompt_len   int32 (texts,)            how many of its tokens are the prompt
    origin       int64 (texts,)            index of its prompt in the run's list, by which a stopped run goes on
    temperature  float32 (texts,)          what it was sampled with

and `kinds` in its metadata, the kind of each text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass(frozen=True)
class Text:
    """One generated text: `tokens` with the prompt first, `hidden` (tokens, size) for each of them."""

    tokens: torch.Tensor
    hidden: torch.Tensor
    prompt_len: int
    origin: int
    temperature: float
    kind: str
    bottom: torch.Tensor | None = None
    """What the target's first layers make of the tokens, (tokens, size); kept in a folder of its own."""


def save(path: Path, texts: Sequence[Text]) -> None:
    """Write a shard, whole or not at all."""
    lengths = torch.tensor([len(text.tokens) for text in texts])
    tensors = {
        "tokens": torch.cat([text.tokens for text in texts]).to(torch.int32),
        "hidden": torch.cat([text.hidden for text in texts]).to(torch.bfloat16),
        "starts": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "prompt_len": torch.tensor([text.prompt_len for text in texts], dtype=torch.int32),
        "origin": torch.tensor([text.origin for text in texts]),
        "temperature": torch.tensor([text.temperature for text in texts]),
    }
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, metadata={"kinds": json.dumps([text.kind for text in texts])})
    os.replace(unfinished, path)


def load(path: Path) -> list[Text]:
    """The texts of a shard; their tensors are views of the mapped file."""
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        kinds = json.loads(file.metadata()["kinds"])
    starts = parts["starts"].tolist()
    return [
        Text(
            parts["tokens"][starts[i] : starts[i + 1]],
            parts["hidden"][starts[i] : starts[i + 1]],
            int(parts["prompt_len"][i]),
            int(parts["origin"][i]),
            round(float(parts["temperature"][i]), 6),
            kind,
        )
        for i, kind in enumerate(kinds)
    ]


def files(folder: Path) -> list[Path]:
    """The finished shards in a folder, in a fixed order."""
    return sorted(folder.glob("*.safetensors"))


def load_all(folder: Path) -> Iterator[Text]:
    """The texts of all shards in a folder."""
    for path in files(folder):
        yield from load(path)


def with_bottom(path: Path, folder: Path, compute: Callable[[torch.Tensor], torch.Tensor]) -> list[Text]:
    """The texts of a shard with their `bottom`, which is computed once, per text, and kept in `folder`."""
    texts = load(path)
    kept = folder / path.name
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        computed = torch.cat([compute(text.tokens.long()).cpu() for text in texts])
        unfinished = kept.with_suffix(".part")
        save_file({"bottom": computed.to(torch.bfloat16)}, unfinished)
        os.replace(unfinished, kept)
    with safe_open(kept, framework="pt") as file:
        rows = file.get_tensor("bottom").split([len(text.tokens) for text in texts])
    return [replace(text, bottom=part) for text, part in zip(texts, rows, strict=True)]


def origins(folder: Path) -> set[int]:
    """Which prompts have been answered in this folder."""
    done: set[int] = set()
    for path in files(folder):
        with safe_open(path, framework="pt") as file:
            done.update(file.get_tensor("origin").tolist())
    return done
