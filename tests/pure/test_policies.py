"""Batch policies: the rules that all of them keep, and the purpose of each."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, get_args

import builders
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from services.scheduler.core import policies, wisp_plus
from services.scheduler.core.batching import MOST_LEFT_OUT, BatchBuilder, BatchLimits, BatchPlan, ChosenRound
from services.scheduler.core.dispatch import Dispatcher, SchedulingRules
from services.scheduler.core.mutable_shape import MutableShape
from services.scheduler.core.policies import POLICIES, PolicyOptions, PolicyPart, Situation
from services.scheduler.core.pool import PendingRound, VerifierState
from services.scheduler.core.round_queue import QueuedRound, RoundQueue, queued_round
from services.scheduler.settings import SchedulerSettings
from shared import cost
from shared.kernels.layout import BLOCK
from shared.messages import CostModel

OURS: list[str] = ["wisp", "wisp+"]
NOW = 1000.0
SLED = 8
MODEL = builders.cost_model("v", ratio_p90=1.2, ratio_p99=1.5)
LIMITS = BatchLimits(400.0, 2048, 5000.0)


def pending(
    name: str, *, arrived: float = NOW, due: float | None = None, base: int = 20, acceptance: tuple[float, ...] = ()
) -> PendingRound:
    verify = builders.verify(name, 0, base, [1] * len(acceptance), acceptance=list(acceptance))
    return PendingRound(verify, arrived, due)


def verifier(cached: dict[str, int] | None = None, *, room: int = 100_000, model: CostModel = MODEL) -> VerifierState:
    beat = builders.heartbeat("v", free_tokens=room, total_tokens=room)
    return VerifierState(beat, NOW, model, cached or {})


def queue_of(rounds: list[PendingRound], state: VerifierState, limits: BatchLimits = LIMITS) -> RoundQueue:
    queue = RoundQueue()
    for one in rounds:
        queue.add(queued_round(state.model, one, state.cached.get(one.session_id, 0), limits.max_wait_ms))
    return queue


def plan(
    policy: str,
    rounds: list[PendingRound],
    state: VerifierState | None = None,
    limits: BatchLimits = LIMITS,
    without: frozenset[PolicyPart] = frozenset(),
) -> BatchPlan:
    state = state or held(rounds)
    return POLICIES[policy](PolicyOptions(SLED, without=without)).plan(
        queue_of(rounds, state, limits), Situation(state, limits, NOW)
    )


def held(rounds: list[PendingRound]) -> VerifierState:
    """A verifier with the KV of all rounds in its cache."""
    return verifier({one.session_id: one.verify.base_len - 1 for one in rounds})


def names(made: BatchPlan) -> list[str]:
    return [chosen.session_id for chosen in made.chosen]


def shape_of(rounds: list[ChosenRound]) -> MutableShape:
    """Shape of a batch of these rounds."""
    shape = MutableShape()
    for chosen in rounds:
        if chosen.prefill_to is None:
            base_len = chosen.pending.verify.base_len
            shape.add(chosen.queued.base + chosen.draft, base_len + chosen.draft, chosen.draft + 1)
        else:
            shape.add(chosen.prefill_to - chosen.queued.held, chosen.prefill_to, 0)
    return shape


# Bytes are one choice of Hypothesis, and a list of floats two for each element.
chances = st.binary(max_size=8).map(lambda drawn: tuple(byte / 255 for byte in drawn))
late_or_not = st.none() | st.floats(NOW - 3000, NOW + 6000)
held_share = st.none() | st.floats(0, 1)
rounds_ = st.lists(
    st.tuples(st.floats(NOW - 6000, NOW), late_or_not, st.integers(1, 3000), chances, held_share),
    min_size=1,
    max_size=30,
)
limits_ = st.builds(BatchLimits, st.floats(45, 1500), st.integers(128, 4096), st.floats(100, 8000))


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[PendingRound], VerifierState, BatchLimits]:
    rounds, cached = [], {}
    for arrived, due, base, acceptance, share in draw(rounds_):
        rounds.append(pending(f"s{len(rounds)}", arrived=arrived, due=due, base=base, acceptance=acceptance))
        if share is not None:
            cached[rounds[-1].session_id] = round(share * base)
    return rounds, verifier(cached, room=draw(st.integers(4096, 40_000))), draw(limits_)


FULL_CACHE = (
    [*(pending(f"s{i}", base=1000, due=NOW + 400) for i in range(4)), pending("prompt", base=3000, due=NOW - 400)],
    verifier({f"s{i}": 999 for i in range(4)}, room=4096),
    BatchLimits(400.0, 2048, 5000.0),
)
"""The short rounds alone fill the cache, but a block is reserved for the prompt."""


@settings(max_examples=3 * settings.default.max_examples)
@given(situations(), st.sampled_from(sorted(POLICIES)))
@example(FULL_CACHE, "wisp")
@example(FULL_CACHE, "wisp+")
def test_a_batch_stays_within_its_budgets_of_tokens_memory_and_time(
    situation: tuple[list[PendingRound], VerifierState, BatchLimits], policy: str
) -> None:
    rounds, state, limits = situation
    made = plan(policy, rounds, state, limits)
    shape = shape_of(made.chosen)
    assert made.predicted_ms == pytest.approx(cost.predict_ms(state.model, shape))
    assert made.chosen
    assert len(set(names(made))) == len(made.chosen)
    if len(made.chosen) > 1:
        assert shape.new_tokens <= limits.max_batch_tokens
        lengths = [c.prefill_to or c.pending.length_after for c in made.chosen]
        assert sum(-(-length // BLOCK) * BLOCK for length in lengths) <= state.heartbeat.total_tokens
        assert POLICIES[policy].static or made.predicted_ms <= limits.max_batch_ms
    for chosen in made.chosen:
        assert 0 <= chosen.draft <= chosen.pending.draft_length
        if chosen.prefill_to is not None:
            assert chosen.queued.held < chosen.prefill_to < chosen.pending.verify.base_len
            assert chosen.prefill_to % BLOCK == 0


@given(situations(), st.sampled_from(sorted(POLICIES)))
def test_a_batch_gives_reasons_for_its_rounds_and_for_those_left_out(
    situation: tuple[list[PendingRound], VerifierState, BatchLimits], policy: str
) -> None:
    rounds, state, limits = situation
    made = plan(policy, rounds, state, limits)
    assert all(chosen.reason for chosen in made.chosen)
    assert made.waiting == len(rounds) - len(made.chosen)
    assert len(made.left_out) == min(MOST_LEFT_OUT, made.waiting)
    assert {left.session for left in made.left_out}.isdisjoint(names(made))
    assert all(left.reason for left in made.left_out)


@given(situations(), st.sampled_from(sorted(POLICIES)), st.randoms())
def test_the_order_of_messages_does_not_matter(
    situation: tuple[list[PendingRound], VerifierState, BatchLimits], policy: str, rng: random.Random
) -> None:
    rounds, state, limits = situation
    shuffled = list(rounds)
    rng.shuffle(shuffled)
    assert plan(policy, rounds, state, limits) == plan(policy, shuffled, state, limits)


class WatchedBatch(BatchBuilder):
    """Records the predicted time of the batch at the addition of each round, computed anew from what is in it."""

    def __init__(self, verifier: VerifierState, limits: BatchLimits, start_ms: float) -> None:
        super().__init__(verifier, limits, start_ms)
        self.model = verifier.model
        self.blocks_of: list[str] = []
        """Sessions that a block of their prompts was ever reserved for."""
        self.reserved: QueuedRound | None = None
        self.added: list[tuple[ChosenRound, float, int]] = []
        """The whole rounds, each with the predicted time and the draft tokens in the batch when it was added."""

    def reserve_block(self, queued: QueuedRound) -> None:
        super().reserve_block(queued)
        self.blocks_of.append(queued.session_id)
        self.reserved = queued

    def release_reserved(self) -> None:
        super().release_reserved()
        self.reserved = None

    def take_round(self, queued: QueuedRound, draft: int, reason: str, **options: Any) -> bool:
        if not super().take_round(queued, draft, reason, **options):
            return False
        shape = shape_of(self.chosen)
        if (other := self.reserved) is not None and other is not queued:
            assert other.next_block is not None
            shape.add(other.next_block - other.held, other.next_block, 0)
        drafts = sum(chosen.draft for chosen in self.chosen[:-1])
        self.added.append((self.chosen[-1], cost.predict_ms(self.model, shape), drafts))
        return True


def may_reserve(policy: str, queue: RoundQueue, limits: BatchLimits) -> list[str]:
    """Sessions one of which a block may be reserved for: the policy's first round, or its first prompt by deadline."""
    if policy == "wisp+":
        return [queued.session_id for queued in queue.by("deadline", "prompts")][:1]
    urgent = [q.session_id for q in queue.by("latest start") if q.latest_ms < NOW + limits.max_batch_ms]
    if urgent:
        return urgent[:1]
    return [next(queue.by("density")).session_id, next(queue.by("arrival")).session_id]


BLOCK_FIRST = [pending("due", arrived=0.0, due=NOW + 55, base=1), pending("prompt", arrived=0.0, base=71)]
"""The block reserved for the prompt makes the other round late, and then the whole prompt fits."""
BLOCK_OF_ANOTHER = [pending("due", arrived=0.0, due=NOW + 88, base=65), pending("prompt", arrived=0.0, base=65)]
"""The round that is due has a block to compute as well, but the block that makes it late is reserved for the other."""
WHOLE_PROMPT = [pending("due", arrived=0.0, due=NOW + 230, base=71), pending("prompt", arrived=0.0, base=100)]
"""The prompt that the block is reserved for fits as a whole and is on time; a block of the other makes it late."""


@settings(max_examples=3 * settings.default.max_examples)
@given(situations(), st.sampled_from(OURS))
@example((BLOCK_FIRST, verifier({"due": 1}, room=4096), BatchLimits(319.0, 137, 1455.0)), "wisp+")
@example((BLOCK_OF_ANOTHER, verifier({"due": 49}, room=4096), BatchLimits(203.0, 128, 100.0)), "wisp+")
@example((WHOLE_PROMPT, verifier(room=4096), BatchLimits(450.0, 2048, 1400.0)), "wisp+")
def test_a_round_that_is_added_on_time_stays_on_time(
    situation: tuple[list[PendingRound], VerifierState, BatchLimits], policy: str
) -> None:
    """A round is late only if it is too late for what is in the batch when the round is added.

    That is the rounds and draft tokens added before it, and the block reserved for another round's prompt, so that
    prompts are computed however many rounds are late: in wisp for the first round if it does not fit whole, in wisp+
    for the first urgent prompt. In wisp+, no draft token is added before an urgent round.
    """
    rounds, state, limits = situation
    built: list[WatchedBatch] = []

    def build(verifier: VerifierState, limits: BatchLimits, start_ms: float) -> WatchedBatch:
        built.append(WatchedBatch(verifier, limits, start_ms))
        return built[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "BatchBuilder", build)
        patch.setattr(wisp_plus, "BatchBuilder", build)
        made = plan(policy, rounds, state, limits)
    batch = next(batch for batch in built if batch.chosen[0] is made.chosen[0])
    caution = state.model.ratio_p90
    for chosen, then_ms, drafts in batch.added:
        due_ms = chosen.pending.due_ms
        if due_ms is not None and then_ms * caution <= due_ms - NOW:
            assert made.predicted_ms * caution <= due_ms - NOW + 1e-6
        if policy == "wisp+" and not chosen.queued.is_prompt and chosen.queued.latest_ms < NOW + limits.max_batch_ms:
            assert not drafts
    assert set(batch.blocks_of) <= {*names(made)} & {*may_reserve(policy, queue_of(rounds, state, limits), limits)}


@settings(max_examples=3 * settings.default.max_examples)
@given(situations(), st.sampled_from(OURS), st.data())
def test_a_tighter_deadline_never_delays_a_round(
    situation: tuple[list[PendingRound], VerifierState, BatchLimits], policy: str, data: st.DataObject
) -> None:
    rounds, state, limits = situation
    made = plan(policy, rounds, state, limits)
    served = [c.pending for c in made.chosen if c.prefill_to is None]
    assume(served)
    one = data.draw(st.sampled_from(served))
    due = one.due_ms if one.due_ms is not None else NOW + 10_000
    tighter = PendingRound(one.verify, one.arrived_ms, due - data.draw(st.floats(0, 8000)))
    others = [p for p in rounds if p is not one]
    assert one.session_id in names(plan(policy, [*others, tighter], state, limits))


@settings(max_examples=3 * settings.default.max_examples)
@given(situations())
def test_without_slos_wisp_plans_at_least_the_token_rate_of_fcfs(
    situation: tuple[list[PendingRound], VerifierState, BatchLimits],
) -> None:
    rounds, state, limits = situation
    fresh = [PendingRound(p.verify, NOW - (NOW - p.arrived_ms) / 100, None) for p in rounds]
    patient = replace(limits, max_wait_ms=1e9)
    assert plan("wisp", fresh, state, patient).rate >= plan("fcfs", fresh, state, patient).rate - 1e-12


VARIANTS: list[tuple[str, frozenset[PolicyPart]]] = [
    *((policy, frozenset()) for policy in POLICIES),
    *(("wisp+", frozenset({part})) for part in get_args(PolicyPart)),
]


@pytest.mark.parametrize(("policy", "without"), VARIANTS)
@pytest.mark.parametrize("base", [20, 900])
def test_no_round_starves(policy: str, without: frozenset[PolicyPart], base: int) -> None:
    """A best-effort round competes with more sessions than the verifier can serve, all of them always late."""
    limits = BatchLimits(200.0, 2048, 1000.0)
    victim = pending("victim", base=base, arrived=NOW)
    made = POLICIES[policy](PolicyOptions(SLED, without=without))
    state = verifier({f"s{i}": 19 for i in range(60)})
    waiting = [pending(f"s{i}", arrived=NOW - i, due=NOW - 60_000, acceptance=(0.9,)) for i in range(60)]
    waiting.append(victim)
    now, batches_after = NOW, 0
    while victim in waiting:
        batch = made.plan(queue_of(waiting, state, limits), Situation(state, limits, now))
        now += batch.predicted_ms
        batches_after += now > NOW + limits.max_wait_ms
        for chosen in batch.chosen:
            if chosen.prefill_to is not None:
                state.cached[chosen.session_id] = chosen.prefill_to
                continue
            waiting.remove(chosen.pending)
            if chosen.pending is not victim:
                waiting.append(pending(chosen.session_id, arrived=now, due=now - 60_000, acceptance=(0.9,)))
        # Rounds that arrived before its deadline go first, and a long prompt needs a batch for each of its blocks.
        assert batches_after <= 4 + base // BLOCK


@pytest.mark.parametrize("name", POLICIES)
def test_every_registered_policy_is_a_choice_of_the_settings(name: str) -> None:
    rules = SchedulerSettings(policy=name).rules  # type: ignore[call-arg]
    assert Dispatcher("s1", rules).load(0.0).policy == name


def test_the_load_carries_whether_a_policy_is_first_come_first_served() -> None:
    loads = [Dispatcher("s1", SchedulingRules(name, LIMITS)).load(0.0) for name in POLICIES]
    assert {load.policy for load in loads if load.first_come} == {"sled", "fcfs"}


def test_fcfs_takes_rounds_in_order_of_arrival() -> None:
    rounds = [pending("b", arrived=2.0, due=5.0), pending("a", arrived=1.0), pending("c", arrived=3.0, due=1.0)]
    made = plan("fcfs", rounds)
    assert names(made) == ["a", "b", "c"]
    assert made.chosen[0].reason == "waited 999 ms"


def test_edf_takes_the_earliest_deadline_first() -> None:
    rounds = [pending("later", due=NOW + 900), pending("none"), pending("urgent", due=NOW + 50.0)]
    assert names(plan("edf", rounds)) == ["urgent", "later", "none"]


def test_sled_takes_the_first_rounds_whole_at_any_cost() -> None:
    rounds = [pending("long", arrived=0.0, base=1500)] + [pending(f"s{i}", arrived=float(i)) for i in range(1, 12)]
    made = plan("sled", rounds, verifier())
    assert names(made) == ["long", *(f"s{i}" for i in range(1, SLED))]
    assert made.chosen[0].prefill_to is None
    assert made.predicted_ms > LIMITS.max_batch_ms


def test_wisp_leaves_out_rounds_that_would_delay_an_urgent_one() -> None:
    urgent = pending("urgent", due=NOW + 100)
    long = pending("long", base=100, due=NOW + 3000)
    state = verifier({"urgent": 19})
    assert names(plan("fcfs", [long, urgent], state)) == ["long", "urgent"]
    made = plan("wisp", [long, urgent], state)
    assert names(made) == ["urgent"]
    assert made.left_out[0].session == "long"
    assert "the limit is" in made.left_out[0].reason


def test_wisp_fills_the_room_by_tokens_per_time() -> None:
    likely = [pending(f"likely{i}", acceptance=(0.9,) * 4) for i in range(20)]
    unlikely = [pending(f"unlikely{i}", arrived=NOW - 1, acceptance=(0.1,) * 4) for i in range(20)]
    chosen = names(plan("wisp", unlikely + likely))
    assert len(chosen) > 20
    assert {p.session_id for p in likely} <= set(chosen)


def test_wisp_plus_trims_the_least_likely_tokens_across_sessions() -> None:
    sure, unsure = pending("sure", acceptance=(0.95,) * 8), pending("unsure", acceptance=(0.9, 0.05, 0.9, 0.9))
    drafts = {c.session_id: c.draft for c in plan("wisp+", [sure, unsure]).chosen}
    assert drafts == {"sure": 8, "unsure": 1}
    whole = plan("wisp+", [sure, unsure], without=frozenset({"trimming"}))
    assert {c.session_id: c.draft for c in whole.chosen} == {"sure": 8, "unsure": 4}


def test_wisp_plus_trims_more_when_more_sessions_share_the_fixed_time() -> None:
    def verified(sessions: int) -> float:
        rounds = [pending(f"s{i:02}", acceptance=(0.6,) * 6) for i in range(sessions)]
        made = plan("wisp+", rounds, limits=replace(LIMITS, max_batch_ms=1e6))
        return sum(c.draft for c in made.chosen) / sessions

    assert verified(1) > verified(8) > verified(64)


def test_wisp_plus_cuts_a_prompt_so_that_other_rounds_keep_slack() -> None:
    rounds = [pending(f"s{i}", due=NOW + 460.0) for i in range(4)]
    long = pending("long", base=1000, due=NOW + 5000)
    state = verifier({p.session_id: 19 for p in rounds})
    made = plan("wisp+", [long, *rounds], state)
    (chunk,) = [c for c in made.chosen if c.prefill_to is not None]
    assert chunk.session_id == "long"
    assert made.predicted_ms * MODEL.ratio_p90 <= 230.0 + 1e-6, "half of their slack"
    hurried = pending("long", base=1000, due=NOW + 1500)
    sooner = plan("wisp+", [hurried, *rounds], state)
    (bigger,) = [c for c in sooner.chosen if c.prefill_to is not None]
    assert (bigger.prefill_to or 0) > (chunk.prefill_to or 0), "an urgent prompt may use all of it"
    assert sooner.predicted_ms * MODEL.ratio_p90 <= 460.0 + 1e-6


def test_wisp_plus_takes_prompts_by_deadline_where_no_block_fits() -> None:
    long, soon = pending("long", base=1500, due=NOW + 4000), pending("soon", base=200, due=NOW + 3000)
    limits = BatchLimits(50.0, 2048, 5000.0)
    made = plan("wisp+", [long, soon], verifier(), limits)
    assert made.predicted_ms > limits.max_batch_ms
    assert [(chosen.session_id, chosen.prefill_to) for chosen in made.chosen] == [("soon", BLOCK)]


SLOW = builders.cost_model("v", [200.0, 2.0, 15.0, 0.0, 0.0, 0.4, 15.0], knee=8)
"""A large model on a CPU: the last part of a prompt takes longer than the longest step."""


def test_the_last_part_of_a_prompt_goes_before_prompts_that_came_later() -> None:
    rest = pending("rest", arrived=NOW - 3000, due=NOW - 1000, base=BLOCK + 40)
    crowd = [pending(f"s{i}", arrived=NOW - 2900 + i, due=NOW - 900 + i, base=150) for i in range(8)]
    assert names(plan("wisp+", [rest, *crowd], verifier({"rest": BLOCK}, model=SLOW))) == ["rest"]


def test_the_last_part_of_a_prompt_waits_for_prompts_that_came_earlier() -> None:
    rest = pending("rest", arrived=NOW - 2800, due=NOW - 800, base=BLOCK + 40)
    crowd = [pending(f"s{i}", arrived=NOW - 2900 + i, due=NOW - 900 + i, base=150) for i in range(8)]
    made = plan("wisp+", [rest, *crowd], verifier({"rest": BLOCK}, model=SLOW))
    assert [(chosen.session_id, chosen.prefill_to) for chosen in made.chosen] == [("s0", BLOCK)]


def test_wisp_plus_leaves_time_for_returning_sessions() -> None:
    long = pending("long", base=1000, due=NOW + 9000)
    state = verifier()
    policy = POLICIES["wisp+"](PolicyOptions(SLED))
    alone = policy.plan(queue_of([long], state), Situation(state, LIMITS, NOW))
    expecting = policy.plan(queue_of([long], state), Situation(state, LIMITS, NOW, expected_due_ms=NOW + 480.0))
    assert 0 < (expecting.chosen[0].prefill_to or 0) < (alone.chosen[0].prefill_to or 0)


def test_wisp_plus_delays_rounds_with_slack_when_another_is_late() -> None:
    relaxed = [pending(f"relaxed{i}", due=NOW + 2000) for i in range(3)]
    late, punctual = pending("late", due=NOW - 10), pending("punctual", due=NOW + 300)
    assert names(plan("wisp+", [*relaxed, late])) == ["late"]
    assert len(names(plan("wisp+", [*relaxed, punctual]))) == 4
    soon = pending("relaxed0", due=NOW + 200)
    assert sorted(names(plan("wisp+", [soon, *relaxed[1:], late]))) == ["late", "relaxed0"]
