"""Loss of a draft model: its estimates over several draft steps against the target's distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.drafter.hidden.model import HiddenDraft, run_layers
from services.drafter.hidden.target_parts import TargetParts
from services.drafter.learning.head_loss import HeadRows, head_loss


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
    rejection: float,
) -> Losses:
    """Return the loss through the target's head (`head_loss`), plus `regression` times smooth L1 on states.

    learned: bool (texts, tokens), the positions that count. Step s has weight step_decay^(s-1).
    """
    exact = hidden[learned]
    chosen = torch.stack([g[learned] for g in estimates])
    decay = [step_decay**step for step in range(len(estimates))]
    through_head = head_loss(chosen, exact, rows, decay, rejection=rejection)
    total = through_head.total
    for weight, estimate in zip(decay, chosen, strict=True):
        distance = functional.smooth_l1_loss(estimate.float() / spread, exact.float() / spread)
        total = total + weight * regression * distance
    return Losses(total, through_head.agreement, through_head.cross_entropy)
