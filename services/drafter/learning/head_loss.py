"""The loss of estimated states through the target's head, with its gradient, a few positions at a time.

Automatic differentiation would keep several arrays of (positions, rows of the head) for each draft step, and computing
them is bound by memory. The gradient of each loss with respect to the logits has a closed form, so one pass over a few
positions gives losses and the gradient of the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from services.drafter.hidden.target import UNSHAPED, LogitShape

TOGETHER = 128
"""Positions in one pass: their logits stay in the CPU's cache."""


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
        """Return the logits of the rows without the correction, float32 (states, rows)."""
        return shaped(functional.linear(states.to(self.weight.dtype), self.weight).float(), self.shape)


def shaped(products: Tensor, shape: LogitShape) -> Tensor:
    """Return the logits of the head's products."""
    logits = products * shape.multiplier if shape.multiplier != 1 else products
    return torch.tanh(logits / shape.softcap) * shape.softcap if shape.softcap else logits


@dataclass(frozen=True)
class HeadLoss:
    """Loss of estimates of the target's states. The figures are means over positions, one for each draft step."""

    total: Tensor
    """Weighted sum over the draft steps, which carries the gradient."""
    agreement: list[float]
    """Share of positions at which the likeliest tokens agree."""
    cross_entropy: list[float]


def head_loss(
    estimates: Tensor, exact: Tensor, rows: HeadRows, weights: Sequence[float], *, rejection: float
) -> HeadLoss:
    """Return the cross-entropy with the target's softmax at temperature 1, plus `rejection` times the probability that
    speculative sampling rejects a token, which is half the L1 distance of the distributions (arXiv 2211.17192).

    estimates: (draft steps, positions, hidden size). exact: the target's states (positions, hidden size). weights: of
    the draft steps.
    """
    total, agreement, cross_entropy = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        estimates, exact, rows, weights, rejection
    )
    return HeadLoss(total, agreement.tolist(), cross_entropy.tolist())


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, estimates: Tensor, exact: Tensor, rows: HeadRows, weights: Sequence[float], rejection: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, count, _ = estimates.shape
        gradient = torch.empty_like(estimates, dtype=torch.float32)
        agreed, entropy, rejected = (torch.zeros(steps, device=estimates.device) for _ in range(3))
        for first in range(0, count, TOGETHER):
            here = slice(first, first + TOGETHER)
            wanted = rows.logits(exact[here]).add_(rows.correction)
            best = wanted.argmax(-1)
            wanted = torch.softmax(wanted, -1)
            for step in range(steps):
                logits = rows.logits(estimates[step, here])
                slope = _slope(logits, rows.shape)
                log_shares = torch.log_softmax(logits.add_(rows.correction), -1)
                agreed[step] += (log_shares.argmax(-1) == best).sum()
                entropy[step] -= torch.dot(wanted.view(-1), log_shares.view(-1))
                shares = log_shares.exp_()
                change = shares - wanted
                if rejection:
                    rejected[step] += change.clamp_min(0).sum()
                    # d(1 - sum of min(p, q)) / d logit = q * ([q > p] - sum of q where q > p)
                    above = torch.where(change > 0, shares, 0)
                    change.add_(above.sub_(shares.mul_(above.sum(-1, keepdim=True))), alpha=rejection)
                if slope is not None:
                    change.mul_(slope)
                product = change.to(rows.weight.dtype) @ rows.weight
                gradient[step, here] = product.float().mul_(weights[step] * rows.shape.multiplier / count)
        ctx.save_for_backward(gradient.to(estimates.dtype))
        total = torch.dot((entropy + rejection * rejected) / count, entropy.new_tensor(weights))
        return total, agreed / count, entropy / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None


def _slope(logits: Tensor, shape: LogitShape) -> Tensor | None:
    """Return the derivative of soft-capped logits by the logits before the cap."""
    return 1 - (logits / shape.softcap).square_() if shape.softcap else None
