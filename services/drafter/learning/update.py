"""One update of a draft model's weights: loss, gradient and a step of the optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from services.drafter.hidden.model import HiddenDraft
from services.drafter.hidden.target_parts import TargetParts
from services.drafter.learning.batches import Minibatch
from services.drafter.learning.head_loss import HeadRows
from services.drafter.learning.loss import Losses, losses, unrolled


@dataclass(frozen=True)
class LossOptions:
    """Settings of the loss."""

    random_rows: int
    """Rows of the head drawn for each batch that stand for the tokens that are not certain."""
    step_decay: float
    """Weight of each draft step / weight of the previous one."""
    regression: float
    """Weight of the distance between estimated and true states."""
    clip: float
    """Largest norm of the gradient."""
    rejection: float = 0.0
    """Weight of the probability that a token is rejected."""


def optimiser_of(model: HiddenDraft, *, fc_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return the optimiser of a model. fc_rate: learning rate of the input projection / that of the others."""
    others = [parameter for name, parameter in model.named_parameters() if name != "fc.weight"]
    return torch.optim.AdamW(
        [{"params": others, "scale": 1.0}, {"params": [model.fc.weight], "scale": fc_rate}],
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
        fused=True,
    )


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]


def computes_bfloat16(torch_device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16. A CPU without them takes nine times as long."""
    return torch_device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def update(
    model: HiddenDraft,
    parts: TargetParts,
    optimiser: torch.optim.Optimizer,
    drawn: Minibatch,
    certain: Tensor,
    options: LossOptions,
    *,
    steps: int,
    random: torch.Generator,
) -> Losses:
    """Make one step of the optimiser.

    certain: ids of tokens whose rows of the head count in every batch; those of the batch's own tokens count too.
    steps: draft steps to unroll. Raises FloatingPointError if the gradient is not a number; the weights are then as
    before.
    """
    torch_device = parts.head.device
    bfloat16 = computes_bfloat16(torch_device)
    batch = drawn.to(torch_device)
    rows = HeadRows.draw(
        parts.head,
        torch.cat([certain, drawn.tokens[drawn.learned.roll(1, 1)]]),
        options.random_rows,
        random,
        parts.logits,
        None if bfloat16 else torch.float32,
    )
    with torch.autocast(torch_device.type, torch.bfloat16, enabled=bfloat16):
        known = model.known(parts.embedding[batch.tokens], batch.bottom)
        loss = losses(
            unrolled(model, known, batch.hidden, steps),
            batch.hidden,
            batch.learned,
            rows,
            model.spread,
            step_decay=options.step_decay,
            regression=options.regression,
            rejection=options.rejection,
        )
    optimiser.zero_grad(set_to_none=True)
    loss.total.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
    if not math.isfinite(float(norm)):
        raise FloatingPointError("the gradient is not a number")
    optimiser.step()
    return loss
