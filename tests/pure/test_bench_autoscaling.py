"""The autoscaler's rule in the scaling benchmark. A test of the manifests compares it with KEDA's."""

from __future__ import annotations

from dataclasses import replace

from services.tools.bench.scaling.core.autoscaling import Seen, seen, wanted

METRICS = """\
# TYPE wisp_scheduler_predicted_queue_delay_seconds gauge
wisp_scheduler_predicted_queue_delay_seconds 0.5
# TYPE wisp_scheduler_utilization gauge
wisp_scheduler_utilization 0.9
# TYPE wisp_scheduler_rounds_total counter
wisp_scheduler_rounds_total{deadline="met"} 90.0
wisp_scheduler_rounds_total{deadline="missed"} 10.0
wisp_scheduler_rounds_total{deadline="none"} 7.0
"""
IDLE = [Seen()] * 13


def test_metrics_are_read() -> None:
    assert seen(METRICS) == Seen(queue_delay_s=0.5, utilization=0.9, met=90, missed=10)
    assert seen("") == Seen()


def test_the_largest_proposal_counts() -> None:
    now = [Seen(queue_delay_s=0.5, utilization=0.8)] * 13
    assert wanted(1, now) == (3, "queue-delay"), "0.5 over 0.2"
    assert wanted(2, now) == (5, "queue-delay")
    assert wanted(2, [replace(one, queue_delay_s=0.1) for one in now]) == (3, "utilization")


def test_nothing_to_do_leaves_one() -> None:
    assert wanted(4, IDLE)[0] == 1


def test_a_value_close_to_the_wanted_one_changes_nothing() -> None:
    for delay_s in (0.181, 0.219):
        assert wanted(3, [Seen(queue_delay_s=delay_s)] * 3)[0] == 3
    assert wanted(3, [Seen(queue_delay_s=0.23)] * 3)[0] == 4


def test_a_step_is_believed_as_the_averages_fill() -> None:
    busy = Seen(utilization=1.5)
    assert wanted(1, [*IDLE, busy])[0] == 1, "0.25 over half a minute"
    assert wanted(1, [*IDLE, *[busy] * 3])[0] == 1, "0.75 is within a tenth of 0.7"
    assert wanted(1, [*IDLE, *[busy] * 4])[0] == 2


def test_missed_deadlines_are_those_of_the_last_minute() -> None:
    before = [Seen(met=100, missed=100)] * 13
    assert wanted(2, before)[0] == 1, "long ago"
    assert wanted(2, [*before[1:], Seen(met=190, missed=110)]) == (4, "deadlines-missed")
