"""Shared-noise sampling: the same session, position and logits give the same token in every process.

The choice at position t of a session with seed s is the argmax over the allowed tokens v of

    logit_v / temperature + g(s, t, v),    g = -log(-log u),  u in (0, 1) from a hash of (s, t, v)

which is an exact sample of softmax(logits / temperature) (the Gumbel-max trick). Temperature 0 is the case g = 0. Draft
and target use the same noise, so that they often choose the same token, and verification needs no probabilities.
A position is the index in the session, prompt included, of the token that is chosen.

The choice is the same on every device and in every batch, although float32 logarithms are not: the noise is defined in
float64 on the CPU (`shared.sampling.noise.gumbel`), but computed only for the few tokens that can win. With
w = 1 - u, d the distance of a logit below the row's largest, and E = -log u, the winner has the least
x = E * exp(d / temperature). As E >= w >= n / 2^31, where n are the leading 31 bits of w,

    r = n * exp(d / temperature) <= 2^31 * x

bounds x from below and is cheap: integers and one float32 exponential. Let x_0 be the lesser exact x of two tokens,
that of the least r and that of the largest logit. The winner's x is at most x_0, so tokens with computed r above
2^31 * x_0 * (1 + MARGIN) are out, and the few that remain are settled in float64.

Errors of the computed r: d, 1 / temperature, their product, n and the last product are within 2^-23 each of their size
and exp within 8 ulp; errors of the exponent count d / temperature times. At the largest logit x = E < 44, so x_0 < 44,
and a winner with n >= 1 has d / temperature <= log(44 * 2^31) < 26. Together that is below (26 * 3 + 12) * 2^-23
< 1.1e-5, a ninth of MARGIN. n = 0 gives r = 0 and always stays in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared.errors import BadLogits, NoTokenAllowed
from shared.messages import Sampling
from shared.sampling.noise import (
    Words,
    exponential,
    leading_bits,
    leading_bits_on_device,
    mixed_ids,
    mixed_vocabulary,
    noise_key,
)
from shared.sampling.rules import Floats, Ids, LogitsProcessor

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = 1e-4
NEXT_LARGEST = 4
"""Largest logits that are tried behind one whose token a mask does not allow."""

TOTAL_MARGIN = 1e-9
"""Relative difference of two sums of a row's float64 weights. Of 2^20 terms that are not negative, added in any order,
each sum is within 2^20 x 2^-53 of the exact one, and exp within a few units in the last place."""
_LEVELS = (1e-2, 1e-4)
"""Weights among which the nucleus of top_p is searched before all are sorted; the largest weight is 1."""

# exp(d / temperature) stays finite in float32. Tokens farther than this below the largest can win with n = 0 only.
_FARTHEST = 60.0
# Elements of one pass on an accelerator: a few buffers of this size must fit beside the model.
_DEVICE_ELEMENTS = 1 << 24

Processors = Sequence[LogitsProcessor | None]
"""The rules of each row's session at the row's position, or None; an empty sequence stands for none in any row."""


@dataclass(frozen=True)
class Columns:
    """Token ids of the columns of some logits, ascending. All other tokens are not allowed."""

    ids: Ids
    mixed: Words

    @classmethod
    def of(cls, ids: Ids) -> Columns:
        """Return the columns for logits of these tokens."""
        return cls(ids, mixed_ids(ids))


def choose(
    logits: Tensor, params: Sequence[Sampling], positions: Sequence[int], processors: Processors = ()
) -> list[int]:
    """Choose the token of each row of `logits` (rows, vocabulary). A row is a position of a session.

    `params[i]` are the parameters of row i's session and `positions[i]` the absolute index of the token to choose. The
    allowed tokens are the `top_k` largest logits (ties: lowest ids), and of these the fewest most probable ones whose
    share reaches `top_p`. Equal scores: lowest id. A row's token depends on nothing but its logits, parameters and
    position. On the CPU this takes one thread.

    The token is chosen from the logits that the row's processor returns, if it has one.

    Raises BadLogits if a row contains NaN or +inf, or nothing but -inf; NoTokenAllowed if a processor leaves no token;
    ValueError if the lengths differ.
    """
    if logits.device.type == "cpu":
        return choose_in_rows(_array(logits), params, positions, processors=processors)
    _require_row_each(logits.shape, params, positions)
    return _choose_on_device(logits, params, positions, processors)


def choose_in_rows(
    logits: Floats,
    params: Sequence[Sampling],
    positions: Sequence[int],
    columns: Columns | None = None,
    processors: Processors = (),
) -> list[int]:
    """`choose` for an array. With `columns`, the logits are those of these tokens only.

    A processor that allows none of the `columns` has no effect: another token may be allowed.
    """
    _require_row_each(logits.shape, params, positions)
    return [
        _choose_in_row(values, p, position, row, columns, processors[row] if processors else None)
        for row, (values, p, position) in enumerate(zip(logits, params, positions, strict=True))
    ]


def _require_row_each(shape: Sequence[int], params: Sequence[Sampling], positions: Sequence[int]) -> None:
    if len(shape) != 2 or not shape[0] == len(params) == len(positions):
        raise ValueError(
            f"logits are {tuple(shape)}, params {len(params)}, positions {len(positions)}: need one row each"
        )


def _choose_in_row(
    logits: Floats,
    params: Sampling,
    position: int,
    row: int,
    columns: Columns | None = None,
    processor: LogitsProcessor | None = None,
) -> int:
    top = int(logits.argmax())  # of equal ones the first; NaN counts as the largest
    if not math.isfinite(logits[top]):
        raise BadLogits(row, position, float(logits[top]))
    if processor is not None:
        if columns is None and (only := processor.only) is not None:
            return only
        # Looking a token up costs less than a mask. With top_k or top_p, the mask decides what is left to choose from.
        if processor.only_masks and (params.temperature == 0 or not (params.top_k or params.top_p < 1)):
            winner = _winner(logits, top, params, position, columns)
            if processor.allows(winner):
                return winner
            if columns is None and (few := processor.few) is not None:
                return _winner_of_few(logits, few[few < len(logits)], params, position)
            greedy = columns is None and params.temperature == 0
            if greedy and (best := _next_largest(logits, top, processor)) is not None:
                return best
        changed = processor.apply(logits, None if columns is None else columns.ids)
        if math.isfinite(changed.max()):
            logits, top = changed, int(changed.argmax())
        elif columns is None:
            raise NoTokenAllowed(position)
    return _winner(logits, top, params, position, columns)


def _winner_of_few(logits: Floats, tokens: Ids, params: Sampling, position: int) -> int:
    """Return the token that a row of logits chooses of these; there is neither top_k nor top_p."""
    kept = logits[tokens]
    if not len(kept) or not math.isfinite(kept[top := int(kept.argmax())]):
        raise NoTokenAllowed(position)
    return int(tokens[top]) if params.temperature == 0 else _winner(kept, top, params, position, Columns.of(tokens))


def _next_largest(logits: Floats, top: int, processor: LogitsProcessor) -> int | None:
    """Return the largest logit's token of those that a mask allows, if it is among the first ones behind `top`.

    Where a mask allows many tokens, it mostly is, and is found in less time than all logits are masked.
    """
    left = logits.copy()
    for _ in range(NEXT_LARGEST):
        left[top] = -np.inf
        top = int(left.argmax())
        if processor.allows(top):
            return top if math.isfinite(left[top]) else None
    return None


def _winner(logits: Floats, top: int, params: Sampling, position: int, columns: Columns | None) -> int:
    """Return the token that a row of logits chooses; top: the column of the largest one."""
    if params.temperature == 0:
        return top if columns is None else int(columns.ids[top])
    key = noise_key(params.seed, position)
    if params.top_k or params.top_p < 1:
        allowed = _allowed(logits, params)
        ids = allowed if columns is None else columns.ids[allowed]
        return int(ids[_sample(logits[allowed], mixed_ids(ids), ids, key, params.temperature)])
    if columns is not None:
        return int(columns.ids[_sample(logits, columns.mixed, columns.ids, key, params.temperature)])
    return _sample(logits, mixed_vocabulary(len(logits)), None, key, params.temperature)


def _sample(logits: Floats, mixed: Words, ids: Ids | None, key: int, temperature: float) -> int:
    """Return the index of the winner among `logits`, those of the tokens `ids` or of the whole vocabulary."""
    top = int(logits.argmax())
    largest = float(logits[top])

    def scores(indices: Ids) -> list[float]:
        tokens = indices if ids is None else ids[indices]
        pairs = zip(tokens.tolist(), logits[indices].tolist(), strict=True)
        return [_score(key, token, largest - logit, temperature) for token, logit in pairs]

    with np.errstate(over="ignore"):  # an overflow counts as infinitely far
        screened = np.subtract(logits[top], logits)
        screened *= _inverse(temperature)
    np.minimum(screened, _farthest(len(logits)), out=screened)
    np.exp(screened, out=screened)
    screened *= leading_bits(key, mixed).astype(np.float32)
    candidates = np.flatnonzero(screened <= _limit(max(scores(np.array([screened.argmin(), top])))))
    return int(candidates[int(np.argmax(scores(candidates)))])


def _score(key: int, token: int, distance: float, temperature: float) -> float:
    """(logit - largest logit) / temperature + g."""
    return -distance / temperature - math.log(exponential(key, token))


def _limit(score: float) -> np.float32:
    """The largest computed r that a token of at least this score can have; x is exp(-score)."""
    return np.float32(math.exp(-score) * 2.0**31 * (1 + MARGIN))


def largest(values: NDArray[np.floating], least: np.floating, count: int) -> Ids:
    """Indices, ascending, of the `count` largest values, the smallest of which is `least`; ties: lowest indices."""
    above, tied = np.flatnonzero(values > least), np.flatnonzero(values == least)
    return np.sort(np.concatenate([above, tied[: count - len(above)]]))


def _allowed(logits: Floats, params: Sampling) -> Ids:
    """Ids, ascending, that top_k and top_p leave of one row; computed from that row alone."""
    ids = np.flatnonzero(logits > -np.inf)
    if 0 < params.top_k < len(ids):
        ids = largest(logits, np.partition(logits, -params.top_k)[-params.top_k], params.top_k)
    if params.top_p == 1:
        return ids
    weights = _weights(logits[ids], logits.max(), params.temperature)
    needed = params.top_p * weights.sum()
    kept = _nucleus(weights, needed, needed, (*_LEVELS, 0.0))
    assert kept is not None  # the last level has all weights
    return ids[kept]


def _allowed_of_likely(logits: Floats, params: Sampling, total: float) -> Ids | None:
    """`_allowed` for a row without top_k, of which only the likely tokens are here (`_LEVELS`).

    total: the sum of all weights, within `TOTAL_MARGIN` of NumPy's. None if the rest of the row is needed to decide.
    """
    weights = _weights(logits, logits.max(), params.temperature)
    needed = params.top_p * total
    return _nucleus(weights, needed * (1 - TOTAL_MARGIN), needed * (1 + TOTAL_MARGIN), _LEVELS)


def _weights(logits: Floats, highest: np.floating, temperature: float) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        weights: NDArray[np.float64] = np.exp((logits.astype(np.float64) - highest) / temperature)
    return weights


def _nucleus(
    weights: NDArray[np.float64], least_needed: float, most_needed: float, levels: Sequence[float]
) -> Ids | None:
    """Return the places of the fewest largest weights whose sum reaches what is needed, which is between two bounds.

    levels: sorting is the expensive part, and the nucleus is mostly among a few large weights: those above the first
    level that suffices are sorted. With the level 0 there are no others. None if the bounds or the levels cannot
    decide.
    """
    for level in levels:
        descending = np.sort(weights[weights >= level])[::-1]
        mass = descending.cumsum()
        if mass[-1] >= most_needed:
            break
        if mass[-1] >= least_needed:
            return None
    else:
        if levels[-1]:
            return None
    last, other = (min(int(mass.searchsorted(needed)), len(mass) - 1) for needed in (least_needed, most_needed))
    return largest(weights, descending[last], last + 1) if last == other else None


def _choose_on_device(
    logits: Tensor, params: Sequence[Sampling], positions: Sequence[int], processors: Processors = ()
) -> list[int]:
    """`choose` for logits on an accelerator: whole batches are screened there, candidates settled here.

    Of rows with top_k or top_p, the likely tokens come to the CPU; of rows with a processor, all.
    """

    tokens: list[int] = logits.argmax(dim=-1).tolist()
    open_rows, narrowed_rows = list[int](), list[int]()
    for row, (p, largest) in enumerate(zip(params, logits.amax(dim=-1).tolist(), strict=True)):
        if not math.isfinite(largest):
            raise BadLogits(row, positions[row], largest)
        processor = processors[row] if processors else None
        if processor is not None and processor.only_masks and p.temperature == 0 and processor.allows(tokens[row]):
            continue
        if processor is not None:
            tokens[row] = _choose_in_row(_array(logits[row].cpu()), p, positions[row], row, processor=processor)
        elif p.temperature > 0:
            (narrowed_rows if p.top_k or p.top_p < 1 else open_rows).append(row)
    step = max(1, _DEVICE_ELEMENTS // logits.shape[1])
    for choose_some, some in ((_sample_on_device, open_rows), (_sample_narrowed_on_device, narrowed_rows)):
        for start in range(0, len(some), step):
            rows = some[start : start + step]
            keys = [noise_key(params[row].seed, positions[row]) for row in rows]
            winners = choose_some(logits[rows].float(), keys, [params[row] for row in rows])
            for row, winner in zip(rows, winners, strict=True):
                tokens[row] = winner
    return tokens


def _sample_narrowed_on_device(values: Tensor, keys: Sequence[int], params: Sequence[Sampling]) -> list[int]:
    """Winner in each row of `values` (rows, vocabulary) among the tokens that top_k and top_p leave.

    Comparisons are exact on every device, so the tokens down to the k-th largest logit are found there, and all ties.
    Of a row with top_p alone, those of a weight above the last of `_LEVELS` are, and the sum of all weights within
    `TOTAL_MARGIN`. The rest is done as in `_winner`; where that is not enough to decide, the whole row comes here.
    """
    import torch

    highest = values.amax(dim=-1)
    tops: list[float] = highest.tolist()
    limits = torch.tensor(
        [_least_likely(top, p.temperature) for top, p in zip(tops, params, strict=True)], device=values.device
    )
    totals = [0.0] * len(params)
    by_count = [row for row, p in enumerate(params) if p.top_k]
    if by_count:
        counts = [min(params[row].top_k, values.shape[1]) for row in by_count]
        best = values[by_count].topk(max(counts), dim=-1).values
        limits[by_count] = best[range(len(counts)), [count - 1 for count in counts]]
    by_share = [row for row, p in enumerate(params) if not p.top_k]
    if by_share:
        temperatures = torch.tensor([[params[row].temperature] for row in by_share], dtype=torch.float64)
        distances = values[by_share].double() - highest[by_share, None].double()
        sums: list[float] = (distances / temperatures.to(values.device)).exp_().sum(dim=-1).tolist()
        for row, total in zip(by_share, sums, strict=True):
            totals[row] = total
    row_of, column = ((values >= limits[:, None]) & (values > -math.inf)).nonzero(as_tuple=True)
    kept = values[row_of, column].cpu().numpy()
    ids = column.cpu().numpy()
    ends = torch.bincount(row_of, minlength=len(params)).cumsum(0).tolist()
    winners = []
    for row, (p, key, first, end) in enumerate(zip(params, keys, [0, *ends[:-1]], ends, strict=True)):
        own, tokens = kept[first:end], ids[first:end]
        allowed = _allowed(own, p) if p.top_k else _allowed_of_likely(own, p, totals[row])
        if allowed is None:
            own = _array(values[row].cpu())
            allowed = _allowed(own, p)
            tokens = np.arange(len(own))
        tokens = tokens[allowed]
        winners.append(int(tokens[_sample(own[allowed], mixed_ids(tokens), tokens, key, p.temperature)]))
    return winners


def _least_likely(highest: float, temperature: float) -> float:
    """Return a bound from below of the logits whose weight reaches the last of `_LEVELS`, also if it is rounded."""
    below = temperature * math.log(_LEVELS[-1])
    return highest + below - 1e-6 * (abs(highest) - below)


def _sample_on_device(values: Tensor, keys: Sequence[int], params: Sequence[Sampling]) -> list[int]:
    """Winner in each row of `values` (rows, vocabulary), found as `_sample` does."""
    import torch

    temperatures = [p.temperature for p in params]
    largest, top = values.max(dim=-1, keepdim=True)
    inverse = torch.tensor([[_inverse(t)] for t in temperatures], dtype=torch.float32, device=values.device)
    screened = (largest - values).mul_(inverse).clamp_(max=_FARTHEST).exp_()
    screened.mul_(leading_bits_on_device(keys, values.shape[1], values.device))

    def scores(row: Tensor, column: Tensor) -> list[float]:
        facts = zip(row.tolist(), column.tolist(), values[row, column].tolist(), strict=True)
        return [_score(keys[index], token, tops[index] - logit, temperatures[index]) for index, token, logit in facts]

    tops: list[float] = largest[:, 0].tolist()
    every = torch.arange(len(keys), device=values.device)
    first, second = scores(every, screened.argmin(dim=-1)), scores(every, top[:, 0])
    limits = torch.tensor([[_limit(max(pair))] for pair in zip(first, second, strict=True)], device=values.device)
    row, column = (screened <= limits).nonzero(as_tuple=True)
    winners, best = [-1] * len(keys), [-math.inf] * len(keys)
    for index, token, score in zip(row.tolist(), column.tolist(), scores(row, column), strict=True):
        if score > best[index]:  # tokens ascend: the lowest keeps a tie
            winners[index], best[index] = token, score
    return winners


@lru_cache(maxsize=64)
def _farthest(size: int) -> Floats:
    """NumPy's minimum of two arrays is five times as fast as that of an array and a number."""
    return np.full(size, _FARTHEST, dtype=np.float32)


def _inverse(temperature: float) -> np.float32:
    """1 / temperature; below float32's range one that is too small, and with it r: still a bound from below."""
    return np.float32(1 / max(temperature, 1e-30))


def _array(values: Tensor) -> Floats:
    array: Floats = values.detach().float().numpy()
    return array
