"""Bits of logits on the device, by the way in which sessions are computed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from shared.gpu_kernels.decoder import GpuDecoder
from shared.kernels.cache import PackedBatch
from shared.kernels.layout import BLOCK

VERIFIED: Final = (2, 9)
"""Fewest and most tokens of a verification."""
CHUNKS: Final = (16, 128)
"""Fewest and most tokens of a chunk of prefill."""


@dataclass(frozen=True, slots=True)
class WayOutcome:
    """Number of positions that one way computed, and how many of them differ from a whole prefill."""

    way: str
    positions: int
    differing: int


class ExactnessCheck:
    """Sessions of equal length on a decoder whose cache holds them twice."""

    def __init__(self, decoder: GpuDecoder, sessions: int, length: int, seed: int = 0) -> None:
        self._decoder, self._length = decoder, length
        self._choose = random.Random(seed)
        vocabulary = range(decoder.model.vocab_size)
        self._texts = [self._choose.choices(vocabulary, k=length) for _ in range(sessions)]
        blocks = -(-length // BLOCK)
        self._tables = [list(range(number * blocks, (number + 1) * blocks)) for number in range(sessions)]

    @staticmethod
    def blocks(sessions: int, length: int) -> int:
        """Return the capacity that a decoder needs."""
        return sessions * -(-length // BLOCK)

    def outcomes(self) -> Iterator[WayOutcome]:
        """Compute the sessions in every way, and yield each one's outcome."""
        expected = [self._logits([number], [0], [self._length]) for number in range(len(self._texts))]
        ways: list[tuple[str, Callable[[], int]]] = [
            ("decode, alone", lambda: self._alone(expected, (1, 1))),
            ("verify, random chunks", lambda: self._alone(expected, VERIFIED)),
            ("chunked prefill", lambda: self._alone(expected, CHUNKS)),
            ("random mixed batches", lambda: self._mixed(expected)),
            ("after rollback", lambda: self._rolled_back(expected)),
        ]
        for way, differing in ways:
            yield WayOutcome(way, len(self._texts) * self._length, differing())

    def _alone(self, expected: Sequence[torch.Tensor], sizes: tuple[int, int]) -> int:
        differing = 0
        for number in range(len(self._texts)):
            place = 0
            while place < self._length:
                count = min(self._choose.randint(*sizes), self._length - place)
                differing += self._differing(expected, [number], [place], [count])
                place += count
        return differing

    def _mixed(self, expected: Sequence[torch.Tensor]) -> int:
        """Decode, verify and prefill different sessions in one pass, in random order."""
        places, differing = [0] * len(self._texts), 0
        while unfinished := [number for number, place in enumerate(places) if place < self._length]:
            taken = self._choose.sample(unfinished, self._choose.randint(1, len(unfinished)))
            sizes = [self._choose.choice(((1, 1), VERIFIED, CHUNKS)) for _ in taken]
            counts = [
                min(self._choose.randint(*size), self._length - places[number])
                for number, size in zip(taken, sizes, strict=True)
            ]
            differing += self._differing(expected, taken, [places[number] for number in taken], counts)
            for number, count in zip(taken, counts, strict=True):
                places[number] += count
        return differing

    def _rolled_back(self, expected: Sequence[torch.Tensor]) -> int:
        """Compute wrong tokens before the right ones at the same positions, as when drafts are rejected."""
        differing = 0
        for number in range(len(self._texts)):
            place = 0
            while place < self._length:
                count = min(self._choose.randint(*VERIFIED), self._length - place)
                wrong = self._choose.choices(range(self._decoder.model.vocab_size), k=count)
                self._decoder.forward(PackedBatch([self._tables[number]], [place], [count]), tokens=wrong)
                differing += self._differing(expected, [number], [place], [count])
                place += count
        return differing

    def _differing(
        self, expected: Sequence[torch.Tensor], sessions: Sequence[int], starts: Sequence[int], counts: Sequence[int]
    ) -> int:
        """Compute a batch; return the number of its positions that differ."""
        logits = self._logits(sessions, starts, counts)
        same = torch.cat(
            [
                expected[number][start : start + count]
                for number, start, count in zip(sessions, starts, counts, strict=True)
            ]
        )
        return int((logits.view(torch.int32) != same.view(torch.int32)).any(-1).sum())

    def _logits(self, sessions: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        tokens: list[int] = []
        for number, start, count in zip(sessions, starts, counts, strict=True):
            tokens.extend(self._texts[number][start : start + count])
        batch = PackedBatch([self._tables[number] for number in sessions], starts, counts)
        return self._decoder.forward(batch, tokens=tokens, wanted=range(len(tokens)))[1].contiguous()
