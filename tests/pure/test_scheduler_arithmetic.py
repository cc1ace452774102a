"""Placement in a mixed fleet: sessions stay in the arithmetic of their committed tokens."""

from __future__ import annotations

from typing import Any

import builders
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import Dispatcher, SchedulingRules
from services.scheduler.core.policies import POLICIES
from services.scheduler.settings import SchedulerSettings
from shared.arithmetic import distinct, fits
from shared.messages import SILENT_MS, Heartbeat, Status, Verify

LIMITS = BatchLimits(max_batch_ms=400.0, max_batch_tokens=2048)
OURS, OTHER = "wisp-1", "torch 2.13.0, transformers 5.1, cpu AVX2"


def round_in(*arithmetics: str, session: str = "s") -> Verify:
    return builders.verify(session, 1, 20, committed_in=list(arithmetics))


def dispatcher(*verifiers: Heartbeat, policy: str = "wisp+", **rules: Any) -> Dispatcher:
    d = Dispatcher("s1", SchedulingRules(policy, LIMITS, **rules))
    for beat in verifiers:
        d.on_heartbeat(beat, 0.0)
    return d


def placed(d: Dispatcher, now_ms: float = 1.0) -> list[str]:
    return [name for name, _ in d.dispatch(now_ms)[0]]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_session_goes_to_a_verifier_of_its_arithmetic(policy: str) -> None:
    d = dispatcher(
        builders.heartbeat("v1", {"s": 19}, arithmetic=OTHER),
        builders.heartbeat("v2", arithmetic=OURS, free_tokens=0),
        policy=policy,
    )
    d.on_verify(round_in(OURS), 0.0)
    assert placed(d, 100.0) == ["v2"], "although the other one has free cache and holds its KV"


def test_a_new_session_may_go_anywhere() -> None:
    d = dispatcher(builders.heartbeat("v1", arithmetic=OURS), builders.heartbeat("v2", arithmetic=OTHER))
    for i in range(2):
        d.on_verify(round_in(session=f"s{i}"), 0.0)
    assert placed(d) == ["v1", "v2"]


@pytest.mark.parametrize(("session", "verifier"), [((OURS,), ""), ((), OTHER), ((OURS, OTHER), OTHER)])
def test_unknown_and_already_mixed_arithmetics_fit(session: tuple[str, ...], verifier: str) -> None:
    d = dispatcher(builders.heartbeat("v1", arithmetic=verifier))
    d.on_verify(round_in(*session), 0.0)
    assert placed(d) == ["v1"]


def test_without_a_verifier_of_its_arithmetic_a_session_waits_for_one() -> None:
    d = dispatcher(builders.heartbeat("v1", arithmetic=OTHER))
    d.on_verify(round_in(OURS), 0.0)
    assert (placed(d), d.fleet.pending_count) == ([], 1)
    assert not d.load(1.0).mixed_arithmetic
    d.on_heartbeat(builders.heartbeat("v2", arithmetic=OTHER), 2.0)
    assert placed(d, 3.0) == []
    d.on_heartbeat(builders.heartbeat("v3", arithmetic=OURS), 4.0)
    assert placed(d, 5.0) == ["v3"]


@pytest.mark.parametrize("how", ["drains", "is silent", "is lost", "returns with another"])
def test_a_session_does_not_follow_its_verifiers_end_into_another(how: str) -> None:
    d = dispatcher(builders.heartbeat("v1", {"s": 19}, arithmetic=OURS))
    d.on_verify(round_in(OURS), 0.0)
    if how == "is lost":
        assert placed(d, 0.0) == ["v1"]
        d.on_returned("v1", 1.0)
    elif how == "drains":
        d.on_heartbeat(builders.heartbeat("v1", {"s": 19}, arithmetic=OURS, draining=True), 1.0)
    elif how == "returns with another":
        d.on_heartbeat(builders.heartbeat("v1", {"s": 19}, arithmetic=OTHER), 1.0)
    now_ms = SILENT_MS + 1 if how == "is silent" else 2.0
    d.on_heartbeat(builders.heartbeat("v2", arithmetic=OTHER), now_ms)
    assert (placed(d, now_ms), d.fleet.pending_count) == ([], 1)
    d.on_heartbeat(builders.heartbeat("v3", arithmetic=OURS), now_ms)
    assert placed(d, now_ms) == ["v3"]


def test_a_chunk_of_the_prompt_binds_a_session_to_nothing() -> None:
    d = dispatcher(builders.heartbeat("v1", arithmetic=OURS), policy="fcfs")
    d.on_verify(builders.verify("s", 0, 5000), 0.0)
    ((_, batch),) = d.dispatch(0.0)[0]
    assert batch.jobs[0].prefill_to is not None
    chunk = builders.result("s", 0, 5000, status=Status.PREFILLED, cached=batch.jobs[0].prefill_to, arithmetic=OURS)
    d.on_heartbeat(builders.heartbeat("v2", arithmetic=OTHER), 1.0)
    d.on_result(chunk.model_copy(update={"batch": batch.batch}), 1.0)
    d.on_returned("v1", 2.0)
    assert placed(d, 3.0) == ["v2"]


def test_if_mixing_is_allowed_only_gone_arithmetic_is_left() -> None:
    d = dispatcher(
        builders.heartbeat("v1", {"s": 19}, arithmetic=OTHER), builders.heartbeat("v2", arithmetic=OURS), mix=True
    )
    d.on_verify(round_in(OURS), 0.0)
    assert placed(d, 0.0) == ["v2"]
    assert d.load(0.0).mixed_arithmetic
    d.on_returned("v2", 1.0)
    assert placed(d, 1.0) == ["v1"]


def test_a_session_of_a_model_that_nobody_serves_is_still_refused() -> None:
    d = dispatcher(builders.heartbeat("v1", arithmetic=OTHER, fingerprint="another"))
    d.on_verify(round_in(OURS), 0.0)
    assert placed(d) == ["v1"]


@pytest.mark.parametrize(("value", "mix"), [("refuse", False), ("allow", True)])
def test_the_setting_decides(monkeypatch: pytest.MonkeyPatch, value: str, mix: bool) -> None:
    assert SchedulerSettings().rules.mix is False
    monkeypatch.setenv("WISP_MIXED_ARITHMETIC", value)
    assert SchedulerSettings().rules.mix is mix


@given(st.lists(st.sampled_from(["", OURS, OTHER])))
def test_a_list_of_arithmetics_fits_what_is_distinct_in_it(found: list[str]) -> None:
    known = distinct(found)
    assert known == sorted(set(found) - {""}, key=found.index)
    assert all(fits(arithmetic, known) for arithmetic in found)
    assert fits("a third", known) is (not known)


def test_a_session_goes_to_a_verifier_with_the_features_that_it_needs() -> None:
    beats = [builders.heartbeat("v1", {"s": 19}), builders.heartbeat("v2", features=["rules"], free_tokens=0)]
    d = dispatcher(*beats)
    d.on_verify(builders.verify("s", 1, 20, fingerprint="f+rules"), 0.0)
    assert placed(d, 100.0) == ["v2"]


def test_without_the_features_a_verifier_refuses_the_session() -> None:
    d = dispatcher(builders.heartbeat("v1"))
    d.on_verify(builders.verify("s", 1, 20, fingerprint="f+rules"), 0.0)
    assert placed(d, 100.0) == ["v1"]
