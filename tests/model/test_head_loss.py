"""The loss through the target's head against its definition, differentiated by torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from services.drafter.hidden.target import UNSHAPED, LogitShape
from services.drafter.learning import head_loss as module
from services.drafter.learning.head_loss import HeadRows, head_loss, shaped

SIZE, VOCAB, POSITIONS, WEIGHTS = 16, 90, 37, [1.0, 0.8, 0.64]


@pytest.mark.parametrize("rejection", [0.0, 1.5])
@pytest.mark.parametrize("shape", [UNSHAPED, LogitShape(0.5), LogitShape(1.5, 2.0)])
@pytest.mark.parametrize("together", [10, 128])
def test_loss_and_gradient_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, shape: LogitShape, rejection: float, together: int
) -> None:
    monkeypatch.setattr(module, "TOGETHER", together)
    random = torch.Generator().manual_seed(3)
    head = torch.randn(VOCAB, SIZE, generator=random)
    rows = HeadRows.draw(head, torch.arange(20), 30, random, shape)
    assert len(rows.weight) == 50
    exact = torch.randn(POSITIONS, SIZE, generator=random)
    estimates = torch.randn(len(WEIGHTS), POSITIONS, SIZE, generator=random, requires_grad=True)
    found = head_loss(estimates, exact, rows, WEIGHTS, rejection=rejection)
    (gradient,) = torch.autograd.grad(3 * found.total, estimates)

    def log_shares(states: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(shaped(functional.linear(states, rows.weight), shape) + rows.correction, -1)

    wanted, drafted = log_shares(exact).exp(), log_shares(estimates)
    entropy = -(wanted * drafted).sum(-1).mean(-1)
    rejected = 1 - torch.minimum(wanted, drafted.exp()).sum(-1).mean(-1)
    total = ((entropy + rejection * rejected) * torch.tensor(WEIGHTS)).sum()
    (expected,) = torch.autograd.grad(3 * total, estimates)
    torch.testing.assert_close(found.total, total)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(found.cross_entropy), entropy.detach())
    agreed = (drafted.argmax(-1) == wanted.argmax(-1)).float().mean(-1)
    torch.testing.assert_close(torch.tensor(found.agreement), agreed)


def test_drawn_rows_stand_for_all_others() -> None:
    random = torch.Generator().manual_seed(3)
    head = torch.randn(VOCAB, SIZE, generator=random)
    rows = HeadRows.draw(head, torch.tensor([4, 4, 80]), 11, random)
    assert sorted(rows.correction.tolist()) == pytest.approx([0.0] * 2 + [math.log(88 / 11)] * 11)
    assert torch.equal(rows.weight[:2], head[[4, 80]])
