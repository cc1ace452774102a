"""Generated texts on disk: token ids and the target's final hidden states, in shards of safetensors.

A shard holds whole texts, one after the other:

    tokens       int32 (tokens,)           prompt and answer of each text
    hidden       bfloat16 (tokens, size)   the target's state after its last norm at each token
    starts       int64 (texts + 1,)        where each text begins, and the end of the last
    prompt_len   int32 (texts,)            how many of its tokens are the prompt
    origin       int64 (texts,)            index of its prompt in the run's list, by which a stopped run resumes
    temperature  float32 (texts,)          its sampling temperature

and `kinds` in its metadata, the kind of each text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shared.runtime.files import replacing


@dataclass(frozen=True)
class GeneratedText:
    """A generated text: `tokens` with the prompt first, and `hidden` (tokens, size) of each of them."""

    tokens: torch.Tensor
    hidden: torch.Tensor
    prompt_len: int
    origin: int
    temperature: float
    kind: str
    bottom: torch.Tensor | None = None
    """Output of the target's first layers for the tokens, (tokens, size); kept in a folder of its own."""


def save(path: Path, texts: Sequence[GeneratedText]) -> None:
    """Write a shard. An interrupted write leaves no shard."""
    lengths = torch.tensor([len(text.tokens) for text in texts])
    tensors = {
        "tokens": torch.cat([text.tokens for text in texts]).to(torch.int32),
        "hidden": torch.cat([text.hidden for text in texts]).to(torch.bfloat16),
        "starts": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "prompt_len": torch.tensor([text.prompt_len for text in texts], dtype=torch.int32),
        "origin": torch.tensor([text.origin for text in texts]),
        "temperature": torch.tensor([text.temperature for text in texts]),
    }
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata={"kinds": json.dumps([text.kind for text in texts])})


def load(path: Path) -> list[GeneratedText]:
    """Return the texts of a shard. Their tensors are views of the mapped file."""
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        kinds = json.loads(file.metadata()["kinds"])
    starts = parts["starts"].tolist()
    return [
        GeneratedText(
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
    """Return the finished shards of a folder, in a fixed order."""
    return sorted(folder.glob("*.safetensors"))


def load_all(folder: Path) -> Iterator[GeneratedText]:
    """Yield the texts of all shards of a folder."""
    for path in files(folder):
        yield from load(path)


def with_bottom(path: Path, folder: Path, compute: Callable[[torch.Tensor], torch.Tensor]) -> list[GeneratedText]:
    """Return the texts of a shard with their `bottom`, which is computed once and kept in `folder`."""
    texts = load(path)
    kept = folder / path.name
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        computed = torch.cat([compute(text.tokens.long()).cpu() for text in texts])
        with replacing(kept) as unfinished:
            save_file({"bottom": computed.to(torch.bfloat16)}, unfinished)
    with safe_open(kept, framework="pt") as file:
        rows = file.get_tensor("bottom").split([len(text.tokens) for text in texts])
    return [replace(text, bottom=part) for text, part in zip(texts, rows, strict=True)]


def origins(folder: Path) -> set[int]:
    """Return the indices of the prompts that a folder has answers of."""
    done: set[int] = set()
    for path in files(folder):
        with safe_open(path, framework="pt") as file:
            done.update(file.get_tensor("origin").tolist())
    return done
