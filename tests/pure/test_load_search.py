"""The load benchmark: search for capacities, arms, tables, notes and the picture."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tools.bench.load.arms import Arm, arms_of
from services.tools.bench.load.core.measures import Window, lag_of, measure
from services.tools.bench.load.core.results import (
    LoadResults,
    MeasuredPoint,
    capacity_table,
    draft_table,
    goodput_table,
    notes,
    paired_table,
    promise_table,
    speed_table,
)
from services.tools.bench.load.core.search import PooledPoint, capacity, interval, most_points, next_sessions, pooled
from services.tools.bench.load.plot import plot, spread
from services.tools.bench.load.workload import EmulatedHardware
from shared.errors import SettingsError

WINDOW = Window(warm_up_s=1, measure_s=2, drain_s=3)


def searched(holds: int, first: int, most: int, tolerance: float) -> list[PooledPoint]:
    """A search where up to `holds` sessions attain."""
    tried: list[PooledPoint] = []
    while (n := next_sessions(tried, 0.95, first=first, most=most, tolerance=tolerance)) is not None:
        assert n not in [one.sessions for one in tried]
        tried.append(PooledPoint(sessions=n, requests=100, attained=99 if n <= holds else 50))
        assert len(tried) <= 30
    return tried


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 100), st.floats(0, 0.3))
def test_a_search_finds_the_capacity_within_its_tolerance(holds: int, first: int, most: int, tolerance: float) -> None:
    tried = searched(holds, first, most, tolerance)
    found = capacity(tried, 0.95)
    assert max(one.sessions for one in tried) <= most
    assert found.sessions <= holds
    if found.failing is None:
        assert found.sessions == most
    else:
        assert holds < found.failing
        assert found.failing - found.sessions <= max(1, tolerance * found.sessions)


def test_a_search_doubles_and_then_halves_the_gap() -> None:
    assert [one.sessions for one in searched(11, 4, 64, 0.0)] == [4, 8, 16, 12, 10, 11]
    assert [one.sessions for one in searched(0, 4, 64, 0.0)] == [4, 2, 1]
    assert len(searched(60, 4, 64, 0.1)) <= most_points(4, 64, 0.1) + 1


def test_the_fewest_that_fail_bound_the_capacity() -> None:
    noisy = pooled([(4, 100, 100), (8, 100, 90), (16, 100, 99)])
    found = capacity(noisy, 0.95)
    assert (found.sessions, found.failing, found.requests, found.attainment) == (4, 8, 100, 1.0)
    assert capacity(pooled([(1, 0, 0)]), 0.95).sessions == 0, "no requests, no capacity"


def test_repeats_count_together() -> None:
    assert pooled([(8, 10, 9), (4, 5, 5), (8, 30, 29)]) == [
        PooledPoint(sessions=4, requests=5, attained=5),
        PooledPoint(sessions=8, requests=40, attained=38),
    ]


def test_the_interval_is_wilsons() -> None:
    assert interval(95, 100) == (pytest.approx(0.8883, abs=1e-3), pytest.approx(0.9785, abs=1e-3))
    assert interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.floats(0, 1))
def test_the_interval_holds_the_share(count: int, share: float) -> None:
    hits = round(share * count)
    low, high = interval(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    more = interval(4 * hits, 4 * count)
    assert more[1] - more[0] < high - low, "more requests narrow the interval"


def test_arms_are_named_with_the_parts_they_leave_out() -> None:
    arms = arms_of("sled, wisp+/trimming,price,fcfs,wisp/estimator,sled,colocated")
    assert [arm.name for arm in arms] == ["sled", "wisp+/trimming,price", "fcfs", "wisp/estimator", "colocated"]
    assert [arm.serving for arm in arms] == ["wisp"] * 4 + ["colocated"]
    assert arms[1].scheduler() == {"WISP_POLICY": "wisp+", "WISP_WITHOUT": '["trimming", "price"]'}
    assert arms[0].scheduler() == {"WISP_POLICY": "sled", "WISP_WITHOUT": "[]"}


def test_a_drafter_serves_the_pool_of_its_hardware_profile() -> None:
    pi = EmulatedHardware(name="raspberry-pi-5")
    assert Arm("wisp").drafter(pi) == {"WISP_POOL": "raspberry-pi-5", "WISP_DEVICE_PROFILE": "raspberry-pi-5"}
    assert Arm("edf").drafter(EmulatedHardware(name="none")) == {"WISP_POOL": "none"}
    fixed = Arm("sled").drafter(pi)
    assert (fixed["WISP_STOP_RULE"], fixed["WISP_DRAFT_LENGTH"]) == ("fixed", "4")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no arm"),
        ("slad", "'slad' is no arm"),
        ("price", "is no arm"),
        ("wisp+/speed", "no arm"),
        ("edf/price", "only wisp"),
        ("centralized/price", "only wisp"),
    ],
)
def test_an_unknown_arm_is_refused(text: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        arms_of(text)


def results() -> LoadResults:
    """Three arms with made-up counts of requests."""
    empty, lag = measure([], WINDOW), lag_of([], [], 0.0)
    points = []
    for arm, holds in (("sled", 4), ("wisp+", 12), ("centralized", 8)):
        for sessions in (4, 8, 12, 16):
            attained = 100 if sessions <= holds else 40
            found = empty.model_copy(
                update={
                    "requests": 100,
                    "attained": attained,
                    "goodput": attained + 100.0 * holds if sessions == holds else 5.0,
                }
            )
            points.append(MeasuredPoint(arm=arm, sessions=sessions, repeat=0, measures=found, lag=lag))
    return LoadResults(window=WINDOW, points=points, aims=[0.95, 0.9])


def test_capacity_and_goodput_are_compared_with_centralized_and_sled() -> None:
    columns, rows = capacity_table(results())
    found = {row[0]: dict(zip(columns, row, strict=True)) for row in rows if row[1] == "95%"}
    assert {arm: one["sessions"] for arm, one in found.items()} == {"sled": 4, "wisp+": 12, "centralized": 8}
    assert (found["wisp+"]["x centralized"], found["wisp+"]["x sled"]) == (1.5, 3.0)
    assert found["wisp+"]["fails at"] == 16
    columns, rows = goodput_table(results())
    assert columns == ["arm", "goodput", "n", "x centralized", "x sled"]
    assert rows == [["sled", 500, 4, 5 / 9, 1.0], ["wisp+", 1300, 12, 13 / 9, 2.6], ["centralized", 900, 8, 1.0, 1.8]]
    ratios = results().ratios()
    assert ratios["wisp+"]["goodput"] == {"centralized": 13 / 9, "sled": 2.6}
    assert ratios["sled"]["capacity 95%"] == {"centralized": 0.5, "sled": 1.0}


def test_repeats_are_compared_in_pairs_and_listed_by_arm() -> None:
    base = results().points[0]
    speeds = {("centralized", 0): 60.0, ("wisp+", 0): 54.0, ("centralized", 1): 40.0, ("wisp+", 1): 44.0}
    points = [
        base.model_copy(
            update={
                "arm": arm,
                "repeat": repeat,
                "measures": base.measures.model_copy(update={"throughput": speed, "goodput": speed / 2}),
            }
        )
        for (arm, repeat), speed in speeds.items()
    ]
    found = LoadResults(window=WINDOW, points=points)
    assert [(point.arm, point.repeat) for point in found.by_arm] == sorted(speeds)
    columns, (row,) = paired_table(found)
    assert len(columns) == len(row)
    assert row[:4] == ["wisp+", "centralized", 4, 2]
    assert row[4:] == pytest.approx([1.0, 1.0, 0.9, 1.1])


def test_a_rival_without_results_has_no_ratio() -> None:
    found = results()
    without = [point for point in found.points if point.arm == "wisp+"]
    assert goodput_table(found.model_copy(update={"points": without}))[0] == ["arm", "goodput", "n"]
    lost = [
        point.model_copy(update={"measures": point.measures.model_copy(update={"attained": 0, "goodput": 0.0})})
        for point in found.points
        if point.arm == "sled"
    ]
    ratios = found.model_copy(update={"points": [*without, *lost]}).ratios()
    assert ratios["wisp+"] == {
        "goodput": {"sled": None},
        "capacity 95%": {"sled": None},
        "capacity 90%": {"sled": None},
    }


def test_tables_have_a_value_for_each_column() -> None:
    found = results()
    for columns, rows in (promise_table(found.points), speed_table(found.points), draft_table(found.points)):
        assert all(len(row) == len(columns) for row in rows)
    assert len(promise_table(found.points)[1]) == 12
    assert draft_table(found.points)[1] == []


def test_notes_name_a_late_generator_and_refusals() -> None:
    found = results()
    late = found.points[0].model_copy(
        update={
            "lag": lag_of([80.0] * 10, [1.0], 0.5),
            "measures": found.points[0].measures.model_copy(update={"reasons": {"429 overloaded": 3}}),
        }
    )
    text = "\n".join(notes(found.model_copy(update={"points": [late]}), 0.1))
    assert "GENERATOR WAS LATE: sled at 4 sessions, requests by 80 ms" in text
    assert "sled at 4 sessions: 3 x 429 overloaded" in text
    assert "resolution 10%" in text
    assert "LATE" not in "\n".join(notes(found))


def test_results_survive_their_file() -> None:
    found = results()
    assert LoadResults.model_validate_json(found.model_dump_json()) == found


@given(st.lists(st.floats(0, 100), max_size=10), st.floats(0.1, 10))
def test_labels_keep_their_order_and_their_distance(wanted: list[float], gap: float) -> None:
    placed = spread(wanted, gap, floor=0.0)
    ordered = sorted(range(len(wanted)), key=lambda i: wanted[i])
    ups = [placed[i] for i in ordered]
    assert all(after - before >= gap * (1 - 1e-9) for before, after in pairwise(ups))
    assert all(place >= 0 for place in placed)
    if all(wanted[b] - wanted[a] >= gap for a, b in pairwise(ordered)):
        assert all(math.isclose(place, want, abs_tol=1e-6) for place, want in zip(placed, wanted, strict=True))


def test_the_picture_names_each_arm(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "load.svg"
    plot(results(), path)
    drawn = path.read_text()
    assert all(drawn.count(f">{arm}</text>") == 2 for arm in ("sled", "wisp+", "centralized"))
