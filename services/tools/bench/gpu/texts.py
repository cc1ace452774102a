"""Texts of the default model under load against alone: the same tokens, and the same bits of hidden states."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import torch

from services.tools.bench.support.options import target_folder
from services.tools.bench.support.report import terminal
from services.tools.local.progress import ConsoleProgress
from services.tools.training import prompts as corpus
from services.tools.training.answering import EngineTarget
from services.tools.training.generate import Assignment, generate
from services.tools.training.shards import GeneratedText
from shared.engine import Engine
from shared.kernels.layout import BLOCK
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

TEMPERATURES: Final = (0.0, 0.7, 1.0)
LOAD: Final = 2
"""Texts in the loaded run / texts compared. All of its texts are computed at once."""


def compared_texts(torch_device: torch.device, count: int, tokens: int, *, quietly: bool) -> list[Any]:
    """Return model, texts, their tokens, and the numbers of texts with other tokens and with other states.

    quietly: few short prompts, for a device on which they take long. Raises WispError.
    """
    target = ModelFolder(target_folder(None, ConsoleProgress(terminal())))
    tokenizer = Tokenizer(target)
    drawn = corpus.sample(1, LOAD * count, held_out=True)
    longest = 16 if quietly else 448
    asked = [
        Assignment(number, one.kind, _encoded(one, tokenizer)[-longest:], TEMPERATURES[number % 3], tokens)
        for number, one in enumerate(drawn)
    ]
    room = -(-(longest + tokens) // BLOCK) * BLOCK
    engine = Engine(
        target.path, dtype="bfloat16", device=str(torch_device), budget_tokens=len(asked) * room, keep_hidden=True
    )
    ends = frozenset(target.eos_ids)
    alone = {one.origin: one for one in generate(EngineTarget(engine, 1), asked[:count], ends, 0, serving_noise=True)}
    together = EngineTarget(engine, len(asked))
    loaded = {one.origin: one for one in generate(together, asked, ends, 0, serving_noise=True)}
    pairs = [(alone[number], loaded[number]) for number in alone]
    return [
        target.name, len(pairs), sum(len(one.tokens) - one.prompt_len for one, _ in pairs),
        sum(not torch.equal(one.tokens, other.tokens) for one, other in pairs),
        sum(not _same_states(one, other) for one, other in pairs),
    ]  # fmt: skip


def _encoded(prompt: corpus.CorpusPrompt, tokenizer: Tokenizer) -> list[int]:
    if prompt.turns is None:
        return tokenizer.encode(prompt.text or "")
    return tokenizer.render_chat([asdict(turn) for turn in prompt.turns])


def _same_states(one: GeneratedText, other: GeneratedText) -> bool:
    """Return whether all states have the same bits."""
    return one.hidden.shape == other.hidden.shape and torch.equal(
        one.hidden.contiguous().view(torch.int16), other.hidden.contiguous().view(torch.int16)
    )
