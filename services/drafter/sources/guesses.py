"""What a draft model's logits say of the tokens chosen from them."""

from __future__ import annotations

import torch
from torch import Tensor

from services.drafter.control import Guess


def guesses(source: str, logits: Tensor, columns: Tensor) -> list[Guess]:
    """One guess per row of `logits` (rows, tokens), for the token in the row's column of `columns` (rows,)."""
    logits = logits.float()
    shares = torch.softmax(logits, -1)
    confidence = shares.gather(1, columns[:, None].to(shares.device))[:, 0]
    # Entropy by way of the mean logit: log Z - sum p x needs no logarithm of every share.
    entropy = torch.logsumexp(logits, -1) - (shares * logits).sum(-1)
    best = shares.topk(min(2, shares.shape[1]), -1).values
    margin = best[:, 0] - best[:, -1]
    facts = zip(confidence.tolist(), entropy.tolist(), margin.tolist(), logits.std(-1).tolist(), strict=True)
    return [Guess(source, c, e, m, s) for c, e, m, s in facts]
