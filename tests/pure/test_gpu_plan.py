"""The arrays of a batch that kernels for GPUs read."""

from __future__ import annotations

from shared.gpu_kernels.plan import ROW_SECTIONS, LaunchPlan, plan_batch
from shared.kernels.cache import PackedBatch

CAPACITY = 64
TWO = PackedBatch(tables=[[7, 3], [5]], starts=[62, 0], counts=[4, 3])


def planned(batch: PackedBatch, wanted: tuple[int, ...] = (), span_tokens: int = 21) -> LaunchPlan:
    tokens = range(100, 100 + sum(batch.counts))
    return plan_batch(batch, tokens, wanted, capacity=CAPACITY, span_tokens=span_tokens, run=256)


def section(plan: LaunchPlan, number: int, count: int = 7) -> list[int]:
    return plan.words[number * CAPACITY :][:count].tolist()


def spans(plan: LaunchPlan) -> list[list[int]]:
    return plan.words[4 * CAPACITY : ROW_SECTIONS * CAPACITY].reshape(-1, 4).tolist()


def test_each_row_has_its_token_position_and_slot() -> None:
    plan = planned(TWO)
    assert section(plan, 0) == [100, 101, 102, 103, 104, 105, 106]
    assert section(plan, 1) == [62, 63, 64, 65, 0, 1, 2]
    assert section(plan, 2) == [7 * 64 + 62, 7 * 64 + 63, 3 * 64, 3 * 64 + 1, 5 * 64, 5 * 64 + 1, 5 * 64 + 2]


def test_rows_up_to_the_capacity_have_no_slot_and_no_span() -> None:
    plan = planned(TWO)
    assert set(plan.words[2 * CAPACITY + 7 : 3 * CAPACITY].tolist()) == {-1}
    assert spans(plan)[plan.spans :] == [[0, 0, 0, 0]] * (CAPACITY - plan.spans)


def test_a_span_is_tokens_of_one_session_and_fits_a_tile() -> None:
    assert spans(planned(TWO))[:2] == [[0, 62, 4, 0], [4, 0, 3, 2]]
    plan = planned(TWO, span_tokens=3)
    assert plan.spans == 3
    assert spans(plan)[:3] == [[0, 62, 3, 0], [3, 65, 1, 0], [4, 0, 3, 2]]


def test_tables_follow_each_other_after_the_rows() -> None:
    assert planned(TWO).words[ROW_SECTIONS * CAPACITY :].tolist() == [7, 3, 5]


def test_wanted_rows_are_filled_up_with_the_first_row() -> None:
    assert section(planned(TWO, wanted=(3, 6)), 3) == [3, 6, 0, 0, 0, 0, 0]


def test_runs_are_those_of_the_longest_session() -> None:
    assert planned(TWO).runs == 1
    assert planned(PackedBatch([[0], [1, 2, 3, 4, 5]], [0, 256], [1, 1])).runs == 2
