"""The cost of removing a verifier: the KV that it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shared.messages import Heartbeat


def deletion_costs(heartbeats: Iterable[Heartbeat]) -> dict[str, int]:
    """Return the deletion cost by verifier id: the bit length of the number of KV tokens that it holds; 0 for none.

    The cost grows with the logarithm because Kubernetes advises against frequent updates of the annotation, and the
    order of verifiers that hold about as much does not matter. A draining verifier costs 0: it leaves in any case.
    """
    return {
        heartbeat.verifier: 0 if heartbeat.draining else (heartbeat.total_tokens - heartbeat.free_tokens).bit_length()
        for heartbeat in heartbeats
    }


def changes(wanted: Mapping[str, int], published: Mapping[str, int]) -> dict[str, int]:
    """Return the costs by pod that differ from the published ones."""
    return {pod: cost for pod, cost in wanted.items() if published.get(pod) != cost}
