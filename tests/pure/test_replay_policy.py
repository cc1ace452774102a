"""Recorded arrivals under other policies, in virtual time, on the code that runs live."""

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
from services.tools.replayer.core.performance import recorded as really
from services.tools.replayer.core.recording import Recording
from services.tools.replayer.core.sessions import Lives
from services.tools.replayer.core.traffic import Arrivals, Draft, Visit, arrivals
from services.tools.replayer.core.what_if import Drafting, what_if
from shared.messages import CostModel, Result, Slo, Verify

ONE_AT_A_TIME = BatchLimits(max_batch_ms=28, max_batch_tokens=2048)
"""With the cost model below: a batch of two rounds takes 30 ms."""
WIDE = BatchLimits(max_batch_ms=400, max_batch_tokens=2048)


def cost_model(verifier: str = "v1", factor: float = 1.0) -> CostModel:
    return builders.cost_model(verifier, [15 * factor, 5 * factor, 0.0, 0.0, 0.0, 0.0, 0.0], ratio_p90=1, ratio_p99=1)


def visit(name: str, slo: Slo | None, at_ms: float = 0.0, tokens: int = 4, right: int = 0) -> Visit:
    """A request whose every round drafts three tokens, of which the first `right` are right."""
    generate = recorded.generate(name, slo=slo, max_tokens=tokens, elapsed_ms=0.0)
    text = [*generate.prompt, *range(100, 100 + tokens)]
    drafts = [
        Draft(base_len, [0.9, 0.5, 0.2], right, draft_ms=3.0, away_ms=5.0, drafter="d1")
        for base_len in range(len(generate.prompt), len(text))
    ]
    return Visit(generate, START_MS + at_ms, text, drafts)


def found(*visits: Visit, verifiers: tuple[str, ...] = ("v1",), **changed: object) -> Arrivals:
    heard = [(START_MS - 100.0 + 500 * i, heartbeat(name)) for i in range(3) for name in verifiers]
    models = [(START_MS - 100.0, cost_model(name)) for name in verifiers]
    return replace(Arrivals(list(visits), heard, models, hop_ms=2.0, policy="fcfs", end_ms=START_MS + 1000), **changed)


def rules(policy: str, limits: BatchLimits = WIDE) -> SchedulingRules:
    return SchedulingRules(policy, limits)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drafting", [Drafting(), Drafting("marginal"), Drafting(longest=0), Drafting(longest=1)])
def test_every_request_gets_its_text_under_every_policy_and_stop_rule(policy: str, drafting: Drafting) -> None:
    slo = Slo(ttft_ms=100, tpot_ms=40)
    visits = [visit(f"s{i}", slo if i % 2 else None, at_ms=7.0 * i, tokens=3 + i, right=i % 4) for i in range(9)]
    one = what_if(found(*visits, verifiers=("v1", "v2")), rules(policy), drafting)
    assert one.complete == one.requests == 9
    assert one.tokens == sum(3 + i for i in range(9))
    assert one.promised == len(one.sessions) == 4
    assert one.accepted <= one.verified <= one.drafted
    assert one == what_if(found(*visits, verifiers=("v1", "v2")), rules(policy), drafting), "the same again"


def test_a_policy_that_looks_at_deadlines_keeps_a_promise_that_another_breaks() -> None:
    patient = [visit(f"s{i}", Slo(ttft_ms=5000, tpot_ms=5000), tokens=1) for i in range(6)]
    urgent = visit("urgent", Slo(ttft_ms=80, tpot_ms=1000), at_ms=1.0, tokens=1)
    under = {
        policy: what_if(found(*patient, urgent), rules(policy, ONE_AT_A_TIME), Drafting()) for policy in ("fcfs", "edf")
    }
    assert not under["fcfs"].sessions["urgent"]
    assert under["edf"].sessions["urgent"]
    assert under["edf"].attained == 7
    assert under["edf"].goodput > under["fcfs"].goodput


def test_time_passes_as_the_cost_model_and_the_recorded_drafting_say() -> None:
    one = what_if(found(visit("s", Slo(ttft_ms=100, tpot_ms=100), tokens=30)), rules("fcfs"), Drafting())
    # A round: 5 ms away (the first: after the request), 2 ms of hops, a batch of one job in 20 ms. The last three have
    # room for two, one and no draft tokens, of 1 ms each.
    assert one.ttft_p50_ms == pytest.approx(27)
    assert one.tpot_p50_ms == pytest.approx((26 * 27 + 26 + 25 + 24) / 29)
    assert (one.rounds, one.batches, one.jobs_per_batch) == (30, 30, 1.0)
    plain = what_if(found(visit("s", None, tokens=3)), rules("fcfs"), Drafting(longest=0))
    assert plain.tpot_p50_ms == pytest.approx(24), "without drafting its 3 ms"


def test_drafts_are_right_as_far_as_they_were() -> None:
    three = visit("s", None, tokens=8, right=3)
    assert what_if(found(three), rules("fcfs"), Drafting()).rounds == 2
    assert what_if(found(three), rules("fcfs"), Drafting(longest=1)).rounds == 4
    assert what_if(found(three), rules("fcfs"), Drafting(longest=0)).rounds == 8
    whole = what_if(found(three), rules("fcfs"), Drafting())
    assert (whole.accepted, whole.verified) == (6, 6)


def test_the_marginal_rule_sends_what_is_likely_and_not_the_rest() -> None:
    sent = what_if(found(visit("s", None, tokens=30, right=1)), rules("fcfs"), Drafting("marginal"))
    all_ = what_if(found(visit("s", None, tokens=30, right=1)), rules("fcfs"), Drafting())
    assert 0 < sent.drafted < all_.drafted
    assert sent.accepted > 0


def test_a_verifier_that_went_away_in_the_recording_goes_away_again() -> None:
    early = [(START_MS + at, heartbeat("v2")) for at in (-100.0, 0.0)]
    late = [(START_MS + at, heartbeat("v1")) for at in (3000.0, 6000.0)]
    visits = [visit(f"s{i}", None, at_ms=10.0 * i, tokens=6) for i in range(4)]
    one = what_if(
        found(*visits, verifiers=(), heartbeats=[*early, *late], end_ms=START_MS + 6000), rules("fcfs"), Drafting()
    )
    assert one.complete == 4, "their rounds went to the one that came"
    assert one.span_ms > 2000


def test_one_that_cannot_keep_up_is_ended_and_told() -> None:
    dead = [(START_MS - 100.0, heartbeat())]
    one = what_if(found(visit("s", None), heartbeats=dead, end_ms=START_MS + 9000), rules("fcfs"), Drafting())
    assert (one.complete, one.requests) == (0, 1)


def test_what_arrived_is_read_from_a_recording() -> None:
    read = arrivals(recorded.recording(recorded.sent()))
    [one] = read.visits
    assert one.generate.session == A
    assert one.text == [5, 6, 7, 11, 12, 99]
    assert one.start_ms == START_MS
    assert [(draft.base_len, draft.right, draft.away_ms, draft.draft_ms) for draft in one.drafts] == [
        (3, 0, 22.0, 8.0),  # from the request to its arrival at the scheduler
        (4, 1, 17.0, 10.0),  # from the result before
    ]
    assert (read.policy, read.hop_ms) == ("wisp+", 5.5)  # the median of 2, 5, 6 and 6
    assert read.left_out == {"their beginning is not in the recording": 2}
    assert one.draft_at(3) is one.drafts[0]
    assert one.draft_at(5) is one.drafts[1], "the one before"


def test_a_verifier_is_as_slow_as_it_was() -> None:
    sent = [*recorded.sent(), (300.0, "costmodel.v1", cost_model())]
    # Whole batches: s1-1 took 30 ms where the model says 20, s1-2 took 28, and s1-3 of two jobs 35 where it says 25.
    assert arrivals(recorded.recording(sent)).slowness == {"v1": pytest.approx((30 + 28 + 35) / (20 + 20 + 25))}
    alone = found(visit("s", None, tokens=1))
    slow = replace(alone, slowness={"v1": 3.0})
    times = [what_if(one, rules("fcfs"), Drafting()).ttft_p50_ms or 0.0 for one in (alone, slow)]
    assert times[1] - times[0] == pytest.approx(40)


def test_without_text_only_what_was_verified_counts_as_right() -> None:
    def right(recording: Recording) -> list[int]:
        return [draft.right for draft in arrivals(recording).visits[0].drafts]

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


def test_the_recorded_figures_are_those_of_the_recorded_times() -> None:
    life = Lives().read(recorded.recording(recorded.sent()).entries()).of[A]
    one = really([life])
    assert (one.requests, one.attained, one.tokens) == (1, 1, 3)
    assert (one.ttft_p50_ms, one.tpot_p50_ms) == (60, 45)
    assert one.goodput == pytest.approx(3 / 0.150)
    assert (one.wait_mean_ms, one.batches, one.jobs_per_batch) == (5.0, 2, 1.5)
    assert (one.drafted, one.verified, one.accepted) == (4, 2, 1)


def test_sessions_that_are_not_whole_are_left_out() -> None:
    sent = [
        one for one in recorded.sent() if not (isinstance(one[2], Result) and one[2].session == A and one[2].round == 0)
    ]
    read = arrivals(recorded.recording(sent))
    assert read.visits == []
    assert read.left_out["a part of their text is not in the recording"] == 1
