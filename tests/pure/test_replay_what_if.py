"""Recorded traffic under other policies, in virtual time, with the code that runs live."""

from __future__ import annotations

from dataclasses import replace

import builders
import pytest
import recorded
from builders import heartbeat
from recorded import START_MS, A

from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import SchedulingRules
from services.scheduler.core.policies import POLICIES
from services.tools.replayer.core.performance import recorded_performance
from services.tools.replayer.core.recording import Recording
from services.tools.replayer.core.sessions import read_sessions
from services.tools.replayer.core.traffic import RecordedDraft, RecordedRequest, RecordedTraffic, recorded_traffic
from services.tools.replayer.core.what_if import DraftPlan, what_if
from shared.messages import CostModel, Result, Slo, Verify

ONE_AT_A_TIME = BatchLimits(max_batch_ms=28, max_batch_tokens=2048)
"""Limits for batches of one: by the cost model below, a batch of two rounds takes 30 ms."""
WIDE = BatchLimits(max_batch_ms=400, max_batch_tokens=2048)


def cost_model(verifier: str = "v1", factor: float = 1.0) -> CostModel:
    return builders.cost_model(verifier, [15 * factor, 5 * factor, 0.0, 0.0, 0.0, 0.0, 0.0], ratio_p90=1, ratio_p99=1)


def request(name: str, slo: Slo | None, at_ms: float = 0.0, tokens: int = 4, right: int = 0) -> RecordedRequest:
    """A request whose every round drafts three tokens, of which the first `right` are right."""
    generate = recorded.generate(name, slo=slo, max_tokens=tokens, elapsed_ms=0.0)
    text = [*generate.prompt, *range(100, 100 + tokens)]
    drafts = [
        RecordedDraft(base_len, [0.9, 0.5, 0.2], right, draft_ms=3.0, away_ms=5.0, drafter_id="d1")
        for base_len in range(len(generate.prompt), len(text))
    ]
    return RecordedRequest(generate, START_MS + at_ms, text, drafts)


def traffic(*requests: RecordedRequest, verifiers: tuple[str, ...] = ("v1",), **changed: object) -> RecordedTraffic:
    heartbeats = [(START_MS - 100.0 + 500 * i, heartbeat(name)) for i in range(3) for name in verifiers]
    models = [(START_MS - 100.0, cost_model(name)) for name in verifiers]
    end_ms = START_MS + 1000
    return replace(
        RecordedTraffic(list(requests), heartbeats, models, hop_ms=2.0, policy="fcfs", end_ms=end_ms), **changed
    )


def rules(policy: str, limits: BatchLimits = WIDE) -> SchedulingRules:
    return SchedulingRules(policy, limits)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("plan", [DraftPlan(), DraftPlan("marginal"), DraftPlan(longest=0), DraftPlan(longest=1)])
def test_every_request_completes_under_every_policy_and_stop_rule(policy: str, plan: DraftPlan) -> None:
    slo = Slo(ttft_ms=100, tpot_ms=40)
    requests = [request(f"s{i}", slo if i % 2 else None, at_ms=7.0 * i, tokens=3 + i, right=i % 4) for i in range(9)]
    run = what_if(traffic(*requests, verifiers=("v1", "v2")), rules(policy), plan)
    assert run.complete == run.requests == 9
    assert run.tokens == sum(3 + i for i in range(9))
    assert run.promised == len(run.sessions) == 4
    assert run.accepted <= run.verified <= run.drafted
    assert run == what_if(traffic(*requests, verifiers=("v1", "v2")), rules(policy), plan), "the same again"


def test_edf_keeps_a_deadline_that_fcfs_misses() -> None:
    patient = [request(f"s{i}", Slo(ttft_ms=5000, tpot_ms=5000), tokens=1) for i in range(6)]
    urgent = request("urgent", Slo(ttft_ms=80, tpot_ms=1000), at_ms=1.0, tokens=1)
    fcfs = what_if(traffic(*patient, urgent), rules("fcfs", ONE_AT_A_TIME), DraftPlan())
    edf = what_if(traffic(*patient, urgent), rules("edf", ONE_AT_A_TIME), DraftPlan())
    assert not fcfs.sessions["urgent"]
    assert edf.sessions["urgent"]
    assert edf.attained == 7
    assert edf.goodput > fcfs.goodput


def test_time_follows_the_cost_model_and_the_recorded_drafting() -> None:
    run = what_if(traffic(request("s", Slo(ttft_ms=100, tpot_ms=100), tokens=30)), rules("fcfs"), DraftPlan())
    # A round: 5 ms away (the first: after the request), 2 ms of hops, a batch of one job in 20 ms. The last three have
    # room for two, one and no draft tokens, of 1 ms each.
    assert run.ttft_p50_ms == pytest.approx(27)
    assert run.tpot_p50_ms == pytest.approx((26 * 27 + 26 + 25 + 24) / 29)
    assert (run.rounds, run.batches, run.jobs_per_batch) == (30, 30, 1.0)
    plain = what_if(traffic(request("s", None, tokens=3)), rules("fcfs"), DraftPlan(longest=0))
    assert plain.tpot_p50_ms == pytest.approx(24), "without the 3 ms of drafting"


def test_draft_tokens_are_accepted_as_far_as_they_were_right() -> None:
    three = request("s", None, tokens=8, right=3)
    assert what_if(traffic(three), rules("fcfs"), DraftPlan()).rounds == 2
    assert what_if(traffic(three), rules("fcfs"), DraftPlan(longest=1)).rounds == 4
    assert what_if(traffic(three), rules("fcfs"), DraftPlan(longest=0)).rounds == 8
    run = what_if(traffic(three), rules("fcfs"), DraftPlan())
    assert (run.accepted, run.verified) == (6, 6)


def test_the_marginal_rule_sends_only_likely_tokens() -> None:
    marginal = what_if(traffic(request("s", None, tokens=30, right=1)), rules("fcfs"), DraftPlan("marginal"))
    all_ = what_if(traffic(request("s", None, tokens=30, right=1)), rules("fcfs"), DraftPlan())
    assert 0 < marginal.drafted < all_.drafted
    assert marginal.accepted > 0


def test_a_verifier_that_left_in_the_recording_leaves_again() -> None:
    early = [(START_MS + at, heartbeat("v2")) for at in (-100.0, 0.0)]
    late = [(START_MS + at, heartbeat("v1")) for at in (3000.0, 6000.0)]
    requests = [request(f"s{i}", None, at_ms=10.0 * i, tokens=6) for i in range(4)]
    run = what_if(
        traffic(*requests, verifiers=(), heartbeats=[*early, *late], end_ms=START_MS + 6000), rules("fcfs"), DraftPlan()
    )
    assert run.complete == 4, "the other verifier took their rounds"
    assert run.span_ms > 2000


def test_a_run_that_does_not_keep_up_ends_with_incomplete_requests() -> None:
    dead = [(START_MS - 100.0, heartbeat())]
    run = what_if(traffic(request("s", None), heartbeats=dead, end_ms=START_MS + 9000), rules("fcfs"), DraftPlan())
    assert (run.complete, run.requests) == (0, 1)


def test_traffic_is_read_from_a_recording() -> None:
    read = recorded_traffic(recorded.recording(recorded.sent()))
    [found] = read.requests
    assert found.generate.session == A
    assert found.text == [5, 6, 7, 11, 12, 99]
    assert found.start_ms == START_MS
    assert [(draft.base_len, draft.right, draft.away_ms, draft.draft_ms) for draft in found.drafts] == [
        (3, 0, 22.0, 8.0),  # from the request to the arrival at the scheduler
        (4, 1, 17.0, 10.0),  # from the previous result
    ]
    assert (read.policy, read.hop_ms) == ("wisp+", 5.5)  # the median of 2, 5, 6 and 6
    assert read.left_out == {"their beginning is not in the recording": 2}
    assert found.draft_at(3) is found.drafts[0]
    assert found.draft_at(5) is found.drafts[1], "the last one before"


def test_a_verifier_is_as_slow_as_its_recorded_batches() -> None:
    sent = [*recorded.sent(), (300.0, "costmodel.v1", cost_model())]
    # Whole batches: s1-1 took 30 ms where the model predicts 20, s1-2 took 28, and s1-3 of two jobs 35 (predicted 25).
    slowness = recorded_traffic(recorded.recording(sent)).slowness
    assert slowness == {"v1": pytest.approx((30 + 28 + 35) / (20 + 20 + 25))}
    usual = traffic(request("s", None, tokens=1))
    slow = replace(usual, slowness={"v1": 3.0})
    times = [what_if(one, rules("fcfs"), DraftPlan()).ttft_p50_ms or 0.0 for one in (usual, slow)]
    assert times[1] - times[0] == pytest.approx(40)


def test_without_text_only_accepted_draft_tokens_count_as_right() -> None:
    def right(recording: Recording) -> list[int]:
        return [draft.right for draft in recorded_traffic(recording).requests[0].drafts]

    sent = [
        (
            at,
            key,
            message.model_copy(update={"draft": [12, 99, 14, 15]})
            if isinstance(message, Verify) and message.round
            else message,
        )
        for at, key, message in recorded.sent()
    ]
    assert right(recorded.recording(sent)) == [0, 2]
    assert right(recorded.recording(sent, redacted=True)) == [0, 1]


def test_the_recorded_performance_comes_from_the_recorded_times() -> None:
    session = read_sessions(recorded.recording(recorded.sent()).entries())[A]
    found = recorded_performance([session])
    assert (found.requests, found.attained, found.tokens) == (1, 1, 3)
    assert (found.ttft_p50_ms, found.tpot_p50_ms) == (60, 45)
    assert found.goodput == pytest.approx(3 / 0.150)
    assert (found.wait_mean_ms, found.batches, found.jobs_per_batch) == (5.0, 2, 1.5)
    assert (found.drafted, found.verified, found.accepted) == (4, 2, 1)


def test_sessions_with_gaps_are_left_out() -> None:
    def is_first_result(message: object) -> bool:
        return isinstance(message, Result) and message.session == A and message.round == 0

    read = recorded_traffic(recorded.recording([one for one in recorded.sent() if not is_first_result(one[2])]))
    assert read.requests == []
    assert read.left_out["a part of their text is not in the recording"] == 1
