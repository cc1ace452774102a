"""The noise of shared-noise sampling: Gumbel variables from a counter-based hash of (seed, position, token).

`gumbel` is the definition, in integers and float64. `leading_bits` and `leading_bits_on_device` return, for whole
vocabularies, the part of it with which `shared.sampling.sampler` screens tokens; they are integers, equal on every
device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Words = NDArray[np.uint32]

_MASK_32 = (1 << 32) - 1
_MASK_64 = (1 << 64) - 1
_LEADING = (1 << 31) - 1
_GOLDEN_64 = 0x9E3779B97F4A7C15


def gumbel(seed: int, position: int, token: int) -> float:
    """Return the noise g = -log(-log u) of a token, which scores logit / temperature + g."""
    return -math.log(exponential(noise_key(seed, position), token))


def noise_key(seed: int, position: int) -> int:
    """Return 64 bits for a position of a session, from any 64-bit seed, signed or not."""
    return _mix_64((_mix_64(seed & _MASK_64) + position * _GOLDEN_64) & _MASK_64)


def exponential(key: int, token: int) -> float:
    """Return -log u of a token."""
    return -math.log1p(-min((hashed_bits(key, token) + 0.5) * 2.0**-63, 1 - 2.0**-53))


def hashed_bits(key: int, token: int) -> int:
    """Return 63 bits of w = 1 - u of a token: the leading 31, and 32 more for the tail."""
    hashed = _hash(key, token)
    return (hashed & _LEADING) << 32 | _mix_64(key ^ hashed) & _MASK_32


def _hash(key: int, token: int) -> int:
    """32 bits for a token under a 64-bit key."""
    return _mix_32((_mix_32(token) ^ key & _MASK_32) * (key >> 32 | 1) & _MASK_32)


def leading_bits(key: int, mixed: Words) -> NDArray[np.int32]:
    """Return the leading 31 bits of w for tokens given as `mixed_ids`."""
    hashes = np.bitwise_xor(mixed, np.uint32(key & _MASK_32))
    hashes *= np.uint32(key >> 32 | 1)
    _mix_32_all(hashes)
    hashes &= np.uint32(_LEADING)
    return hashes.view(np.int32)


def mixed_ids(ids: NDArray[np.int64]) -> Words:
    """Return the part of the tokens' hashes that does not depend on the key."""
    return _mix_32_all(ids.astype(np.uint32))


@lru_cache(maxsize=8)
def mixed_vocabulary(size: int) -> Words:
    """Return `mixed_ids` of all ids below `size`. The caller must not change the array."""
    return mixed_ids(np.arange(size))


def leading_bits_on_device(keys: Sequence[int], size: int, torch_device: torch.device) -> Tensor:
    """Return the leading 31 bits of w for each key and each id below `size`: int32 (keys, size)."""
    import torch

    def column(words: Iterable[int]) -> Tensor:
        signed = [[word - (word >> 31 << 32)] for word in words]
        return torch.tensor(signed, dtype=torch.int32, device=torch_device)

    mixed = _mix_32_on_device(torch.arange(size, dtype=torch.int32, device=torch_device))
    hashes = (mixed ^ column(key & _MASK_32 for key in keys)) * column(key >> 32 | 1 for key in keys)
    return _mix_32_on_device(hashes) & _LEADING


def _mix_64(x: int) -> int:
    """splitmix64's step and finaliser (S. Vigna)."""
    x = (x + _GOLDEN_64) & _MASK_64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK_64
    return x ^ x >> 31


def _mix_32(x: int) -> int:
    """A bijection of 32 bits with even avalanche (C. Wellons' hash-prospector, its best two-round function)."""
    x = (x ^ x >> 16) * 0x21F0AAAD & _MASK_32
    x = (x ^ x >> 15) * 0x735A2D97 & _MASK_32
    return x ^ x >> 15


def _mix_32_all(x: Words) -> Words:
    """`_mix_32` of each element, in place."""
    shifted = np.empty_like(x)
    x ^= np.right_shift(x, np.uint32(16), out=shifted)
    x *= np.uint32(0x21F0AAAD)
    x ^= np.right_shift(x, np.uint32(15), out=shifted)
    x *= np.uint32(0x735A2D97)
    x ^= np.right_shift(x, np.uint32(15), out=shifted)
    return x


def _mix_32_on_device(x: Tensor) -> Tensor:
    """`_mix_32` of int32: products wrap around, and `>>` copies the sign bit, which is masked."""
    x = (x ^ x >> 16 & 0xFFFF) * 0x21F0AAAD
    x = (x ^ x >> 15 & 0x1FFFF) * 0x735A2D97
    return x ^ x >> 15 & 0x1FFFF
