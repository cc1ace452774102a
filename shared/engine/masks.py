"""The masks that transformers makes for a model's layers, read as rules of the attention kernel.

A layer's mask is more reliable than the keywords of its attention: some models state a window only by the mask.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionMaskInterface

NAME = "wisp"
"""Name under which transformers finds the attention function and the mask function."""
MASKS: ContextVar[bool] = ContextVar("masks", default=False)
"""True while masks are made, in a model's first pass. Otherwise none are: causality and windows are the cache's."""
_FUNCTION = "wisp_mask_function"
_SAMPLES = 200

MaskFunction = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]


class UnknownMask(Exception):
    """A mask that is no `MaskRule`; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Causal attention to the latest `window` tokens (0 for all), within chunks of `chunk` tokens (0 for none)."""

    window: int = 0
    chunk: int = 0

    @classmethod
    def of(cls, mask: torch.Tensor, limit: int) -> MaskRule:
        """Return the rule of a mask that `mask` below made. limit: most tokens of a session. Raises UnknownMask."""
        function: MaskFunction | None = getattr(mask, _FUNCTION, None)
        if function is None:
            raise UnknownMask("not one of transformers' mask functions")
        try:
            return cls._of(function, limit)
        except (IndexError, RuntimeError, TypeError, AttributeError) as error:
            raise UnknownMask(f"{type(error).__name__}: {error}") from error

    @classmethod
    def _of(cls, function: MaskFunction, limit: int) -> MaskRule:
        if not _sees(function, [0], [0])[0]:
            raise UnknownMask("a token does not attend to itself")
        # The first query that does not see token 0: at the end of a window it sees token 1, in a new chunk only itself.
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _sees(function, [middle], [0])[0] else (low, middle)
        rule = cls()
        if high < limit:
            rule = cls(window=high) if _sees(function, [high], [1])[0] else cls(chunk=high)
        queries, keys = rule._samples(limit)
        if _sees(function, queries, keys) != [rule.sees(q, k) for q, k in zip(queries, keys, strict=True)]:
            raise UnknownMask(f"it is not that of {rule}")
        return rule

    def sees(self, query: int, key: int) -> bool:
        """Return whether the token at position `query` attends to that at `key`."""
        in_window = not self.window or key > query - self.window
        in_chunk = not self.chunk or key // self.chunk == query // self.chunk
        return key <= query and in_window and in_chunk

    def _samples(self, limit: int) -> tuple[list[int], list[int]]:
        """Return pairs of positions: near the diagonal, near the rule's bounds, and anywhere."""
        choose = random.Random(0)
        queries = [choose.randrange(limit) for _ in range(_SAMPLES)]
        step = self.window or self.chunk or limit
        keys = [
            choose.choice(
                (choose.randrange(limit), query + choose.randint(-3, 3), query - step + choose.randint(-2, 2))
            )
            for query in queries
        ]
        return queries, [min(max(key, 0), limit - 1) for key in keys]


def mask(mask_function: MaskFunction, device: torch.device, **kwargs: Any) -> torch.Tensor | None:
    """Make the mask of a kind of layers: nothing, but in a model's first pass a tensor that carries its function."""
    if not MASKS.get():
        return None
    result = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    setattr(result, _FUNCTION, mask_function)
    return result


def _sees(function: MaskFunction, queries: list[int], keys: list[int]) -> list[bool]:
    batch = torch.tensor(0)
    seen = [function(batch, batch, torch.tensor(q), torch.tensor(k)) for q, k in zip(queries, keys, strict=True)]
    return [bool(each) for each in seen]


AttentionMaskInterface.register(NAME, mask)
