"""The autoscaling rule of the scaling benchmark. A test of the manifests compares it with KEDA's."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from services.tools.bench.scaling.core.autoscaling import Autoscaler, SchedulerMetrics, desired_verifiers
from services.tools.bench.scaling.load_step import scheduler_metrics

METRICS = """\
# TYPE wisp_scheduler_predicted_queue_delay_seconds gauge
wisp_scheduler_predicted_queue_delay_seconds 0.5
# TYPE wisp_scheduler_demand gauge
wisp_scheduler_demand 0.9
# TYPE wisp_scheduler_rounds_total counter
wisp_scheduler_rounds_total{deadline="met"} 90.0
wisp_scheduler_rounds_total{deadline="missed"} 10.0
wisp_scheduler_rounds_total{deadline="none"} 7.0
"""
IDLE = [SchedulerMetrics()] * 13


def test_metrics_are_parsed() -> None:
    assert scheduler_metrics(METRICS) == SchedulerMetrics(queue_delay_s=0.5, demand=0.9, met=90, missed=10)
    assert scheduler_metrics("") == SchedulerMetrics()


def test_the_largest_proposal_counts() -> None:
    now = [SchedulerMetrics(queue_delay_s=0.5, demand=0.6)] * 13
    assert desired_verifiers(1, now) == (3, "queue-delay"), "0.5 over 0.2"
    assert desired_verifiers(2, now) == (5, "queue-delay")
    assert desired_verifiers(2, [replace(one, queue_delay_s=0.1) for one in now]) == (3, "demand")


def test_an_idle_suite_keeps_one_verifier() -> None:
    assert desired_verifiers(4, IDLE)[0] == 1


def test_a_value_close_to_the_wanted_one_changes_nothing() -> None:
    for delay_s in (0.181, 0.219):
        assert desired_verifiers(3, [SchedulerMetrics(queue_delay_s=delay_s)] * 3)[0] == 3
    assert desired_verifiers(3, [SchedulerMetrics(queue_delay_s=0.23)] * 3)[0] == 4


def test_a_step_counts_as_the_averages_fill() -> None:
    busy = SchedulerMetrics(demand=1.05)
    assert desired_verifiers(1, [*IDLE, busy])[0] == 1, "0.175 over half a minute"
    assert desired_verifiers(1, [*IDLE, *[busy] * 3])[0] == 1, "0.525 is within a tenth of 0.5"
    assert desired_verifiers(1, [*IDLE, *[busy] * 4])[0] == 2


def test_missed_deadlines_count_for_a_minute() -> None:
    before = [SchedulerMetrics(met=100, missed=100)] * 13
    assert desired_verifiers(2, before)[0] == 1, "long ago"
    assert desired_verifiers(2, [*before[1:], SchedulerMetrics(met=190, missed=110)]) == (4, "deadlines-missed")


def numbers(scaler: Autoscaler, load: list[SchedulerMetrics]) -> list[int]:
    """The wanted number of verifiers after each sample, one every 5 s."""
    found = []
    for tick, metrics in enumerate(load):
        scaler.sample(metrics)
        scaler.change(5.0 * tick)
        found.append(scaler.current)
    return found


def test_a_crowd_doubles_the_verifiers_every_quarter_minute() -> None:
    busy = SchedulerMetrics(demand=5.0)
    assert numbers(Autoscaler(1, 16), [busy] * 13) == [3] * 3 + [6] * 3 + [12] * 3 + [16] * 4


def test_verifiers_stop_one_by_one_after_five_quiet_minutes() -> None:
    scaler = Autoscaler(1, 4)
    assert numbers(scaler, [SchedulerMetrics(demand=5.0)] * 4)[-1] == 4
    found = numbers(scaler, [SchedulerMetrics()] * 200)
    assert found[:55] == [4] * 55
    stops = [tick for tick in range(1, 200) if found[tick] < found[tick - 1]]
    assert [found[tick] for tick in stops] == [3, 2, 1]
    assert all(24 <= later - sooner <= 27 for sooner, later in pairwise(stops))
