"""The cost of a token, the crossover of drafts and plain decoding, and the scheduler beside runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.tools.bench.load.core.crossover import (
    ALLOWED,
    FORCED,
    PLAIN,
    columns_and_rows,
    crossover,
    median_ms_per_token,
    ms_per_token,
    verdicts,
)
from services.tools.bench.load.core.record import Ending, RequestRecord
from services.tools.bench.load.crossover import plot, workload
from services.tools.bench.rounds.token_costs import CENTRALIZED, RUNS, SuiteUsage, counted, token_cost
from services.tools.bench.rounds.token_costs import columns_and_rows as cost_table
from services.tools.bench.scheduler import ROUNDS_BESIDE_RUNS, beside_runs


def record(*arrivals: tuple[float, int], start_s: float = 0.0) -> RequestRecord:
    return RequestRecord(
        session=0,
        number=0,
        service_class="c",
        device="",
        slo=None,
        start_s=start_s,
        lag_ms=0.0,
        ending=Ending.COMPLETE,
        total_ms=arrivals[-1][0],
        tokens=sum(count for _, count in arrivals),
        arrivals=list(arrivals),
    )


def test_time_per_token_counts_only_while_all_streams_run() -> None:
    alone_at_first = record((0.0, 1), (10.0, 1), (20.0, 1), (60.0, 2), (100.0, 2))
    late = record((15.0, 1), (55.0, 2), (95.0, 2), (300.0, 1))
    assert ms_per_token([alone_at_first, late]) == pytest.approx((80 / 4 + 80 / 4) / 2)
    moved = record((5.0, 1), (45.0, 2), (85.0, 2), (290.0, 1), start_s=0.01)
    assert ms_per_token([alone_at_first, moved]) == ms_per_token([alone_at_first, late])


def test_streams_that_never_ran_together_count_with_their_own_time() -> None:
    assert ms_per_token([record((0.0, 1), (10.0, 1)), record((50.0, 1), (80.0, 1))]) == pytest.approx(20.0)


def test_all_streams_together_gain_what_one_of_them_gains() -> None:
    copied = record((0.0, 1), (40.0, 4), (80.0, 4))
    others = [record((0.0, 1), (40.0, 1), (80.0, 1)) for _ in range(3)]
    assert ms_per_token([copied, *others]) == pytest.approx(4 * 80 / (8 + 3 * 2))
    assert median_ms_per_token([copied, *others]) == pytest.approx(40.0)


def curves(plain: list[float], forced: list[float], allowed: list[float] | None = None) -> dict[str, dict[int, float]]:
    counts = [1, 2, 4, 8]
    lists = {ALLOWED: allowed or plain, PLAIN: plain, FORCED: forced}
    return {way: dict(zip(counts, times, strict=True)) for way, times in lists.items()}


def test_the_crossover_is_interpolated_where_plain_decoding_becomes_faster() -> None:
    assert crossover(curves([10, 10, 10, 10], [5, 8, 12.5, 20])) == pytest.approx(2.8284, abs=1e-3)
    assert crossover(curves([10, 10, 10, 10], [12, 13, 14, 15])) == 1.0
    assert crossover(curves([10, 10, 10, 10], [5, 5, 5, 5])) is None
    wavering = crossover(curves([10, 10, 10, 10], [5, 12, 8, 20]))
    assert wavering is not None
    assert 4 < wavering < 8, "the last one counts"


def test_allowed_drafts_are_compared_with_the_better_way() -> None:
    measured = curves([10, 10, 10, 10], [5, 8, 12.5, 20], allowed=[5, 8, 10.2, 11])
    at_par = curves([10] * 4, [5, 8, 12, 20], allowed=[5, 8, 10, 10])
    _, rows = columns_and_rows(measured, at_par)
    assert [row[-2] for row in rows] == pytest.approx([1.0, 1.0, 1.02, 1.1])
    assert [row[-1] for row in rows] == pytest.approx([1.0] * 4)
    first, second = verdicts(measured, at_par)
    assert "below 2.8 streams" in first
    assert "all streams together: missed (at most 1.10 times, with 8); the median stream: met" in second
    assert "the median stream: missed" in verdicts(at_par, measured)[1]


def test_the_plot_marks_the_crossover(tmp_path: Path) -> None:
    path = tmp_path / "crossover.svg"
    plot(curves([10, 12, 16, 30], [5, 10, 20, 50]), path)
    assert "drafts pay below" in path.read_text()
    plot(curves([10, 12, 16, 30], [50, 50, 50, 50]), path)
    assert "drafts pay below" not in path.read_text()


def test_all_streams_of_a_crossover_have_the_same_length() -> None:
    asked = workload(40, 3)
    assert {(one.max_tokens, one.ignore_eos) for one in (asked.request(i, 7) for i in range(20))} == {(40, True)}


def test_usage_of_an_idle_suite_is_no_cost_of_tokens() -> None:
    idle = SuiteUsage(2.0, published=10, received=20, redis_calls=4, cpu_s={"verifier": 0.1, "redis": 0.02})
    busy = SuiteUsage(10.0, published=150, received=400, redis_calls=70, cpu_s={"verifier": 8.5, "redis": 0.05})
    cost = token_cost(RUNS, 200, idle, busy)
    assert (cost.published, cost.received, cost.redis_calls) == (0.5, 1.5, 0.25)
    assert cost.cpu_ms == {"verifier": pytest.approx(40.0), "redis": 0.0}
    assert cost.tokens_per_s == 20.0
    assert cost.total_cpu_ms == pytest.approx(40.0)


def test_centralized_serving_has_no_messages_to_count() -> None:
    usage = SuiteUsage(1.0, cpu_s={"baseline": 0.5})
    suite = token_cost(RUNS, 10, SuiteUsage(1.0), SuiteUsage(1.0, 5, 5, 5, {"verifier": 0.1}))
    columns, rows = cost_table([suite, token_cost(CENTRALIZED, 10, SuiteUsage(1.0), usage)])
    assert [dict(zip(columns, row, strict=True))["published"] for row in rows] == [0.5, None]
    assert [dict(zip(columns, row, strict=True))["CPU ms"] for row in rows] == [pytest.approx(10), pytest.approx(50)]


def test_counts_are_summed_over_services_and_kinds_of_messages() -> None:
    drafter = (
        'wisp_messages_published_total{type="Verify"} 3.0\nwisp_messages_published_total{type="Cancel"} 1.0\n'
        'wisp_messages_received_total{type="Result"} 7.0\nwisp_redis_calls_total 2.0\n'
    )
    assert counted([drafter, "wisp_redis_calls_total 5.0\nother_total 9.0\n"]) == (4.0, 7.0, 7.0)


def test_decisions_beside_runs_are_timed() -> None:
    rounds, report_us, median_ms, p90_ms, p99_ms, load_ms = beside_runs(20, 1)
    assert rounds == ROUNDS_BESIDE_RUNS
    assert report_us > 0
    assert 0 < median_ms <= p90_ms <= p99_ms
    assert load_ms > 0
