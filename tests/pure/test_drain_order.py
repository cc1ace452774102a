"""The costs of removing verifier pods."""

from __future__ import annotations

import builders
import pytest

from services.drain_order.core.order import changes, deletion_costs
from shared.messages import Heartbeat
from shared.runtime.settings import ServiceSettings, host_of


def holding(verifier: str, tokens: int, *, draining: bool = False) -> Heartbeat:
    return builders.heartbeat(verifier, total_tokens=10_000, free_tokens=10_000 - tokens, draining=draining)


def test_the_emptiest_verifier_costs_least() -> None:
    costs = deletion_costs([holding("a", 5000), holding("b", 0), holding("c", 300)])
    assert sorted(costs, key=lambda verifier: costs[verifier]) == ["b", "c", "a"]
    assert costs["b"] == 0


def test_a_draining_verifier_costs_nothing() -> None:
    assert deletion_costs([holding("a", 5000, draining=True)]) == {"a": 0}


def test_small_changes_are_not_published() -> None:
    published = deletion_costs([holding("a", 4100), holding("b", 600)])
    assert changes(deletion_costs([holding("a", 5000), holding("b", 700)]), published) == {}
    assert changes(deletion_costs([holding("a", 9000), holding("b", 700)]), published) == {"a": 14}


@pytest.mark.parametrize("host", ["wisp-verifier-7d9c4b7f65-x2k8p", "a.b"])
def test_a_verifier_id_contains_the_name_of_its_pod(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert host_of("verifier", ServiceSettings().instance_name("verifier")) == host.replace(".", "-")
