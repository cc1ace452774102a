"""Arithmetic: the dependence of a model's logits, bit for bit, on everything but the model and its number format.

Every engine names its own (`Engine.arithmetic`): equal names promise equal bits. Verifiers of earlier versions name
none; "" stands for an unknown arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def fits(arithmetic: str, committed_in: Sequence[str]) -> bool:
    """Return whether a session committed in these arithmetics may continue in this one.

    An unknown arithmetic fits, so that sessions can move between verifiers of neighbouring versions during an update.
    """
    return not arithmetic or not committed_in or arithmetic in committed_in


def distinct(arithmetics: Iterable[str]) -> list[str]:
    """Return the known arithmetics, each once, in the order of their first occurrence. Several are a mixture."""
    return [arithmetic for arithmetic in dict.fromkeys(arithmetics) if arithmetic]
