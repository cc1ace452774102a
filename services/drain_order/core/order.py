"""The cost of removing a verifier: the KV that it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shared.messages import Heartbeat


def deletion_costs(heartbeats: Iterable[Heartbeat]) -> dict[str, int]:
    """Return the cost by verifier id: the number of doublings of its held KV tokens; 0 for none.

    Doublings, because Kubernetes asks for few updates of the annotation, and the order of two verifiers that hold about
    as much does not matter. A draining verifier leaves in any case and costs nothing.
    """
    return {
        heartbeat.verifier: 0 if heartbeat.draining else (heartbeat.total_tokens - heartbeat.free_tokens).bit_length()
        for heartbeat in heartbeats
    }


def changes(wanted: Mapping[str, int], published: Mapping[str, int]) -> dict[str, int]:
    """Return the costs by pod that differ from the published ones."""
    return {pod: cost for pod, cost in wanted.items() if published.get(pod) != cost}
