"""Which verifier pod Kubernetes is told to take first."""

from __future__ import annotations

import builders
import pytest

from services.drain_order.core.order import changes, deletion_costs
from shared.messages import Heartbeat
from shared.runtime.settings import ServiceSettings, host_of


def heartbeat(pod: str, held: int, draining: bool = False) -> Heartbeat:
    return builders.heartbeat(f"verifier-{pod}-a1b2c3", free_tokens=10_000 - held, draining=draining)


def test_the_emptiest_verifier_costs_the_least() -> None:
    costs = deletion_costs([heartbeat("a", 5000), heartbeat("b", 0), heartbeat("c", 300)])
    assert sorted(costs, key=lambda pod: costs[pod]) == ["b", "c", "a"]
    assert costs["b"] == 0


def test_one_that_leaves_costs_nothing() -> None:
    assert deletion_costs([heartbeat("a", 5000, draining=True)]) == {"a": 0}


def test_small_changes_are_not_told() -> None:
    told = deletion_costs([heartbeat("a", 4100), heartbeat("b", 600)])
    assert changes(deletion_costs([heartbeat("a", 5000), heartbeat("b", 700)]), told) == {}
    assert changes(deletion_costs([heartbeat("a", 9000), heartbeat("b", 700)]), told) == {"a": 14}


@pytest.mark.parametrize("host", ["wisp-verifier-7d9c4b7f65-x2k8p", "a.b"])
def test_a_process_is_named_after_its_pod(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert host_of("verifier", ServiceSettings().instance_name("verifier")) == host.replace(".", "-")
