"""Loss of a draft model: its estimates over several draft steps against the target's distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.drafter.hidden.model import HiddenDraft, run_layers
from services.drafter.hidden.target import UNSHAPED, LogitShape
from services.drafter.hidden.target_parts import TargetParts


def bottom_outputs(parts: TargetParts, tokens: Tensor) -> Tensor:
    """Return the output of the target's first layers for a whole text: (tokens, size) of (tokens,)."""

    def attend(_number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _causal(q[None], k[None], v[None])[0]

    device = parts.embedding.device
    positions = torch.arange(len(tokens), device=device)
    dtype = next(parts.bottom.parameters()).dtype
    with torch.no_grad():
        embedded = parts.embedding[tokens.to(device)].to(dtype)
        return run_layers(list(parts.bottom), embedded, positions, attend)  # type: ignore[arg-type]


def unrolled(model: HiddenDraft, known: Tensor, hidden: Tensor, steps: int) -> list[Tensor]:
    """Return the estimates of h at every position, for draft steps 1 to `steps`: (texts, tokens, size) each.

    known: `HiddenDraft.known` of every token. hidden: the target's states (texts, tokens, size). Step s reaches a
    position after s - 1 draft tokens. Its own input and the s - 2 inputs before it come from the model's estimates, all
    earlier ones from the target's states. So the position attends to the exact keys at least s - 1 back, and to one key
    of each step between. All positions are computed at once, as in EAGLE-3 (arXiv 2503.01840).
    """
    tokens = known.shape[1]
    positions = torch.arange(tokens, device=known.device)
    ahead = positions[None, :] - positions[:, None]
    layers = list(model.layers)
    keys: list[list[Tensor]] = [[] for _ in layers]
    values: list[list[Tensor]] = [[] for _ in layers]
    estimates: list[Tensor] = []
    before = _later(hidden, 1)

    def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[2] // k.shape[2]
        keys[number].append(k.repeat_interleave(groups, 2))
        values[number].append(v.repeat_interleave(groups, 2))
        step = len(estimates)
        if step == 0:
            return _causal(q, k, v)
        scale = q.shape[-1] ** -0.5
        exact = torch.einsum("bihd,bjhd->bhij", q, keys[number][0]).float() * scale
        exact = exact.masked_fill(ahead > -step, float("-inf"))
        own = [_later(keys[number][r], step - r) for r in range(1, step + 1)]
        chain = torch.stack([(q * key).sum(-1).float() * scale for key in own], -1).transpose(1, 2)
        weights = torch.softmax(torch.cat([exact, chain], -1), -1).to(q.dtype)
        attended = torch.einsum("bhij,bjhd->bihd", weights[..., :tokens], values[number][0])
        for r in range(1, step + 1):
            share = weights[..., tokens + r - 1].transpose(1, 2)[..., None]
            attended = attended + share * _later(values[number][r], step - r)
        return attended

    for _ in range(steps):
        u = model.inputs(known, before)
        g = model.norm(run_layers(layers, u, positions, attend))  # type: ignore[arg-type]
        estimates.append(g)
        before = _later(g, 1)
    return estimates


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _later(x: Tensor, by: int) -> Tensor:
    """Move x (texts, tokens, ...) to later positions, with zeros at the first ones."""
    if not by:
        return x
    return torch.cat([torch.zeros_like(x[:, :by]), x[:, :-by]], 1)


@dataclass(frozen=True)
class HeadRows:
    """Rows of the target's head: certain ones, and a random sample that stands for the rest."""

    weight: Tensor
    """(rows, hidden size)"""
    correction: Tensor
    """(rows,), added to logits: minus the log of the probability that the row is in the sample."""
    shape: LogitShape = UNSHAPED

    @classmethod
    def draw(
        cls,
        head: Tensor,
        certain: Tensor,
        extra: int,
        random: torch.Generator,
        shape: LogitShape = UNSHAPED,
        dtype: torch.dtype | None = None,
    ) -> HeadRows:
        """Take the rows of the token ids `certain`, and `extra` others from the rest of the vocabulary.

        dtype: of the rows; None keeps the head's."""
        chosen = torch.zeros(len(head), dtype=torch.bool)
        chosen[certain] = True
        rest = (~chosen).nonzero()[:, 0]
        extra = min(extra, len(rest))
        drawn = rest[torch.randperm(len(rest), generator=random)[:extra]]
        ids = torch.cat([chosen.nonzero()[:, 0], drawn])
        correction = torch.zeros(len(ids))
        if extra:
            correction[-extra:] = torch.log(torch.tensor(len(rest) / extra))
        return cls(head[ids].to(dtype or head.dtype), correction.to(head.device), shape)

    def logits(self, states: Tensor) -> Tensor:
        """Return the corrected logits of the rows, (states, rows)."""
        products = functional.linear(states.to(self.weight.dtype), self.weight).float()
        return shaped(products, self.shape) + self.correction


def shaped(products: Tensor, shape: LogitShape) -> Tensor:
    """Return the logits of the head's products."""
    logits = products * shape.multiplier if shape.multiplier != 1 else products
    return torch.tanh(logits / shape.softcap) * shape.softcap if shape.softcap else logits


@dataclass(frozen=True)
class Losses:
    """The loss to minimise, and for each draft step the share of positions at which the likeliest tokens agree."""

    total: Tensor
    agreement: list[float]
    cross_entropy: list[float]


def losses(
    estimates: Sequence[Tensor],
    hidden: Tensor,
    learned: Tensor,
    rows: HeadRows,
    spread: Tensor,
    *,
    step_decay: float,
    regression: float,
) -> Losses:
    """Return the cross-entropy with the target's softmax at temperature 1, plus `regression` times smooth L1 on states.

    learned: bool (texts, tokens), the positions that count. Step s has weight step_decay^(s-1).
    """
    exact = hidden[learned]
    with torch.no_grad():
        logits = rows.logits(exact)
        wanted = torch.softmax(logits, -1)
        best = wanted.argmax(-1)
    total = torch.zeros((), device=hidden.device)
    agreement, cross_entropies = [], []
    for step, g in enumerate(estimates):
        estimate = g[learned]
        logits = rows.logits(estimate)
        cross_entropy = -(wanted * torch.log_softmax(logits, -1)).sum(-1).mean()
        distance = functional.smooth_l1_loss(estimate.float() / spread, exact.float() / spread)
        total = total + step_decay**step * (cross_entropy + regression * distance)
        agreement.append(float((logits.argmax(-1) == best).float().mean()))
        cross_entropies.append(float(cross_entropy.detach()))
    return Losses(total, agreement, cross_entropies)
