"""Fleets in virtual time: the target's times, the draft tokens, and both ways of serving."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from math import floor
from pathlib import Path
from statistics import fmean

import psutil
import pytest
from patience import HANG_S

from services.drafter.control.controller import Controller
from services.drafter.core.synthetic import DraftProcess
from services.drafter.sources.twin import token_of
from services.tools.bench.load.arms import Arm
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.core.record import Ending, RequestRecord
from services.tools.bench.load.core.results import LoadResults, MeasuredPoint
from services.tools.simulator.arms import (
    SCENARIOS,
    SimulatedPoint,
    hardware_of,
    read,
    shipped,
    simulate,
    target_of,
    world_of,
)
from services.tools.simulator.core.bounds import ScenarioBounds, scenario_bounds
from services.tools.simulator.core.scenario import Scenario, parse_scenario
from services.tools.simulator.core.suite import SuiteWorld, experienced_controller
from services.tools.simulator.output import advice
from services.tools.simulator.sweep import SweepCell, sweep_table, swept_fields
from services.tools.simulator.traced import traced_drafts
from shared import cost
from shared.errors import ModelError, SettingsError
from shared.twin.files import load_target, shipped_targets, target_text, trace_path
from shared.twin.profile import parse_target
from shared.twin.spec import Acceptance
from shared.twin.trace import DEPTH, TraceText, load_trace, save_trace

ARMS = ("centralized", "colocated", "sled", "wisp", "wisp+", "wisp+/runs")
TRACE = "smollm2-135m"
WINDOW = Window(warm_up_s=1.0, measure_s=6.0, drain_s=60.0)


def scenario(**changes: object) -> Scenario:
    text = read("paper-a100", SCENARIOS, ".yaml", "scenario")
    return parse_scenario(text, "paper-a100", {"target": "h100-qwen3-8b", **changes})


def records(arm: str, spec: Scenario, sessions: int, seed: int = 1) -> Sequence[RequestRecord]:
    return simulate(SimulatedPoint(Arm(arm), sessions, 0, seed), spec, WINDOW)[1]


@pytest.mark.parametrize("name", shipped_targets())
def test_a_shipped_target_has_room_for_sessions(name: str) -> None:
    assert load_target(name).kv_tokens > 10_000


@pytest.mark.parametrize("name", shipped(SCENARIOS, ".yaml"))
def test_a_shipped_scenario_is_valid(name: str) -> None:
    spec = parse_scenario(read(name, SCENARIOS, ".yaml", "scenario"), name)
    assert hardware_of(spec).devices.keys() == {device.profile for device in spec.devices}


def test_a_step_takes_the_longer_of_reading_and_computing() -> None:
    target = target_of(scenario(target="a100-qwen3-32b"))
    one = target.time_ms(cost.shape_of([(1, 1, 1)]))
    assert one == pytest.approx(2 + 65.6e9 / (2039e9 * 0.8) * 1000, rel=0.001)
    assert target.time_ms(cost.shape_of([(64, 64, 1)])) < 1.01 * one
    products = 2 * 32.8e9 * 1024 / (312e12 * 0.6) * 1000
    assert target.time_ms(cost.shape_of([(1024, 1024, 1)])) == pytest.approx(2 + products, rel=0.05)
    assert target.time_ms(cost.EMPTY) == 0.0


def test_weights_that_leave_no_room_are_an_error() -> None:
    text = target_text("a100-qwen3-32b").replace("memory_gb = 80", "memory_gb = 40")
    with pytest.raises(SettingsError, match="leave no room for KV"):
        _ = parse_target(text, "small").kv_tokens


@pytest.mark.parametrize("mean", [0.5, 0.75, 0.9])
def test_draft_tokens_are_right_with_the_scenarios_acceptance(mean: float) -> None:
    acceptance = Acceptance(mean=mean)
    tokens = [DraftProcess(acceptance, seed).token(position, 0) for seed in range(60) for position in range(60)]
    assert fmean(token.right for token in tokens) == pytest.approx(mean, abs=0.03)
    right, wrong = ([one.token.confidence for one in tokens if one.right is kind] for kind in (True, False))
    assert fmean(right) > fmean(wrong) + 0.1, "the estimates say nothing"


def test_a_request_has_the_same_draft_tokens_whenever_they_are_drafted() -> None:
    first, second = DraftProcess(Acceptance(), 5), DraftProcess(Acceptance(), 5)
    later = [second.token(position, 1) for position in (9, 3)]
    assert [first.token(3, 1), first.token(9, 1)] == later[::-1]


def test_the_drafts_of_a_trace_are_those_of_a_twin() -> None:
    """A twin answers with `TraceText`, and drafts the recorded tokens at its place."""
    trace = load_trace(trace_path(TRACE))
    text, hidden = TraceText(trace), trace.chains["hidden"]
    drafts = traced_drafts(TRACE).of_request(99)
    rights = []
    for position in range(0, 600, 7):
        row = text.place(99, position)
        for ahead in range(DEPTH):
            found = drafts.token(position, ahead)
            inside = row + ahead < trace.ends[row]
            assert found.right == bool(inside and hidden.tokens[row, ahead] == text.token(99, position + ahead))
            assert found.token == token_of("hidden", hidden, row, ahead)
        rights.append(drafts.token(position, 0).right)
        assert not drafts.token(position, DEPTH).right
    assert fmean(rights) == pytest.approx(trace.first_acceptance("hidden"), abs=0.15)


@pytest.mark.parametrize("arm", ["colocated", "wisp+/runs"])
def test_a_simulation_drafts_from_a_trace(arm: str) -> None:
    spec = scenario(target="a100-qwen3-32b", trace=TRACE)
    found = records(arm, spec, 4)
    assert all(record.tokens == spec.request(1, record.session, record.number).output_tokens for record in found)
    synthetic = scenario(target="a100-qwen3-32b", **{"acceptance.mean": 0.95})
    assert fmean(one.tpot_ms or 0 for one in found) > fmean(one.tpot_ms or 0 for one in records(arm, synthetic, 4))


@pytest.mark.parametrize("content", [None, b"no trace"])
def test_a_broken_trace_is_an_error_that_names_it(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "broken.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.npz holds no trace"):
        hardware_of(scenario(trace=str(path)))


def test_a_trace_whose_arrays_do_not_fit_is_an_error(tmp_path: Path) -> None:
    trace = load_trace(trace_path(TRACE))
    for wrong in ({"starts": trace.starts[:1]}, {"starts": trace.starts[::-1]}, {"seed": trace.seed[:-1]}):
        save_trace(replace(trace, **wrong), tmp_path / "wrong.npz")
        with pytest.raises(ModelError, match=r"starts must rise|has the shape"):
            load_trace(tmp_path / "wrong.npz")


@pytest.mark.parametrize("arm", ARMS)
def test_every_request_gets_its_tokens(arm: str) -> None:
    spec = scenario()
    found = records(arm, spec, 6)
    complete = [record for record in found if record.ending is Ending.COMPLETE]
    assert len(complete) >= 6
    for record in complete:
        request = spec.request(1, record.session, record.number)
        assert record.tokens == request.output_tokens
        assert record.prompt_tokens == request.prompt_tokens
        times_ms = [ms for ms, _ in record.arrivals]
        assert times_ms == sorted(times_ms)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("centralized", (10, 0, 0, 4770.6)),
        ("wisp", (11, 361, 786, 3553.1)),
        ("wisp+", (10, 211, 504, 3546.8)),
        ("wisp+/runs", (11, 402, 753, 3424.3)),
    ],
)
def test_a_change_for_speed_alone_keeps_the_results(arm: str, expected: tuple[float, ...]) -> None:
    """Requests, rounds, accepted tokens and mean time of a request. The last bits of the fitted cost model depend on
    the CPU, and with them a few decisions."""
    found = records(arm, scenario(target="a100-qwen3-32b"), 6)
    rounds = [one for record in found for one in record.rounds]
    figures = (
        len(found),
        len(rounds),
        sum(one["accepted"] for one in rounds),
        sum(record.arrivals[-1][0] for record in found) / len(found),
    )
    assert figures == pytest.approx(expected, rel=0.02)


def test_a_device_begins_with_the_same_experience_at_each_point() -> None:
    spec = scenario()
    drafts = world_of(Arm("wisp+"), spec, hardware_of(spec), 1).drafts

    def controller(device: int) -> Controller:
        return experienced_controller("marginal", spec.draft_length, drafts, spec, f"1/{device}")

    first, second = controller(3), controller(3)
    before = second.calibration.logit("hidden", 1.0)
    assert first.calibration.logit("hidden", 1.0) == before
    for _ in range(20):
        first.calibration.learn("hidden", 1.0, accepted=False)
    assert first.calibration.logit("hidden", 1.0) != before
    assert second.calibration.logit("hidden", 1.0) == before
    assert controller(3).calibration.logit("hidden", 1.0) == before
    assert controller(4).calibration.logit("hidden", 1.0) != before


@pytest.mark.parametrize("arm", ["centralized", "wisp+"])
def test_a_seed_gives_the_same_run_again_and_another_seed_another(arm: str) -> None:
    spec = scenario()
    assert records(arm, spec, 4) == records(arm, spec, 4)
    assert records(arm, spec, 4) != records(arm, spec, 4, seed=2)


def test_a_lone_session_of_centralized_serving_gets_a_token_per_step() -> None:
    spec = scenario()
    target = target_of(spec)
    record = max(records("centralized", spec, 1), key=lambda one: one.tokens)
    length = record.prompt_tokens + record.tokens // 2
    assert record.tpot_ms == pytest.approx(target.time_ms(cost.shape_of([(1, length, 1)])), rel=0.02)


def test_drafts_make_a_lone_session_faster_where_they_are_good() -> None:
    bad, good = (
        records("wisp+", scenario(target="a100-qwen3-32b", **{"acceptance.mean": mean}), 1) for mean in (0.05, 0.95)
    )
    assert fmean(one.tpot_ms or 0 for one in good) < 0.6 * fmean(one.tpot_ms or 0 for one in bad)


def test_a_full_memory_holds_no_more_than_its_tokens(tmp_path: Path) -> None:
    small = tmp_path / "small.toml"
    text = target_text("a100-qwen3-32b")
    small.write_text(text.replace("memory_gb = 80", "memory_gb = 72.5"))
    spec = scenario(target=str(small))
    world = world_of(Arm("centralized"), spec, hardware_of(spec), 1)
    world.run(60, Window(warm_up_s=1.0, measure_s=8.0, drain_s=0.0), 0)
    longest = max(batch.shape.context for batch in world.batches)
    assert 0.8 * world.target.kv_tokens < longest <= world.target.kv_tokens


FIVE = [{"distribution": "constant", "value": 5}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verifiers": 0}, "verifiers"),
        ({"acceptance.mean": 1.5}, r"acceptance.mean: .*less than 1 \(given: 1.5\)"),
        ({"acceptance.means": 0.5}, "acceptance.means: there is no such field"),
        ({"title.x": 1}, "no field title.x"),
        ({"target": "nosuch"}, "nosuch.*a100-qwen3-32b"),
        ({"devices": [{"profile": "phone", "weight": 1e300}]}, "weight"),
        ({"think_s": [{"distribution": "lognormal", "median": 1, "sigma": 1e300}]}, "think_s.*sigma"),
        (
            {"classes": [{"name": "summer chat", "prompt_tokens": FIVE, "output_tokens": FIVE}]},
            r"classes\.0\.name: .*\(given: 'summer chat'\)",
        ),
    ],
)
def test_a_wrong_scenario_is_an_error_that_names_the_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        target_of(scenario(**changes))


def test_text_that_is_no_scenario_is_an_error() -> None:
    for text in ("- a list", "a: [", "title: x", "title: 2020-99-99", "[" * 5000):
        with pytest.raises(SettingsError, match="scenario mine"):
            parse_scenario(text, "mine")


@pytest.mark.parametrize("tokens", [1e8, 1e308])
def test_a_length_beyond_what_a_simulation_takes_is_an_error(tokens: float) -> None:
    length = [{"distribution": "constant", "value": tokens}]
    wordy = {"name": "wordy", "prompt_tokens": length, "output_tokens": length}
    with pytest.raises(SettingsError, match="class wordy: prompt_tokens of 1e"):
        scenario(classes=[wordy]).request(1, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("memory_gb = 1e300", "check memory_gb"),
        ("memory_gb = 1e308\nweights = 1e308", "no room for KV"),
        ("kv_bytes = 1e-300", "kv_bytes"),
        ("bandwidth_gb = 1e-300", "bandwidth_gb"),
        ("step_ms = inf", "step_ms"),
        ("reserved_gb = inf", "reserved_gb"),
        ("layers = 2020-99-99", "not TOML"),
    ],
)
def test_absurd_numbers_of_a_target_are_an_error(change: str, message: str) -> None:
    replaced = {line.split(" =")[0] for line in change.splitlines()}
    lines = target_text("a100-qwen3-8b").splitlines()
    text = "\n".join([*(line for line in lines if line.split(" =")[0] not in replaced), change])
    with pytest.raises(SettingsError, match=message):
        parse_target(text, "mine").cost_model("verifier")


def constant(value: float) -> list[dict[str, object]]:
    return [{"distribution": "constant", "value": value}]


def one_class(prompt: int, output: int, ttft_ms: float = 2000.0, tpot_ms: float = 50.0) -> list[dict[str, object]]:
    lengths = {"prompt_tokens": constant(prompt), "output_tokens": constant(output)}
    return [{"name": "only", "ttft_ms": ttft_ms, "tpot_ms": tpot_ms, **lengths}]


def test_the_title_names_what_was_changed() -> None:
    text = read("paper-a100", SCENARIOS, ".yaml", "scenario")
    plain = parse_scenario(text, "paper-a100").title
    changes = {"target": "h100-qwen3-8b", "acceptance.mean": 0.6}
    changed = parse_scenario(text, "paper-a100", changes).title
    assert changed == f"{plain}; changed: target=h100-qwen3-8b, acceptance.mean=0.6"
    assert parse_scenario(text, "paper-a100", {**changes, "title": "mine"}).title == "mine"


def test_bounds_are_the_promised_time_over_the_work_of_a_request() -> None:
    spec = scenario(target="a100-qwen3-32b", classes=one_class(400, 101), think_s=constant(1.0))
    target = target_of(spec)
    found = scenario_bounds(spec, target, 1)
    assert found is not None
    cycle_ms = 2000.0 + 100 * 50.0 + 1000.0
    token_ms = 2 * 32.8e9 / (312e12 * 0.6) * 1000
    assert found.cycle_s == pytest.approx(cycle_ms / 1000)
    assert found.arithmetic == pytest.approx(cycle_ms / (501 * token_ms), rel=0.02)
    assert found.memory == pytest.approx(target.kv_tokens / 450.5 * cycle_ms / 5000.0, rel=0.01)
    assert (found.hidden_tokens, found.filled_tokens) == (114, 112), "the pages name both"
    assert f"hold more than {floor(min(found.memory, found.arithmetic))} devices" in found.sentences()[0], "whole ones"
    # A step may take 50 ms: that many tokens' arithmetic, of which four in five are prompts.
    assert found.chunked <= (50.0 - target.step_ms) / token_ms / 5 * cycle_ms / 5000.0


def test_bounds_count_each_verifier_at_its_own_speed() -> None:
    def bounds(*speeds: float) -> ScenarioBounds:
        fleet = {"verifiers": len(speeds), "verifier_speeds": list(speeds)}
        spec = scenario(target="a100-qwen3-32b", classes=one_class(400, 101), think_s=constant(1.0), **fleet)
        found = scenario_bounds(spec, target_of(spec), 1)
        assert found is not None
        return found

    one, slow, both = bounds(1.0), bounds(0.5), bounds(0.5, 1.0)
    assert slow.chunked == 0.0, "a step of 84 ms keeps no promise of 50"
    assert both.chunked == one.chunked > 0
    assert (slow.alone_ms, both.alone_ms) == (pytest.approx(2 * one.alone_ms), one.alone_ms)
    assert slow.tokens_per_round == pytest.approx(2 * one.tokens_per_round)
    assert both.arithmetic == pytest.approx(1.5 * one.arithmetic)
    assert both.hidden_tokens == one.hidden_tokens


def test_a_scenario_without_promises_has_no_bounds() -> None:
    spec = scenario(classes=[{**one_class(8, 8)[0], "ttft_ms": None, "tpot_ms": None}])
    assert scenario_bounds(spec, target_of(spec), 1) is None


def test_a_changing_number_of_verifiers_has_no_bounds() -> None:
    fixed, scaled = (
        scenario(target="a100-qwen3-32b", classes=one_class(400, 101), **more)
        for more in ({}, {"autoscaling": {"most": 4}})
    )
    assert scenario_bounds(fixed, target_of(fixed), 1) is not None
    assert scenario_bounds(scaled, target_of(scaled), 1) is None


def test_factors_change_slos_prompts_links_drafting_and_efficiency() -> None:
    plain = scenario()
    changed = scenario(
        **{f"factors.{name}": by for name, by in (("slo", 0.5), ("prompts", 2.0), ("delay", 3.0), ("drafting", 4.0))},
        **{"factors.efficiency": 2.0},
    )
    before, after = plain.request(1, 2, 3), changed.request(1, 2, 3)
    assert after.of_class.tpot_ms == 0.5 * (before.of_class.tpot_ms or 0)
    assert after.prompt_tokens == pytest.approx(2 * before.prompt_tokens, abs=1)
    assert (after.output_tokens, after.think_s) == (before.output_tokens, before.think_s)
    phones = [hardware_of(spec).devices["phone"] for spec in (plain, changed)]
    assert phones[1].draft.step_ms == phones[0].draft.step_ms / 4
    links = [spec.link_of(phones[0]).uplink for spec in (plain, changed)]
    assert (links[1].delay_ms, links[1].jitter_ms) == (3 * links[0].delay_ms, 3 * links[0].jitter_ms)
    targets = [target_of(spec) for spec in (plain, changed)]
    assert targets[1].bandwidth_efficiency == 1.0
    assert targets[1].arithmetic_efficiency == min(1.0, 2 * targets[0].arithmetic_efficiency)


@pytest.mark.parametrize("arm", ["centralized", "wisp+", "wisp+/runs"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_devices_that_vanish_leave_no_work_behind(arm: str, share: float) -> None:
    """Their open requests do not count, and their sessions take nothing from the others once they are given up."""
    spec = scenario(target="a100-qwen3-32b", departure={"share": share, "at_s": 3.0, "notice_s": 1.0})
    world = world_of(Arm(arm), spec, hardware_of(spec), 1)
    world.run(8, WINDOW, 0)
    assert share < 1 or all(record.ending is Ending.COMPLETE for record in world.records)
    later = {record.session for record in world.records if record.start_s + (record.total_ms or 0.0) / 1000 > 3.0}
    assert len(later) == 8 * (1 - share)
    if isinstance(world, SuiteWorld):
        assert world._sessions == {}
        fleet = world._dispatcher.fleet
        assert fleet.pending_count == 0
        assert not any(verifier.in_flight for verifier in fleet.verifiers.values())


def test_a_departure_changes_nothing_before_it() -> None:
    plain, departing = (
        {
            (record.session, record.number): record.arrivals
            for record in records("wisp+", scenario(target="a100-qwen3-32b", **more), 6)
            if record.start_s * 1000 + (record.total_ms or 0.0) < 5000
        }
        for more in ({}, {"departure": {"share": 0.3, "at_s": 5.0}})
    )
    assert plain == departing != {}


def test_a_slower_verifier_takes_longer_and_gets_less() -> None:
    one = scenario(target="a100-qwen3-32b")
    slow = scenario(target="a100-qwen3-32b", verifier_speeds=[0.5])
    for arm in ("centralized", "wisp+/runs"):
        fast_ms, slow_ms = (fmean(record.tpot_ms or 0 for record in records(arm, spec, 2)) for spec in (one, slow))
        assert 1.4 * fast_ms < slow_ms < 2.2 * fast_ms
    world = world_of(
        Arm("wisp+"), mixed := scenario(target="a100-qwen3-32b", verifiers=2, verifier_speeds=[1.0, 0.25]),
        hardware_of(mixed), 1,
    )  # fmt: skip
    world.run(6, WINDOW, 0)
    fast = sum(1 for batch in world.batches if batch.measured_ms < 100)
    assert fast > 2 * (len(world.batches) - fast), "the slow one has a quarter of the speed"


@pytest.mark.parametrize(("arm", "factor"), [("centralized", 15), ("wisp+", 15), ("wisp+", 4)])
def test_only_a_crowd_that_one_verifier_cannot_hold_starts_more(arm: str, factor: int) -> None:
    """By the rule of Kubernetes; one A100 holds 30 devices, and centralized serving lacks the metrics."""
    spec = scenario(
        target="a100-qwen3-32b",
        crowd={"factor": factor, "at_s": 6, "over_s": 2},
        autoscaling={"most": 3, "start_s": 1},
    )
    world = world_of(Arm(arm), spec, hardware_of(spec), 1)
    world.run(3, Window(warm_up_s=5.0, measure_s=17.0, drain_s=0.0), 0)
    assert {record.session for record in world.records} == set(range(3 * factor))
    assert min(record.start_s for record in world.records if record.session >= 3) >= 6
    assert bool(world.scalings) == ((arm, factor) == ("wisp+", 15))
    if isinstance(world, SuiteWorld):
        assert len(world._verifiers) == max([1, *(count for _, count, _ in world.scalings)])


def test_fewer_verifiers_than_at_the_start_are_an_error() -> None:
    with pytest.raises(SettingsError, match=r"autoscaling.most is less than verifiers"):
        scenario(verifiers=4, autoscaling={"most": 2})


def test_an_oracle_knows_which_of_its_tokens_are_right() -> None:
    blind, oracle = (DraftProcess(Acceptance(known=known), 5) for known in (False, True))
    for position in range(50):
        token = oracle.token(position, 0)
        assert token.right == blind.token(position, 0).right, "it has the same tokens"
        assert token.token.confidence == float(token.right)


def test_a_sweeps_gain_is_the_capacity_against_the_best_central_arm() -> None:
    def point(arm: str, sessions: int, attained: int) -> MeasuredPoint:
        measured = simulate(SimulatedPoint(Arm("centralized"), 1, 0, 1), scenario(), WINDOW)[0]
        counts = measured.measures.model_copy(update={"requests": 100, "attained": attained})
        return measured.model_copy(update={"arm": arm, "sessions": sessions, "measures": counts})

    points = [point("centralized", 4, 99), point("colocated", 2, 99), point("wisp+", 6, 97), point("wisp+", 8, 50)]
    cell = SweepCell({"acceptance.mean": 0.5}, LoadResults(window=WINDOW, aims=[0.95], points=points))
    assert (cell.capacity("wisp+"), cell.gain) == (6, 1.5)
    columns, rows = sweep_table([cell], ["centralized", "wisp+"])
    assert dict(zip(columns, rows[0], strict=True))["gain"] == 1.5
    assert advice(cell.results, 2).startswith("choose wisp+: 3 sessions per verifier (centralized 4, colocated 2)")
    alone = LoadResults(window=WINDOW, aims=[0.95], points=points[2:])
    assert advice(alone, 2).startswith("choose wisp+: 3 sessions per verifier, and"), "one arm is compared with none"


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["acceptance.mean"], "field=value"), (["x=a,b"], "takes numbers"), (["a=1", "b=1", "c=1"], "or two for a map")],
)
def test_a_wrong_sweep_is_an_error(texts: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        swept_fields(texts)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [1, 2])
def test_a_sweep_writes_its_table_and_picture(fields: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from services.tools.simulator.__main__ import app

    monkeypatch.setattr("services.tools.bench.support.report.state_folder", lambda: tmp_path)
    options = ["--arms", "centralized,wisp+", "--set", "target=h100-qwen3-8b", "--most", "1", "--processes", "1"]
    times = ["--warm-up", "1", "--measure", "20", "--drain", "10", "--name", "swept"]
    swept = [("acceptance.mean", "0.6,0.9"), ("factors.slo", "1,2")][:fields]
    asked = [word for path, values in swept for word in ("--sweep", f"{path}={values}")]
    outcome = CliRunner().invoke(app, [*options, *times, *asked])
    assert outcome.exit_code == 0, outcome.output
    (path,) = tmp_path.rglob("swept.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["acceptance.mean"] for row in rows] == ([0.6, 0.9] if fields == 1 else [0.6, 0.6, 0.9, 0.9])
    assert all(row["centralized holds"] == 1 for row in rows)
    assert path.with_suffix(".svg").stat().st_size > 1000


@pytest.mark.slow
def test_an_interrupt_ends_the_command_in_the_middle_of_a_point() -> None:
    command = [sys.executable, "-m", "services.tools.simulator", "--arms", "wisp+", "--sessions", "64,65"]
    times = ["--measure", "100000", "--processes", "2"]
    with subprocess.Popen([*command, *times], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        children: list[psutil.Process] = []
        patience = time.monotonic() + HANG_S
        while sum("spawn_main" in " ".join(child.cmdline()) for child in children) < 2:
            assert time.monotonic() < patience, "no workers"
            time.sleep(0.2)
            children = [one for one in psutil.Process(running.pid).children(recursive=True) if one.is_running()]
        # Workers import what the command has imported before it starts them. With more CPU time, they simulate.
        imports_s = sum(psutil.Process(running.pid).cpu_times()[:2])
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        while min(sum(worker.cpu_times()[:2]) for worker in workers) < imports_s:
            assert time.monotonic() < patience, "the workers do not compute"
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=HANG_S)  # by itself it would take hours
    assert not psutil.wait_procs(children, timeout=HANG_S)[1]


@pytest.mark.slow
def test_the_command_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from services.tools.simulator.__main__ import app

    monkeypatch.setattr("services.tools.bench.support.report.state_folder", lambda: tmp_path)
    options = ["--arms", "centralized,wisp+", "--sessions", "2", "--set", "target=h100-qwen3-8b"]
    times = ["--warm-up", "1", "--measure", "3", "--drain", "20", "--processes", "1"]
    outcome = CliRunner().invoke(app, [*options, *times])
    assert outcome.exit_code == 0, outcome.output
    assert "promises kept" in outcome.output
    (path,) = tmp_path.rglob("simulation.json")
    found = json.loads(path.read_text())
    assert [point["arm"] for point in found["results"]["points"]] == ["centralized", "wisp+"]
    assert path.with_suffix(".svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["nosuch.yaml"],
            "cannot be read (No such file or directory); give the path of a .yaml file, or one of degraded,",
        ),
        (["--set", "verifiers"], "field=value"),
        (["--arms", "nosuch"], "is no arm"),
        (["--set", "title=2020-99-99"], "is not YAML"),
        (["--name", "../elsewhere"], "--name takes a file's name without folders"),
        (["--sweep", "acceptance.mean=2"], "acceptance.mean"),
    ],
)
def test_the_command_names_what_is_wrong(options: list[str], message: str) -> None:
    from typer.testing import CliRunner

    from services.tools.simulator.__main__ import app

    outcome = CliRunner().invoke(app, options)
    assert outcome.exit_code == 1
    assert message in outcome.output.replace("\n", " ")
