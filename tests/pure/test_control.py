"""The speculation controller: the length of drafts, calibration, plain decoding, measured times, and its files."""

from __future__ import annotations

import math
import random
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path

import builders
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from services.drafter import metrics
from services.drafter.control import (
    Controller,
    DraftDecision,
    DraftRound,
    DraftToken,
    RoundTimes,
    RuleName,
    SessionControl,
)
from services.drafter.control.calibration import Platt
from services.drafter.control.controller import FIRST_WAIT, LONGEST_WAIT, PROBE_SHARE
from services.drafter.control.features import NAMES, RoundContext, features, logit
from services.drafter.control.records import RoundRecord
from services.drafter.control.weights import ControlWeights, Inputs, Logistic, Perceptron, Predictor
from services.drafter.control_files import load_weights, read_records, save_weights, write_record
from services.drafter.core.draft import Draft
from shared.errors import ModelError, SettingsError
from shared.log_odds import SessionOffset, sigmoid
from shared.messages import Load

BASE_MS, TOKEN_MS, STEP_MS = 54.0, 2.2, 4.3
NO_INPUTS = Inputs(features=[], mean=[], scale=[])
EXACT = Logistic(inputs=Inputs(features=["confidence"], mean=[0.0], scale=[1.0]), weights=[1.0], bias=0.0)
"""Estimates the acceptance as the confidence."""
RULES: list[RuleName] = ["fixed", "entropy", "predictor", "marginal"]

probabilities = st.floats(0.001, 0.999)


def network(features_: Sequence[str]) -> Perceptron:
    size = len(features_)
    return Perceptron(
        inputs=Inputs(features=list(features_), mean=[0.0] * size, scale=[1.0] * size),
        hidden=[[0.1] * size] * 16,
        hidden_bias=[0.0] * 16,
        weights=[1.0] * 16,
        bias=0.0,
    )


def measured(price_ms: float = 0.0, draft_cap: int = 64) -> RoundTimes:
    """Times learned from many rounds of the machine that the README measures."""
    times = RoundTimes()
    for _ in range(10):
        for k in (0, 1, 2, 4, 8):
            times.learn_round(k, BASE_MS + TOKEN_MS * k, BASE_MS - 6 + TOKEN_MS * k, 1.0, k + 1)
        times.learn_draft("model", 4, 4 * STEP_MS)
        times.learn_draft("lookup", 4, 0.02)
    times.apply_load(load(price_ms, draft_cap))
    return times


def load(price_ms: float = 0.0, draft_cap: int = 64) -> Load:
    return builders.load(price_ms, draft_cap=draft_cap)


def controller(rule: RuleName = "marginal", length: int = 8, price_ms: float = 0.0, draft_cap: int = 64) -> Controller:
    predictor = Predictor(network=network(["confidence"]), threshold=0.5)
    weights = ControlWeights(acceptance={"model": EXACT}, predictor=predictor)
    return Controller(rule, length, weights, measured(price_ms, draft_cap))


def token(confidence: float = 0.9, source: str = "model", **more: object) -> DraftToken:
    return DraftToken(source, confidence, entropy=-2 * math.log(confidence), **more)  # type: ignore[arg-type]


def draft(round_: DraftRound, tokens: Sequence[DraftToken]) -> list[DraftDecision]:
    """Add tokens until the draft ends."""
    steps = []
    for one in tokens[: round_.longest]:
        steps.append(round_.add(one))
        if steps[-1] is not DraftDecision.MORE:
            break
    return steps


def run_rounds(
    session: SessionControl,
    rounds: int,
    confidence: Callable[[], float],
    truth: Callable[[float], float],
    rng: random.Random | None = None,
) -> list[tuple[DraftRound, int]]:
    """Run rounds whose tokens are accepted with probability truth(confidence); return each with its accepted count."""
    rng = rng or random.Random(1)
    seen = []
    for _ in range(rounds):
        round_ = session.begin(100, 0.0)
        draft(round_, [token(confidence()) for _ in range(round_.longest)])
        correct = [rng.random() < truth(drafted.token.confidence) for drafted in round_.drafted]
        accepted = next((i for i in range(round_.kept) if not correct[i]), round_.kept)
        dropped = accepted == round_.kept < len(correct)
        session.settle(round_, round_.kept, accepted, correct[accepted] if dropped else None)
        seen.append((round_, accepted))
    return seen


# Stop rules


def test_fixed_drafts_to_the_end() -> None:
    round_ = controller("fixed", 3).session("model").begin(10, 0.0)
    assert draft(round_, [token(0.01)] * 9) == [DraftDecision.MORE, DraftDecision.MORE, DraftDecision.LAST]
    assert round_.acceptance == pytest.approx([0.01] * 3)


def test_entropy_stops_before_an_uncertain_token() -> None:
    round_ = controller("entropy").session("model").begin(10, 0.0)
    decisions = draft(round_, [token(0.9), token(0.9), token(0.01)])
    assert decisions == [DraftDecision.MORE, DraftDecision.MORE, DraftDecision.DROP]
    assert round_.kept == 2


def test_entropy_becomes_strict_when_many_tokens_are_rejected() -> None:
    session = controller("entropy").session("model")
    lengths = [round_.kept for round_, _ in run_rounds(session, 200, lambda: 0.5, lambda _: 0.0)]
    assert lengths[0] == 8
    assert sum(lengths[-50:]) / 50 < 2


def test_predictor_stops_where_it_expects_a_rejection() -> None:
    round_ = controller("predictor").session("model").begin(10, 0.0)
    assert draft(round_, [token(0.9), token(0.4)]) == [DraftDecision.MORE, DraftDecision.DROP]


def test_predictor_judges_copied_tokens_by_their_calibrated_acceptance() -> None:
    round_ = controller("predictor").session("lookup").begin(10, 0.0)
    copies = [DraftToken("lookup", support=5), DraftToken("lookup", support=1)]
    assert draft(round_, copies) == [DraftDecision.MORE, DraftDecision.DROP]


def test_predictor_without_weights_is_refused() -> None:
    with pytest.raises(SettingsError, match="wisp controller train"):
        Controller("predictor", 4)


def best_length(acceptance: float, price_ms: float) -> int:
    """Return the constant draft length with the most tokens per second, for tokens of equal acceptance."""

    def rate(k: int) -> float:
        return sum(acceptance**i for i in range(k + 1)) / (BASE_MS + k * (STEP_MS + TOKEN_MS + price_ms))

    return max(range(9), key=rate)


@pytest.mark.parametrize("price_ms", [0.0, 10.0, 40.0, 200.0])
@pytest.mark.parametrize("acceptance", [0.05, 0.3, 0.5, 0.7, 0.9])
def test_marginal_drafts_close_to_the_best_length(acceptance: float, price_ms: float) -> None:
    session = controller(price_ms=price_ms).session("model")
    lengths = [
        round_.kept for round_, _ in run_rounds(session, 300, lambda: acceptance, lambda c: c) if not round_.probing
    ]
    usual = max(set(lengths), key=lengths.count)
    assert abs(usual - best_length(acceptance, price_ms)) <= (1 if best_length(acceptance, price_ms) else 0)


def test_marginal_keeps_a_token_that_it_would_not_have_drafted() -> None:
    # The time to draft the token is spent; only its verification still costs time.
    c = controller()
    for _ in range(50):
        c.times.learn_draft("model", 1, 30.0)
    round_ = c.session("model").begin(10, 0.0)
    assert (round_.longest, round_.wants("model")) == (0, False)
    round_.longest = 8
    assert round_.add(token(0.3)) is DraftDecision.LAST


def test_marginal_copies_where_drafting_by_a_model_does_not_pay() -> None:
    c = controller()
    for _ in range(50):
        c.times.learn_draft("model", 1, 60.0)
    round_ = c.session("lookup", "model").begin(10, 0.0)
    assert (round_.wants("lookup"), round_.wants("model"), round_.longest) == (True, False, 8)
    assert round_.add(DraftToken("lookup", support=3)) is DraftDecision.MORE


def kept(confidences: Sequence[float], price_ms: float, rule: RuleName = "marginal") -> int:
    round_ = controller(rule, price_ms=price_ms).session("model").begin(100, 0.0)
    draft(round_, [token(c) for c in confidences])
    return round_.kept


@given(st.lists(probabilities, min_size=8, max_size=8), st.floats(0, 100), st.floats(0, 100))
def test_a_higher_price_never_lengthens_the_draft(confidences: list[float], one: float, other: float) -> None:
    assert kept(confidences, max(one, other)) <= kept(confidences, min(one, other))


@given(st.lists(st.tuples(probabilities, probabilities), min_size=8, max_size=8), st.floats(0, 50))
def test_a_higher_acceptance_never_shortens_the_draft(pairs: list[tuple[float, float]], price_ms: float) -> None:
    assert kept([max(p) for p in pairs], price_ms) >= kept([min(p) for p in pairs], price_ms)


@given(st.sampled_from(RULES), st.integers(-1, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 30))
def test_no_draft_is_longer_than_room_setting_or_cap(rule: RuleName, room: int, length: int, cap: int, n: int) -> None:
    session = controller(rule, length, draft_cap=cap).session("model")
    for _ in range(n):
        run_rounds(session, 1, lambda: 0.8, lambda _: 0.0)
    round_ = session.begin(room, 0.0)
    for _ in range(20):
        round_.add(token())
    assert round_.kept <= round_.longest <= max(0, min(room, length, cap))
    assert round_.add(token()) is DraftDecision.DROP


broken = st.floats(allow_nan=True, allow_infinity=True)


@given(
    st.sampled_from(RULES),
    st.lists(st.builds(DraftToken, st.sampled_from(["model", "lookup"]), broken, st.floats(0, 20), broken, broken)),
    st.one_of(st.none(), broken),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_no_result_and_no_statistics_break_a_session(
    rule: RuleName, tokens: list[DraftToken], target_entropy: float | None, verified: int, accepted: int
) -> None:
    session = controller(rule).session("model", "lookup")
    for _ in range(3):
        round_ = session.begin(8, 1.0, target_entropy)
        draft(round_, tokens)
        session.settle(round_, verified, accepted)
    round_ = session.begin(8, 1.0)
    round_.add(token())
    assert all(0 <= p <= 1 for p in round_.acceptance)


# Calibration


@pytest.mark.parametrize(("slope", "offset"), [(1.0, -1.0), (0.5, 0.0), (1.5, 0.5)])
def test_estimates_converge_to_the_true_acceptance(slope: float, offset: float) -> None:
    rng = random.Random(3)
    session = controller("fixed", 4).session("model")

    def truth(confidence: float) -> float:
        return sigmoid(slope * logit(confidence) + offset)

    run_rounds(session, 1500, lambda: rng.uniform(0.02, 0.98), truth)
    round_ = session.begin(4, 0.0)
    draft(round_, [token(c) for c in (0.2, 0.5, 0.8, 0.95)])
    assert round_.acceptance == pytest.approx([truth(c) for c in (0.2, 0.5, 0.8, 0.95)], abs=0.13)


def test_calibration_of_a_source_carries_over_to_the_next_session() -> None:
    c, rng = controller("fixed"), random.Random(2)
    for _ in range(30):
        run_rounds(c.session("model"), 20, lambda: 0.8, lambda _: 0.4, rng)
    round_ = c.session("model").begin(8, 0.0)
    round_.add(token(0.8))
    assert round_.acceptance == pytest.approx([0.4], abs=0.1)


def test_each_session_is_calibrated_to_its_own_acceptance() -> None:
    c, rng = controller("fixed"), random.Random(2)
    good, bad = c.session("model"), c.session("model")
    for _ in range(100):
        run_rounds(good, 1, lambda: 0.6, lambda _: 0.9, rng)
        run_rounds(bad, 1, lambda: 0.6, lambda _: 0.2, rng)
    rounds = [good.begin(8, 0.0), bad.begin(8, 0.0)]
    for round_ in rounds:
        round_.add(token(0.6))
    assert rounds[0].acceptance[0] > 0.75
    assert rounds[1].acceptance[0] < 0.4


def test_sources_are_calibrated_separately() -> None:
    c = controller("fixed")
    session = c.session("model")
    run_rounds(session, 200, lambda: 0.5, lambda _: 0.05)
    untouched = controller("fixed").session("lookup").begin(8, 0.0)
    round_ = session.begin(8, 0.0)
    untouched.add(DraftToken("lookup", support=3))
    round_.add(DraftToken("lookup", support=3))
    assert round_.acceptance == untouched.acceptance


def test_tokens_after_a_rejection_or_a_trim_change_no_estimate() -> None:
    outcomes = []
    for tail in (0.01, 0.99):
        session = controller("fixed", 4).session("model")
        round_ = session.begin(4, 0.0)
        draft(round_, [token(0.6), token(0.6), token(tail), token(tail)])
        session.settle(round_, 2, 1)
        outcomes.append(session.acceptance("model", 0.3))
    assert outcomes[0] == outcomes[1]


@given(st.lists(st.tuples(st.floats(-8, 8), st.booleans()), max_size=200))
def test_calibration_stays_monotone_and_finite(tokens: list[tuple[float, bool]]) -> None:
    platt, offset = Platt(), SessionOffset()
    for z, accepted in tokens:
        platt.learn(z, accepted)
        offset.learn(z, accepted)
    assert platt.logit(-1) <= platt.logit(1)
    assert math.isfinite(platt.b)
    assert abs(offset.value) < 50


# Plain decoding and probes


def test_a_session_without_acceptance_decodes_plainly_and_sends_no_probe() -> None:
    session = controller().session("model")
    run_rounds(session, 200, lambda: 0.6, lambda _: 0.0)
    seen = [round_ for round_, _ in run_rounds(session, 400, lambda: 0.6, lambda _: 0.0)]
    assert [round_.kept for round_ in seen] == [0] * 400
    assert sum(len(round_.drafted) for round_ in seen) * STEP_MS > 0.005 * 400 * BASE_MS
    assert sum(len(round_.drafted) for round_ in seen) * STEP_MS < PROBE_SHARE * 400 * BASE_MS


def test_a_session_that_becomes_predictable_drafts_again() -> None:
    session = controller().session("model")
    run_rounds(session, 60, lambda: 0.7, lambda _: 0.0)
    assert session.begin(8, 0.0).longest == 0
    seen = run_rounds(session, 200, lambda: 0.7, lambda _: 0.95)
    assert min(round_.kept for round_, _ in seen[-20:]) >= 4


def test_a_probe_of_a_source_that_costs_nothing_comes_soon() -> None:
    session = Controller("marginal", 4).session("lookup")
    session.times.price_ms = 500.0
    seen = [round_ for round_, _ in run_rounds(session, 60, lambda: 0.9, lambda _: 1.0)]
    assert [i for i, round_ in enumerate(seen) if round_.probing] == list(range(FIRST_WAIT, 60, FIRST_WAIT + 1))


def test_a_probe_is_sent_if_its_token_turns_out_to_be_worth_it() -> None:
    session = controller().session("model")
    run_rounds(session, 60, lambda: 0.6, lambda _: 0.0)
    probe = next(round_ for _ in range(LONGEST_WAIT) if (round_ := session.begin(8, 0.0)).probing)
    assert draft(probe, [token(0.999)]) == [DraftDecision.LAST]


def test_a_deferred_probe_sends_no_draft_and_learns_from_the_bonus_token() -> None:
    session = controller(price_ms=500.0).session("model")
    round_ = next(round_ for _ in range(LONGEST_WAIT) if (round_ := session.begin(8, 0.0)).probing)
    (probe,) = round_.deferred_probes()
    assert (round_.longest, round_.wants("model"), round_.deferred_probes()) == (0, False, [])
    assert (probe.wants("model"), draft(probe, [token(0.999)])) == (True, [DraftDecision.DROP])
    before = session.acceptance("model", 1.0)
    session.settle(probe, 0, 0, bonus_matches=False)
    assert session.acceptance("model", 1.0) < before


def test_an_unready_source_drafts_nothing_and_does_not_rest() -> None:
    session = controller().session("model")
    round_ = session.begin(8, 0.0, unready={"model"})
    assert (round_.longest, round_.wants("model"), session.rests("model")) == (0, False, False)
    assert session.begin(8, 0.0).wants("model")


def test_a_dropped_token_teaches_by_the_targets_own_choice() -> None:
    estimates = []
    for matches in (False, None, True):
        session = controller("predictor").session("model")
        round_ = session.begin(8, 0.0)
        assert draft(round_, [token(0.9), token(0.3)]) == [DraftDecision.MORE, DraftDecision.DROP]
        session.settle(round_, 1, 1, matches)
        estimates.append(session.acceptance("model", 0.0))
    assert estimates == sorted(set(estimates))


def test_a_high_price_makes_sessions_decode_plainly_until_it_falls() -> None:
    c = controller()
    session = c.session("model")
    assert run_rounds(session, 5, lambda: 0.9, lambda _: 1.0)[-1][0].kept > 0
    c.times.apply_load(load(price_ms=1000.0))
    assert session.begin(8, 0.0).longest == 0
    c.times.apply_load(load(price_ms=0.0))
    assert session.begin(8, 0.0).longest > 0


def test_a_draft_cap_of_0_allows_no_probe() -> None:
    session = controller(draft_cap=0).session("model")
    assert [session.begin(8, 0.0).longest for _ in range(100)] == [0] * 100


# RoundTimes


def test_times_learn_the_line_and_the_steps() -> None:
    times = measured(price_ms=3.0)
    assert times.base_ms == pytest.approx(BASE_MS, rel=0.02)
    assert times.added_ms(4) == pytest.approx(4 * (TOKEN_MS + 3), rel=0.05)
    assert times.step_ms("model") == pytest.approx(STEP_MS)


COMPILED_MS = [20.0, 21.0, 22.0, 23.0, 24.0, 27.0, 30.0, 32.5, 35.0]


def predicted(curve: Sequence[float]) -> RoundTimes:
    times = RoundTimes()
    times.apply_load(builders.load(verify_ms=curve, queue_ms=0.0))
    return times


def test_times_follow_the_predicted_curve_before_anything_is_measured() -> None:
    times = predicted(COMPILED_MS)
    assert [times.added_ms(k) for k in (0, 1, 4, 8)] == pytest.approx([0, 1, 4, 15])
    assert times.added_ms(16) == pytest.approx(30), "beyond its end as steep as on average"


def test_measured_times_correct_the_predicted_curve() -> None:
    times = predicted(COMPILED_MS)
    for k in [0, 4, 8, 2] * 25:
        ms = 40 + 3 * (COMPILED_MS[k] - 20)
        times.learn_round(k, ms + 5, ms, 0.0, k + 1)
    assert times.base_ms == pytest.approx(45, rel=0.05)
    assert times.added_ms(8) == pytest.approx(45, rel=0.1)


def test_a_new_prediction_keeps_what_was_learned() -> None:
    times = predicted(COMPILED_MS)
    for k in [0, 4, 8, 2] * 25:
        times.learn_round(k, 2 * COMPILED_MS[k] + 5, 2 * COMPILED_MS[k], 0.0, k + 1)
    times.apply_load(builders.load(verify_ms=[2 * ms for ms in COMPILED_MS], queue_ms=0.0))
    assert times.base_ms == pytest.approx(85, rel=0.05)


@pytest.mark.parametrize("curve", [[], [20.0], [0.0, 1.0], [20.0, 1e12]])
def test_a_curve_that_predicts_nothing_is_ignored(curve: list[float]) -> None:
    assert predicted(curve).added_ms(8) == RoundTimes().added_ms(8)


@given(st.lists(st.floats(0.1, 1e6), min_size=2, max_size=20))
def test_more_tokens_never_take_less_time(curve: list[float]) -> None:
    times = predicted(curve)
    added = [times.added_ms(k) for k in range(30)]
    assert added[0] == 0
    assert added == sorted(added)


def test_the_first_draft_steps_count_as_the_shortest_of_them() -> None:
    times = RoundTimes()
    for ms in (90.0, 4.0, 30.0):
        times.learn_draft("model", 1, ms)
    assert times.step_ms("model") == pytest.approx(4.0)


def test_a_probe_beside_the_verifier_only_shortens_the_step() -> None:
    times = RoundTimes()
    for _ in range(10):
        times.learn_draft("model", 1, 4.0)
    times.learn_probe("model", 1, 40.0)
    assert times.step_ms("model") == pytest.approx(4.0)
    times.learn_probe("model", 1, 2.0)
    assert times.step_ms("model") < 4.0


def test_times_ignore_an_outlier_and_follow_a_lasting_change() -> None:
    times = measured()
    times.learn_round(4, 60_000.0, 59_000.0, 900.0, 5)
    times.learn_draft("model", 4, 30_000.0)
    assert times.base_ms < 1.3 * BASE_MS
    assert times.step_ms("model") < 1.3 * STEP_MS
    for k in [0, 1, 2, 4, 8] * 8:
        times.learn_round(k, 3 * BASE_MS + 9 * k, 3 * BASE_MS - 6 + 9 * k, 1.0, k + 1)
        times.learn_draft("model", 4, 60.0)
    assert times.base_ms == pytest.approx(3 * BASE_MS, rel=0.3)
    assert times.step_ms("model") == pytest.approx(15, rel=0.1)


def test_rounds_that_compute_a_prompt_are_not_learned() -> None:
    times = measured()
    before = times.base_ms
    times.learn_round(0, 900.0, 800.0, 50.0, 500)
    assert times.base_ms == before


def test_with_drafts_of_one_length_the_slope_leans_on_its_prior() -> None:
    times = RoundTimes()
    for _ in range(100):
        times.learn_round(4, 30.0, 25.0, 0.0, 5)
    assert 0 < times.added_ms(1) < 1.5
    assert times.base_ms + times.added_ms(4) == pytest.approx(30.0, rel=0.01)


@given(st.lists(st.tuples(st.integers(0, 16), st.floats(), st.floats(), st.floats(), st.integers(0, 30))))
def test_no_measurement_breaks_the_times(rounds: list[tuple[int, float, float, float, int]]) -> None:
    times = RoundTimes()
    for length, round_ms, verify_ms, queue_ms, new in rounds:
        times.learn_round(length, round_ms, verify_ms, queue_ms, new)
        times.learn_draft("model", length, round_ms)
    assert math.isfinite(times.base_ms)
    assert times.base_ms > 0
    assert times.added_ms(4) >= 0


# Files of weights and recorded rounds


def test_saved_weights_load_unchanged(tmp_path: Path) -> None:
    weights = controller().weights
    save_weights(tmp_path / "w.json", weights)
    assert load_weights(tmp_path / "w.json") == weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"version": 2}', "version"),
        (
            '{"acceptance": {"m": {"inputs": {"features": ["x"], "mean": [], "scale": []}, "weights": [], "bias": 0}}}',
            "unknown features x",
        ),
        (
            '{"acceptance": {"m": {"inputs": {"features": [], "mean": [], "scale": []}, "weights": [1], "bias": 0}}}',
            "one weight per feature",
        ),
    ],
)
def test_a_bad_weights_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=message) as refused:
        load_weights(path)
    assert str(path) in str(refused.value)


def test_a_missing_weights_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="wisp controller train"):
        load_weights(tmp_path / "none.json")


def test_the_predictor_takes_microseconds() -> None:
    predictor = Predictor(network=network(NAMES[:5]), threshold=0.5)
    known = features(token(), 1, RoundContext(0.7, None, 0.5))
    once = min(timeit.repeat(lambda: predictor.rejection(known), number=100, repeat=20)) / 100
    assert once < 100e-6


def test_a_recorded_round_reads_back_unchanged(tmp_path: Path) -> None:
    session = controller("fixed", 3).session("model", "lookup")
    round_ = session.begin(8, 0.7, 1.25)
    draft(round_, [token(0.9, agreed=True), DraftToken("lookup", support=3), token(0.2)])
    record = round_.record("s", "chat", 3, 1)
    with (tmp_path / "r.jsonl").open("w") as file:
        write_record(file, record)
        write_record(file, session.begin(0, 0.7).record("s", "chat", 0, 0))
    first, second = read_records(tmp_path / "r.jsonl")
    assert first == record
    assert (first.temperature, first.target_entropy, first.guesses[1].support) == (0.7, 1.25, 3)
    assert second.guesses == []


def test_an_invalid_record_is_reported_with_file_and_line(tmp_path: Path) -> None:
    good = RoundRecord(session="s", guesses=[], verified=0, accepted=0).model_dump_json()
    path = tmp_path / "r.jsonl"
    path.write_text(f'{good}\n\n{{"session": "s", "guesses": [], "verified": 1, "accepted": 2}}\n')
    with pytest.raises(SettingsError, match=r"r\.jsonl, line 3 .*accepted 2 <= verified 1"):
        list(read_records(path))
    with pytest.raises(SettingsError, match="cannot read"):
        list(read_records(tmp_path / "none"))


def test_a_source_measured_as_slow_is_probed_beside_one_that_pays() -> None:
    times = RoundTimes()
    for _ in range(4):
        times.learn_draft("hidden", 1, 90.0)
    session = Controller("marginal", 4, times=times).session("hidden", "lookup")
    probed = []
    for number in range(400):
        round_ = session.begin(4, 0.0)
        assert round_.wants("lookup")
        if round_.wants("hidden"):
            probed.append(number)
            round_.add(DraftToken("hidden", confidence=0.6))
            times.learn_probe("hidden", 1, 3.0)
            session.settle(round_, round_.kept, round_.kept)
    assert probed[0] * PROBE_SHARE * times.base_ms == pytest.approx(90, rel=0.05)  # against the rule
    assert set(range(380, 400)) <= set(probed)  # and later by the rule itself


def test_drafts_that_compute_a_prompt_are_not_learned() -> None:
    times = RoundTimes()
    times.learn_draft("hidden", 2, 300.0, computed=200)
    assert times.step_ms("hidden") == 0
    times.learn_draft("hidden", 2, 8.0, computed=3)
    assert times.step_ms("hidden") == 4


def test_plain_decoding_ends_one_round_before_a_probe_to_request_states() -> None:
    controller = Controller("marginal", 4)
    controller.times.price_ms = 1e6
    session = controller.session("hidden")
    seen = []
    for _ in range(FIRST_WAIT + 1):
        round_ = session.begin(4, 0.0)
        seen.append((round_.probing, session.decodes_plainly))
        session.settle(round_, 0, 0)
    assert seen == [(False, True)] * (FIRST_WAIT - 1) + [(False, False), (True, False)]


@pytest.mark.parametrize(("verified", "accepted", "wasted_s"), [(4, 1, 0.02), (4, 4, 0.0), (1, 1, 0.0), (2, 0, 0.03)])
def test_time_past_the_first_rejection_counts_as_wasted(verified: int, accepted: int, wasted_s: float) -> None:
    round_ = controller("fixed").session("model").begin(4, 0.0)
    draft(round_, [token() for _ in range(4)])
    before = REGISTRY.get_sample_value("wisp_draft_wasted_seconds_total") or 0.0
    metrics.count(round_, verified, accepted, Draft([1, 2, 3, 4]), draft_ms=40.0)
    assert REGISTRY.get_sample_value("wisp_draft_wasted_seconds_total") == pytest.approx(before + wasted_s)
