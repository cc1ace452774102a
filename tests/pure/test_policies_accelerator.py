"""Batches of wisp+ where loading the weights hides the arithmetic of a step's first tokens, as on an accelerator."""

from __future__ import annotations

from itertools import count

import builders
import pytest
from test_policies import NOW, pending, queue_of, verifier

from services.scheduler.core.batching import BatchLimits, BatchPlan, hidden_tokens
from services.scheduler.core.policies import POLICIES, PolicyOptions, Situation
from services.scheduler.core.pool import PendingRound, VerifierState
from services.scheduler.core.prompts import LEAST_ROOM, PROMISE_SHARE
from services.scheduler.core.wisp_plus import AHEAD_STEPS
from shared import cost
from shared.kernels.layout import BLOCK
from shared.messages import CostModel

ACCELERATOR = builders.cost_model("v", (41.8, 0.0, 0.356, 9.9, 100.0, 0.0, 0.024), knee=128, ratio_p90=1.02)
"""Qwen3-32B on an A100, as the estimator fits it."""
HIDDEN = 128
LIMITS = BatchLimits(400.0, 2048, 3000.0)
TPOT_MS = 50.0
STEP_MS = 45.0
"""A step of `HIDDEN` tokens."""


def planned(
    rounds: list[PendingRound], promised_ms: float = 50.0, now: float = NOW, model: CostModel = ACCELERATOR
) -> BatchPlan:
    state = held(rounds, model)
    situation = Situation(state, LIMITS, now, promised_ms=promised_ms)
    return POLICIES["wisp+"](PolicyOptions()).plan(queue_of(rounds, state, LIMITS), situation)


def held(rounds: list[PendingRound], model: CostModel = ACCELERATOR) -> VerifierState:
    """A verifier with the KV of all rounds but the prompts'."""
    cached = {one.session_id: one.verify.base_len - 1 for one in rounds if not one.session_id.startswith("prompt-")}
    return verifier(cached, model=model)


def prompt(name: str, tokens: int, left_ms: float, waited_ms: float = 100.0) -> PendingRound:
    return pending(f"prompt-{name}", arrived=NOW - waited_ms, due=NOW + left_ms, base=tokens)


def drafted(name: str, slack_ms: float) -> PendingRound:
    verify = builders.verify(name, 3, 200, [1] * 8, acceptance=[0.9] * 8, tpot_ms=TPOT_MS)
    return PendingRound(verify, NOW, NOW + slack_ms)


def prompt_tokens(made: BatchPlan) -> dict[str, int]:
    """Tokens of each prompt in a batch."""
    return {
        one.session_id: one.queued.base if one.prefill_to is None else one.prefill_to - one.queued.held
        for one in made.chosen
        if one.session_id.startswith("prompt-")
    }


def test_only_an_accelerator_hides_tokens() -> None:
    assert hidden_tokens(ACCELERATOR) == HIDDEN
    assert hidden_tokens(cost.FALLBACK) == 0
    assert hidden_tokens(builders.cost_model()) == 0
    unloaded = ACCELERATOR.model_copy(update={"coefficients": [0.0, *ACCELERATOR.coefficients[1:]]})
    assert hidden_tokens(unloaded) == 0, "fitted to a few measurements: a scheduler divided by this time"


def test_a_cpu_computes_late_prompts_in_large_chunks() -> None:
    cpu = builders.cost_model("v", (160.0, 2.0, 8.8, 9.9, 100.0, 0.4, 2.0), knee=8)
    assert hidden_tokens(cpu) == 0
    late = [prompt(str(i), 150, left_ms=-5000.0, waited_ms=9000.0) for i in range(8)]
    made = planned([drafted("a", 300.0), *late], promised_ms=400.0, model=cpu)
    assert sum(prompt_tokens(made).values()) >= BLOCK, "a few tokens a step would never serve them"


@pytest.mark.parametrize("slack_ms", [60.0, 80.0, 2000.0])
def test_a_prompt_uses_the_hidden_tokens_that_rounds_leave(slack_ms: float) -> None:
    made = planned([drafted("a", slack_ms), prompt("p", 600, left_ms=1900.0)])
    assert {one.session_id for one in made.chosen} == {"a", "prompt-p"}
    assert HIDDEN - 16 <= sum(prompt_tokens(made).values()) + 1 + made.chosen[0].draft <= HIDDEN
    assert made.predicted_ms <= STEP_MS + 1


def test_drafts_of_rounds_with_time_to_spare_wait_for_prompts() -> None:
    rounds = [drafted(f"s{i}", 1000.0) for i in range(12)]
    alone = planned(rounds)
    beside = planned([*rounds, prompt("p", 2000, left_ms=1900.0)])
    assert all(one.draft == 8 for one in alone.chosen)
    assert all(one.draft == 0 for one in beside.chosen if one.prefill_to is None)
    assert len(beside.chosen) == 13


@pytest.mark.parametrize("slack_ms", [-50.0, 20.0, 60.0, 110.0])
def test_the_draft_tokens_that_a_round_needs_go_before_prompts(slack_ms: float) -> None:
    made = planned([drafted("a", slack_ms), prompt("p", 2000, left_ms=1900.0)])
    (one,) = [chosen for chosen in made.chosen if chosen.session_id == "a"]
    needed = 1.0 + (AHEAD_STEPS * 44.9 - slack_ms) / TPOT_MS
    assert needed <= one.value < needed + 1.0


def test_as_many_prompts_as_possible_come_in_time() -> None:
    """The long one is due first, and would make both others late."""
    long, *short = prompt("long", 3000, 1300.0), prompt("b", 1300, 1400.0), prompt("c", 1300, 1500.0)
    assert list(prompt_tokens(planned([long, *short]))) == ["prompt-b"]
    assert list(prompt_tokens(planned([long, short[0]]))) == ["prompt-b"]
    assert list(prompt_tokens(planned([prompt("long", 3000, 1300.0)]))) == ["prompt-long"]


def test_prompts_that_would_be_late_lengthen_the_step_up_to_the_promise() -> None:
    calm, hopeless, urgent = (
        planned([drafted("a", 500.0), prompt("p", 1600, left_ms=left)]) for left in (1900.0, 200.0, 580.0)
    )
    for made in (calm, hopeless):
        assert made.predicted_ms <= STEP_MS + 0.2
    assert STEP_MS + 1 < urgent.predicted_ms <= PROMISE_SHARE * TPOT_MS + 0.5
    assert prompt_tokens(urgent)["prompt-p"] > HIDDEN


def test_a_prompt_that_is_late_anyway_lets_the_others_pass() -> None:
    made = planned([prompt("late", 600, left_ms=40.0), prompt("timely", 600, left_ms=700.0)])
    assert list(prompt_tokens(made)) == ["prompt-timely"]


def test_a_late_prompt_goes_first_once_it_has_waited_for_the_longest_time() -> None:
    late = prompt("late", 600, left_ms=-1000.0, waited_ms=LIMITS.max_wait_ms)
    made = planned([late, prompt("timely", 600, left_ms=700.0)])
    assert next(iter(prompt_tokens(made))) == "prompt-late"


@pytest.mark.parametrize(("timely", "late_tokens"), [(1800, LEAST_ROOM * HIDDEN), (40, HIDDEN - 40)])
def test_a_prompt_that_waited_too_long_leaves_the_others_what_they_need(timely: int, late_tokens: int) -> None:
    """It is late in any case; were it to take the whole step, the others would be as well, one after the other."""
    late = prompt("late", 3000, left_ms=-1000.0, waited_ms=LIMITS.max_wait_ms)
    made = prompt_tokens(planned([late, prompt("timely", timely, left_ms=900.0)]))
    assert made["prompt-late"] == pytest.approx(late_tokens, abs=2)
    assert made["prompt-timely"] >= min(timely, HIDDEN - late_tokens - 2)


def test_a_prompt_promised_more_than_the_longest_wait_keeps_its_turn() -> None:
    patient = prompt("patient", 1200, left_ms=5000.0, waited_ms=LIMITS.max_wait_ms + 100)
    assert list(prompt_tokens(planned([patient, prompt("soon", 1200, left_ms=700.0)]))) == ["prompt-soon"]


def test_a_prompt_with_time_beyond_the_longest_wait_is_not_given_up() -> None:
    """It could not come in time if it were due after the longest wait."""
    made = planned([prompt("patient", 3000, left_ms=1100.0, waited_ms=LIMITS.max_wait_ms - 100)])
    assert made.predicted_ms > STEP_MS + 1


def test_prompts_behind_one_that_waited_too_long_make_up_for_it() -> None:
    late = prompt("late", 2000, left_ms=-1000.0, waited_ms=LIMITS.max_wait_ms)
    behind = prompt("behind", 1900, left_ms=1500.0)
    assert planned([behind]).predicted_ms <= STEP_MS + 0.2
    assert planned([late, behind]).predicted_ms > STEP_MS + 1


def test_a_late_prompt_that_ends_soon_leaves_the_others_their_room() -> None:
    """Room is reserved for what prompts need in this step, and not for the few tokens of the first one alone."""
    rounds = [drafted(f"s{i}", 48.0) for i in range(40)]
    short = prompt("short", 66, left_ms=-1000.0, waited_ms=LIMITS.max_wait_ms)
    long = prompt("long", 1900, left_ms=1500.0)
    alone, beside = planned([*rounds, long]), prompt_tokens(planned([*rounds, short, long]))
    assert list(beside) == ["prompt-short", "prompt-long"]
    assert sum(beside.values()) >= sum(prompt_tokens(alone).values()) - 1


def test_room_is_reserved_only_for_prompts_whose_kv_fits_the_cache() -> None:
    late = prompt("late", 3000, left_ms=-1000.0, waited_ms=LIMITS.max_wait_ms)
    rounds = [late, prompt("timely", 1900, left_ms=1500.0)]
    state = verifier(room=64, model=ACCELERATOR)
    situation = Situation(state, LIMITS, NOW, promised_ms=TPOT_MS)
    made = POLICIES["wisp+"](PolicyOptions()).plan(queue_of(rounds, state, LIMITS), situation)
    assert list(prompt_tokens(made)) == ["prompt-late"]


def test_late_rounds_do_not_keep_others_from_hidden_tokens() -> None:
    rounds = [pending("late", due=NOW - 100.0), *(pending(f"s{i}", due=NOW + 3000.0) for i in range(20))]
    assert len(planned(rounds).chosen) == 21


def test_late_rounds_that_need_every_token_do_not_starve_a_prompt() -> None:
    rounds = [pending(f"s{i}", due=NOW - 100.0, base=200, acceptance=(0.95,) * 8) for i in range(40)]
    made = planned([*rounds, prompt("late", 600, left_ms=-1000.0, waited_ms=LIMITS.max_wait_ms)])
    assert prompt_tokens(made)["prompt-late"] >= 64


def test_chunks_fill_the_hidden_tokens_to_the_last_one() -> None:
    made = planned([pending("a", due=NOW + 500.0), prompt("p", 600, left_ms=1900.0)])
    assert prompt_tokens(made) == {"prompt-p": HIDDEN - 1}


@pytest.mark.parametrize("left_ms", [None, 60.0, 700.0])
@pytest.mark.parametrize("base", [20, 200, 900])
@pytest.mark.parametrize(("sessions", "prompts"), [(12, 0), (1, 2), (30, 1)])
def test_no_round_starves_on_an_accelerator(base: int, left_ms: float | None, sessions: int, prompts: int) -> None:
    """It competes with sessions that are always late and come back at once, and with prompts in each step."""
    waits = pending("victim", arrived=NOW, due=None if left_ms is None else NOW + left_ms, base=base)
    state = verifier({f"s{i}": 199 for i in range(sessions)}, model=ACCELERATOR)
    state.cached["victim"] = 19 if base == 20 else 0
    rounds = [late_round(i, NOW) for i in range(sessions)]
    limits, now, steps = BatchLimits(400.0, 2048, 300.0), NOW, 0
    for number in count():
        rounds += [pending(f"prompt-{number}-{i}", arrived=now, due=now + 300.0, base=300) for i in range(prompts)]
        situation = Situation(state, limits, now, promised_ms=TPOT_MS)
        made = POLICIES["wisp+"](PolicyOptions()).plan(queue_of([waits, *rounds], state, limits), situation)
        now += made.predicted_ms
        for one in made.chosen:
            if one.prefill_to is not None:
                state.cached[one.session_id] = one.prefill_to
            elif one.pending is waits:
                return
            else:
                rounds.remove(one.pending)
                if one.session_id.startswith("s"):
                    rounds.append(late_round(int(one.session_id[1:]), now))
        steps += now > NOW + max(limits.max_wait_ms, left_ms or 0.0)
        # It is behind the prompts that came with it, and gets a quarter of each step's hidden tokens at least.
        assert steps <= 4 + (base + 300 * prompts) / (LEAST_ROOM * HIDDEN)


def late_round(number: int, now: float) -> PendingRound:
    verify = builders.verify(f"s{number}", 3, 200, [1] * 8, acceptance=[0.9] * 8, tpot_ms=TPOT_MS)
    return PendingRound(verify, now, now - 60_000.0)
