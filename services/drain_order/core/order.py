"""Which verifier pod costs the least to lose. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shared.messages import Heartbeat
from shared.runtime.settings import host_of


def deletion_costs(heartbeats: Iterable[Heartbeat]) -> dict[str, int]:
    """The cost of each verifier's pod: the doublings of the K/V tokens that it holds, 0 for none.

    Doublings, because Kubernetes asks not to be told of every change of a fast figure, and which pod of two that hold
    about the same goes first does not matter. A verifier that is draining goes in any case and costs nothing.
    """
    return {
        host_of("verifier", heartbeat.verifier): 0
        if heartbeat.draining
        else (heartbeat.total_tokens - heartbeat.free_tokens).bit_length()
        for heartbeat in heartbeats
    }


def changes(wanted: Mapping[str, int], told: Mapping[str, int]) -> dict[str, int]:
    """What Kubernetes has to be told, given what it was told."""
    return {pod: cost for pod, cost in wanted.items() if told.get(pod) != cost}
